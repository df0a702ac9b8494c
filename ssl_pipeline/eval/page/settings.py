"""The settings of runs, and how they differ: from each other, or a run from the recipe that it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ssl_pipeline.config import Tree, Value
from ssl_pipeline.config.arguments import leaves
from ssl_pipeline.eval.page.html import Section, about, folded, heading, lines_of, paragraph, section, table_of
from ssl_pipeline.eval.page.record import Record
from ssl_pipeline.run.doctor.records import read_recipe_of

OWN = {"output", "recipe"}  # different for every run
LENGTHS = ("train.epochs", "train.steps")  # one of them is null: what takes the place of the recipe's is shown


def settings_section(records: Sequence[Record]) -> list[Section]:
    """The settings of the runs; none where they are not known."""
    known = [record for record in records if record.text]
    if not known:
        return []
    parts = _between(known) if len(known) > 1 else _from_recipe(known[0])
    return [
        section("Settings", *parts, *(folded(f"{record.name}: config.yaml", lines_of(record.text)) for record in known))
    ]


def _between(records: Sequence[Record]) -> list[str]:
    flat = [dict(leaves(record.settings)) for record in records]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in OWN]
    rows = []
    for key in keys:
        values = [short(one[key]) if key in one else "-" for one in flat]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return [paragraph("The runs have the same settings.")]
    return [
        heading("Where they differ"),
        about("Every setting that is not the same in all of them."),
        table_of(["", *(record.name for record in records)], rows),
    ]


def _from_recipe(record: Record) -> list[str]:
    recipe = read_recipe_of(record.settings)
    if recipe is None:
        return []
    of_recipe, own, rows = dict(leaves(recipe)), dict(leaves(record.settings)), []
    added = [] if isinstance(recipe.get("knn"), dict) else [key for key in own if key.startswith("knn.")]
    for key in dict.fromkeys([*of_recipe, *LENGTHS, *added]):
        value, now = of_recipe.get(key), own.get(key, own.get(f"{key}.value"))
        may_be_absent = key in LENGTHS or key.startswith("knn.")
        if value is None or now is None:
            differs = may_be_absent and value is not now
        else:
            differs = key not in OWN and not _same(now, value)
        if differs:
            rows.append([key, *("-" if one is None else short(one) for one in (value, now))])
    name = str(record.settings["recipe"])
    if not rows:
        return [paragraph(f"As in the recipe {name}.")]
    return [heading("What differs from the recipe"), table_of(["", name, "this run"], rows)]


def short(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _same(one: Value, other: Value) -> bool:
    """Whether two settings are equal: 30 and 30.0, "30" and 30; a single value where there is one per view."""
    if isinstance(one, list) and not isinstance(other, list):
        return all(_same(item, other) for item in one)
    try:
        return float(str(one)) == float(str(other))
    except ValueError:
        return short(one) == short(other)


def facts(record: Record) -> list[list[str]]:
    """Where a run is and what it trains on, for a table."""
    backbone = section_of(record.settings, "backbone")
    origin = backbone.get("weights")
    weights = f"{origin}" if origin else "random initialisation"
    if backbone.get("weights_from"):
        weights += f" ({backbone['weights_from']})"
    status = record.status
    labelled = section_of(section_of(record.settings, "data"), "labelled")
    rows = [
        ["directory", str(record.path.resolve())],
        ["state", "-" if status is None else f"{status.state}, step {status.step:,}, {status.time}"],
        ["recipe", str(record.settings.get("recipe") or "-")],
        ["method", str(record.setting("method", "name") or "-")],
        ["backbone", str(backbone.get("name", "-"))],
        ["initial weights", weights if backbone else "-"],
        ["images", str(record.setting("data", "shards") or "-")],
    ]
    return [*rows, ["labelled images", str(labelled["shards"])]] if labelled else rows


def section_of(tree: Mapping[str, Value], name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}
