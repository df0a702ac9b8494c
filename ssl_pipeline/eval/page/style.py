"""The look of a run's page: one style sheet for phones and wide screens, light and dark, which loads nothing."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1b2026; --faint: #5d6773; --line: #dfe3e8; --back: #f5f6f8; --card: #fff;
  --soft: #eef1f5; --run-0: #2a63c9; --run-1: #d1651b; --run-2: #23895a; --run-3: #9b45b0; --run-4: #b8323f;
  --run-5: #57727f; --run-6: #b0902a; --run-7: #d0569b; --run-8: #1f9aa5; --run-9: #7a6a58; --good: #1d8a4e;
  --bad: #c5392f; --warm: #a96a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e5e8ec; --faint: #9aa5b1; --line: #2f363f; --back: #12151a;
  --card: #1a1f26; --soft: #232a33; --run-0: #74a9ff; --run-1: #f59a56; --run-2: #5fcf97; --run-3: #d392e4;
  --run-4: #f2808a; --run-5: #9db4c0;
  --run-6: #e0c65f; --run-7: #f59ac8; --run-8: #62d2da; --run-9: #c4b19b; --good: #5fcf8d;
  --bad: #f58076; --warm: #e5b45a; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 56px; -webkit-text-size-adjust: 100%; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--text);
  background: var(--back); margin: 0; overflow-wrap: anywhere; }
header, main, footer { max-width: 1320px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.75em; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.2em; margin: 0 0 4px; letter-spacing: -0.005em; } h3 { font-size: 1em; margin: 18px 0 4px; }
p { margin: 6px 0; } ul { margin: 6px 0; padding-left: 20px; }
.lead { font-size: 1.15em; max-width: 70ch; margin: 4px 0 14px; }
.about { color: var(--faint); font-size: 0.92em; max-width: 90ch; margin: 0 0 12px; }
.warning { color: var(--warm); } .state { display: inline-block; font-size: 0.55em; font-weight: 600; padding: 2px 10px;
  border-radius: 99px; vertical-align: middle; margin-left: 8px; background: var(--soft); color: var(--faint);
  letter-spacing: 0; } .state.done { color: var(--good); } .state.failed { color: var(--bad); }
.state.running { color: var(--run-0); }
nav { position: sticky; top: 0; z-index: 1; background: var(--back); border-bottom: 1px solid var(--line);
  margin-bottom: 16px; } nav div { max-width: 1320px; margin: 0 auto; padding: 8px 16px; display: flex; gap: 4px 16px;
  overflow-x: auto; scrollbar-width: none; } nav a { color: var(--faint); text-decoration: none; white-space: nowrap;
  font-size: 0.9em; } nav a:hover { color: var(--text); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 0 0 16px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; margin: 0 0 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.4em; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; }
.tile span { color: var(--faint); font-size: 0.82em; display: block; line-height: 1.35; }
.wide { overflow-x: auto;
  background: linear-gradient(90deg, var(--card) 40%, transparent) 0 / 36px 100% no-repeat local,
  linear-gradient(270deg, var(--card) 40%, transparent) 100% / 36px 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 / 14px 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) 100% / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--faint); font-size: 0.88em; vertical-align: bottom; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
td.share { min-width: 104px; } td small { color: var(--faint); margin-left: 4px; }
.facts td:last-child, .facts th:last-child { text-align: left; white-space: normal; }
.facts td:first-child { color: var(--faint); vertical-align: top; }
td.share i { display: block; height: 4px; border-radius: 2px; margin: 2px 0 0; background: var(--run-0);
  opacity: 0.75; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 16px 20px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.9em; margin: 0 0 10px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 0.85em; color: var(--faint); line-height: 1.35; }
.curves figcaption b { color: var(--text); font-weight: 600; } .curves figcaption { min-height: 1.5em; }
svg { width: 100%; height: auto; display: block; } svg text { font: 10px system-ui, "DejaVu Sans", sans-serif;
  fill: var(--faint); }
.curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; } .axis { fill: none; stroke: var(--faint); }
.grid { stroke: var(--line); stroke-width: 0.7; } .start { stroke-dasharray: 4 3; opacity: 0.65; }
.planned { stroke-dasharray: 2 2; }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 12px; align-items: flex-start; }
.pictures figure { width: 84px; } .pictures.large figure { width: 112px; } .pictures img { width: 100%; aspect-ratio: 1;
  object-fit: cover; border-radius: 6px; display: block; background: var(--soft); image-rendering: pixelated; }
.pictures.smooth img { image-rendering: auto; }
.pictures figcaption { font-size: 0.76em; margin-top: 2px; overflow: hidden; text-overflow: ellipsis; }
.query { margin-right: 10px; } .query img { outline: 2px solid var(--text); outline-offset: 1px; }
.same img { outline: 2px solid var(--good); outline-offset: 1px; }
.other img { outline: 2px solid var(--bad); outline-offset: 1px; }
.rows { display: flex; flex-wrap: wrap; gap: 0 36px; }
.map { max-width: 900px; } .map svg { background: var(--soft); border-radius: 8px; }
.map image { image-rendering: auto; }
.finding { border-left: 4px solid var(--warm); background: var(--soft); border-radius: 0 8px 8px 0; padding: 8px 14px;
  margin: 8px 0; } .finding code { font-size: 0.9em; color: var(--faint); } .well { border-color: var(--good); }
pre { overflow-x: auto; font-size: 0.85em; } details { margin: 10px 0 0; }
summary { cursor: pointer; color: var(--faint); font-size: 0.92em; }
footer { color: var(--faint); font-size: 0.85em; padding-bottom: 32px; }
@media (max-width: 520px) { header { padding-top: 18px; } h1 { font-size: 1.4em; } section { padding: 14px;
  border-radius: 10px; } .tiles { grid-template-columns: 1fr 1fr; } .pictures figure { width: 62px; }
  .pictures.large figure { width: 88px; } th, td { padding-right: 10px; } td small { display: block; margin: 0; }
  td:first-child { white-space: normal; min-width: 96px; } td.share { min-width: 74px; } .tile b { font-size: 1.2em; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""

NUM_COLOURS = 10
"""Of runs, and of classes in a map: --run-0 and so on; more of them begin again."""
