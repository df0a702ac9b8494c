"""A run's page: it holds what is known of the run, loads nothing, and shows foreign names as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree, rmtree

import pytest

from ssl_pipeline.commands import report
from ssl_pipeline.config import RECIPES, read_recipe, run_command
from ssl_pipeline.eval import knn, suite
from ssl_pipeline.eval.measures import Measure, measures_json
from ssl_pipeline.eval.page.html import Section
from ssl_pipeline.eval.page.places import shortened
from ssl_pipeline.eval.page.record import Record
from ssl_pipeline.eval.page.settings import settings_section
from ssl_pipeline.eval.page.sheets import sheets
from ssl_pipeline.eval.report import ReportConfig
from ssl_pipeline.eval.suite_measures import SuiteConfig

DOCTOR = Path(__file__).parents[1] / "run" / "doctor" / "recorded"
VOID = {"meta", "img", "line", "br"}
ROWS = [
    {"step": 0, "position": 0, "knn_top1": 21.5, "rankme": 4.5},
    {"step": 5, "position": 40, "loss": 2.5, "learning_rate": 0.1},
    {"step": 10, "position": 80, "loss": 1.25, "learning_rate": 0.2, "knn_top1": 83.25, "rankme": 30.0},
    {"step": 15, "position": 99, "loss": 1.5, "learning_rate": 0.1, "knn_top1": 71.0, "rankme": 20.0},
]
FAST = ["workers=0", "k=5", "solver=sgd", "epochs=2", "learning_rates=[1.0]", "weight_decays=[0.0]"]


class Page(HTMLParser):
    """Its tags, what it shows and the addresses in it; fails for tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += f"{data} "


def log(run: Path, rows: list[dict] = ROWS) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(run: Path, text: str = "method: {name: dino}\nbackbone: {name: vit_x, weights: a1_in1k}\n") -> None:
    (run / "config.yaml").write_text(text)


def call(*arguments: str) -> int:
    return run_command(ReportConfig, report.main, command="python -m eval.report", argv=list(arguments))


def page_of(run: Path) -> Page:
    assert call(f"run={run}") == 0
    return Page((run / "report" / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def evaluated(run: Path, train: str, test: str) -> Path:
    log(run)
    settings(run)
    arguments = [f"run={run}", f"train={train}", f"test={test}", *FAST]
    assert run_command(SuiteConfig, suite.main, command="", argv=arguments) == 0
    return run


def test_the_page_has_everything_and_loads_nothing(evaluated: Path) -> None:
    page = page_of(evaluated)
    found = json.loads((evaluated / "eval" / "suite.json").read_text())
    titles = ("Doctor", "Results", "Monitors", "Curves", "Nearest neighbours", "Map of the embeddings")
    for title in (*titles, "Patches and attention", "By class (linear probe)", "Run", "Settings"):
        assert f" {title} " in page.text
        assert f"#{Section(title, ()).anchor}" in page.addresses
    assert page.tags.count("svg") == 4 + 1  # loss, k-NN, RankMe, learning rate; the map
    neighbours, maps = 8 * (1 + 5), 8 * 5  # image, patches, attention, two heads
    assert page.tags.count("img") == neighbours + maps
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert all(re.match("data:image/(jpeg|png);base64,", address) for address in pictures)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    low, high = found["knn"]["top1_interval"]
    assert f"{found['knn']['top1']:.2f} % ({low:.1f} to {high:.1f})" in page.text.replace("  ", " ")
    assert "the run's evaluated backbone (backbone.safetensors); SHA-256" in page.text
    assert "a1_in1k" in page.text
    html = (evaluated / "report" / "index.html").read_text()
    assert not re.search(r"https?://|url\(|@import", html)
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:;" in html
    assert len(html) < 5_000_000


def test_monitors_show_the_start_the_best_and_the_last(run: Path) -> None:
    log(run)
    page = page_of(run)
    assert "k-NN top-1 (%) 21.5 83.25 (step 10) 71 (step 15)" in page.text.replace("  ", " ")
    assert "K-NN top-1 (%) went from 21.5 at the start to 71 at step 15." in page.text
    told = "Nothing was evaluated yet: python -m eval.suite run=DIR train=SHARDS test=SHARDS, where DIR is the run's"
    assert told in page.text


def test_a_single_evaluator_is_enough(run: Path, train: str, test: str) -> None:
    arguments = [f"run={run}", f"train={train}", f"test={test}", "workers=0", "k=[5,7]", "baselines=true"]
    assert run_command(knn.KnnConfig, knn.main, command="", argv=arguments) == 0
    page = page_of(run)
    assert "top-1, k=7" in page.text
    assert "% at random initialisation" in page.text


def test_a_logistic_regression_is_called_one(run: Path) -> None:
    (run / "eval").mkdir()
    random = {"top1": 74.0, "top1_interval": [70.0, 78.0], "solver": "logistic"}
    pixels = {"top1": 50.0, "top1_interval": [45.0, 55.0], "solver": "sgd"}
    found = {"top1": 75.0, "top1_interval": [71.0, 79.0], "solver": "logistic", "protocol": {"train": "a"}}
    report = found | {"baselines": {"random": random, "raw_pixels": pixels}}
    (run / "eval" / "linear.json").write_text(json.dumps(report))
    text = page_of(run).text
    told = "Logistic regression recognises 75.0 % of the test images (71.0 to 79.0), against 74.0 % at random"
    assert f"{told} initialisation (difference within the interval)." in text  # and not against another classifier's
    assert "linear probe" not in text


@pytest.mark.other
def test_images_through_which_it_is_measured_are_measured_first(run: Path, train: str, test: str) -> None:
    assert call(f"run={run}", f"train={train}", f"test={test}", "images=0") == 0
    assert (run / "eval" / "suite.json").is_file()
    page = Page((run / "report" / "index.html").read_text(encoding="utf-8"))
    assert "k-NN, top-1, k=10" in page.text
    assert "Map of the embeddings" not in page.text


def test_reports_of_before_intervals_are_read(run: Path) -> None:
    protocol = {"train": "a", "num_train": 3, "test": "b", "num_test": 2, "num_classes": 2, "size": 8, "subject": {}}
    (run / "eval").mkdir()
    old = {"top1": 50.0, "top5": 100.0, "baselines": {}, "protocol": protocol}
    (run / "eval" / "knn.json").write_text(json.dumps(old | {"by_k": {"20": {"top1": 50.0, "top5": 100.0}}}))
    (run / "eval" / "linear.json").write_text(json.dumps(old | {"solver": "sgd", "top1": 75.0}))
    page = page_of(run)
    assert "top-1 50.00 %" in page.text.replace("  ", " ")
    assert "top-1 75.00 %" in page.text.replace("  ", " ")


def test_images_are_told_as_they_were_used(run: Path) -> None:
    (run / "eval").mkdir()
    same = {"train": "a", "num_train": 3, "test": "a", "num_test": 3, "num_classes": 2, "leave_one_out": True}
    old = {"top1": 50.0, "top5": 100.0, "baselines": {}, "protocol": same}
    (run / "eval" / "knn.json").write_text(json.dumps(old | {"by_k": {"20": {"top1": 50.0, "top5": 100.0}}}))
    found = {"measures": measures_json([Measure("nmi", "NMI", 0.5, unit="")]), "baselines": {}}
    of_classes = found | {"protocol": {"images": "photos", "num_classes": 2}}
    (run / "eval" / "clustering.json").write_text(json.dumps(of_classes))
    (run / "eval" / "label_free.json").write_text(json.dumps(found | {"protocol": {"images": "photos"}}))
    text = page_of(run).text
    assert "K-NN recognises 50.0 % of the images, each by all others" in text
    assert "Measured on a (3 images), each by all others, 2 classes." in text
    assert "Measured on photos, against their 2 classes." in text
    assert "Measured on photos, without labels." in text


def test_another_length_and_a_monitor_left_out_differ_from_the_recipe() -> None:
    place = Path("runs/own")
    recipe = "digits_dino"
    settings = read_recipe(recipe, RECIPES)
    settings |= {"recipe": recipe, "knn": None, "train": settings["train"] | {"epochs": None, "steps": 5}}
    record = Record(place, "own", [], [], {}, "train: ...", settings, [], None)
    text = Page("".join(part for part in settings_section([record])[0].parts)).text.replace("  ", " ")
    assert "train.epochs 25 -" in text
    assert "train.steps - 5" in text
    assert "knn.every 5ep -" in text
    assert "optim" not in text


def test_reports_of_any_evaluator_are_tables(run: Path) -> None:
    protocol = {"train": "a", "test": "b", "shots": [1, 5], "subject": {}, "warnings": ["b is small"]}
    shots = Measure("top1_5_per_class", "top-1, 5 per class", 61.25, interval=(60.0, 62.5), spread=0.5)
    shots_of_random = Measure("top1_5_per_class", "top-1, 5 per class", 20.0)
    report = {
        "measures": measures_json([shots, Measure("nmi", "NMI", 0.5, unit="")]),
        "baselines": {"random": {"measures": measures_json([shots_of_random])}},
    }
    (run / "eval").mkdir()
    (run / "eval" / "few_shot-student.json").write_text(json.dumps(report | {"protocol": protocol}))
    text = page_of(run).text.replace("  ", " ")
    assert "few shot, student" in text
    assert "top-1, 5 per class 61.25 % +- 0.5 (60.0 to 62.5) 20.00 %" in text
    assert "NMI 0.5 -" in text
    assert "Warning: b is small" in text
    assert "Settings: shots 1, 5." in text


def other_run(run: Path, place: Path) -> Path:
    """The same run, but that it logged another loss and was set otherwise."""
    copytree(run, place)
    log(place, [*ROWS[:3], {**ROWS[3], "loss": 0.5, "knn_top1": 90.0}])
    settings(place, "method: {name: simclr}\nbackbone: {name: vit_x, weights: a1_in1k}\n")
    return place


def test_several_runs_are_laid_over_each_other(run: Path, tmp_path: Path) -> None:
    log(run)
    settings(run)
    other = other_run(run, tmp_path / "other")
    own = page_of(run)
    assert call(f"run={run},{other}") == 0
    assert page_of(run).text == own.text, "the page of the first run stays"
    html = (run / "report" / "with_other.html").read_text(encoding="utf-8")
    loss = re.search(r'<svg[^>]*aria-label="loss.*?</svg>', html).group()
    assert loss.count("<polyline") == 2
    assert "var(--run-0)" in loss
    assert "var(--run-1)" in loss
    text = Page(html).text.replace("  ", " ")
    assert "method.name dino simclr" in text
    assert "backbone.name" not in text
    assert "other: k-NN top-1 (%) went from 21.5 at the start to 90 at step 15" in text


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    log(run)
    settings(run)
    other = other_run(run, tmp_path / "second" / run.name)
    assert call(f"run={run},{other}") == 0
    text = Page((run / "report" / f"with_{run.name}.html").read_text(encoding="utf-8")).text.replace("  ", " ")
    assert f"second/{run.name}: k-NN top-1 (%) went from 21.5 at the start to 90 at step 15" in text
    assert "method.name dino simclr" in text


def test_a_directory_takes_the_page_under_its_own_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(run)
    (tmp_path / "there").mkdir()
    for output, written in (("there", "there/index.html"), ("new", "new/index.html"), ("my.html", "my.html")):
        assert call(f"run={run}", f"output={tmp_path / output}", "images=0") == 0
        assert f"written to {tmp_path / written}" in capsys.readouterr().out
        assert (tmp_path / written).is_file()
    assert call(f"run={run}", f"output={run / 'config.yaml'}") == 2
    assert f"output must be a file NAME.html or a directory. Got {run / 'config.yaml'}." in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "method: {name: dino}\n"


def test_the_page_has_no_full_path(evaluated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home of me"))
    shards = [str(place) for place in (tmp_path / "home of me" / "my photos", "/data/someone/photos/train")]
    settings(evaluated, json.dumps({"method": {"name": "dino"}, "data": {"shards": shards[0], "more": shards[1]}}))
    text = page_of(evaluated).text
    html = re.sub('base64,[^"]*', "", (evaluated / "report" / "index.html").read_text(encoding="utf-8"))
    for private in (str(tmp_path.parent), "/home of me", "/data/someone"):
        assert private not in html
    assert "~/my photos" in text
    assert '".../photos/train"' in text
    assert f"Measured on .../{Path(report_of(evaluated)['train']).parent.name}" in text


def report_of(run: Path) -> dict:
    return json.loads((run / "eval" / "suite.json").read_text())["protocol"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("Cannot read '/a/b/c.tar': gone.", "Cannot read '.../b/c.tar': gone."),
        ("run=/a/b/runs/x train=/c/d", "run=.../runs/x train=.../c/d"),
        ("from https://a/b/c, s3://bucket/a/b or runs/a/b", "from https://a/b/c, s3://bucket/a/b or runs/a/b"),
        ("images/s, 1 / 2 / 3, ~/a/b/c and ../a/b/c", "images/s, 1 / 2 / 3, ~/a/b/c and ../a/b/c"),
    ],
)
def test_only_full_paths_are_shortened(words: str, shown: str) -> None:
    assert shortened(words) == shown


def test_layers_share_one_figure(run: Path) -> None:
    layers = {f"gradient_norm/layer{number:02d}": 1.0 + number for number in range(60)}
    log(run, [row | layers for row in ROWS[1:]])
    html = (page_of(run), (run / "report" / "index.html").read_text(encoding="utf-8"))[1]
    assert "gradient norm of 40 layers" in html
    assert html.count("<polyline") == 4 + 40  # loss, k-NN, RankMe, learning rate
    assert "layer00: 1 at step 15" in html


def test_pictures_become_sheets(evaluated: Path) -> None:
    assert call(f"run={evaluated}", "images=0") == 0
    (sheet,) = sheets((evaluated / "report" / "index.html").read_text(encoding="utf-8")).values()
    assert sheet.shape == (8 * 68, 6 * 68, 3)
    assert sheet[:64, :64].std() > 0
    assert (sheet[64:68] == 255).all()


def test_the_run_that_is_ahead_is_named_and_other_protocols_too(
    evaluated: Path, tmp_path: Path, train: str, test: str
) -> None:
    other = other_run(evaluated, tmp_path / "other")
    path = other / "eval" / "suite.json"
    report = json.loads(path.read_text())
    report["knn"] |= {"top1": 0.0, "top1_interval": [0.0, 0.1]}
    path.write_text(json.dumps(report | {"protocol": report["protocol"] | {"size": 32, "own_size": 32}}))
    assert call(f"run={evaluated},{other}", "images=0") == 0
    text = Page((evaluated / "report" / "with_other.html").read_text(encoding="utf-8")).text
    assert f"{evaluated.name} is ahead in k-NN top-1 with" in text
    assert "other with 0.0 %." in text, "a difference beyond the intervals"
    assert f"Each network was measured as it was trained (size: {evaluated.name} 16, other 32)" in text
    assert f"random initialisation of {evaluated.name}" in text
    for by_hand in ({"size": 32}, {"size": 32, "own_size": None}):  # and as reports of older versions have it
        path.write_text(json.dumps(report | {"protocol": report["protocol"] | by_hand}))
        assert call(f"run={evaluated},{other}", "images=0") == 0
        text = Page((evaluated / "report" / "with_other.html").read_text(encoding="utf-8")).text
        assert f"other was measured differently (size: {evaluated.name} 16, other 32): its figures must not" in text
        assert "is ahead" not in text
        assert "as it was trained" not in text
    path.write_text(json.dumps(report | {"protocol": report["protocol"] | {"precision": "bf16"}}))
    assert call(f"run={evaluated},{other}", "images=0") == 0
    text = Page((evaluated / "report" / "with_other.html").read_text(encoding="utf-8")).text
    assert "measured differently" in text
    assert "is ahead" not in text
    assert (
        f'other was measured differently (precision: {evaluated.name} "no", other "bf16"): its figures must not' in text
    )


def knn_report(top1: dict[int, float], temperature: float = 0.07) -> dict:
    measures = [
        {"name": f"top1_k{k}", "title": f"top-1, k={k}", "value": value, "unit": "%", "interval": None, "spread": None}
        for k, value in top1.items()
    ]
    protocol = {"k": list(top1), "temperature": temperature, "size": 16, "own_size": 16}
    return {
        "evaluator": "knn",
        "measures": measures,
        "top1": measures[0]["value"],
        "baselines": {},
        "protocol": protocol,
    }


@pytest.mark.parametrize(
    ("first", "other", "told", "warning"),
    [
        (({10: 60.0}, 0.07), ({10: 70.0, 20: 50.0}, 0.07), "b is ahead in k-NN top-1 with 70.0 %, before a with", ""),
        (({10: 60.0}, 0.07), ({20: 50.0, 10: 60.0}, 0.07), "a and b are equal in k-NN top-1, k=10, with 60.0 %.", ""),
        (({20: 90.0, 10: 60.0}, 0.07), ({10: 70.0}, 0.07), "b is ahead in k-NN top-1, k=10, with 70.0 %, before a", ""),
        (
            *(({10: 60.0}, 0.07), ({20: 70.0}, 0.07)),
            "measured differently",
            "b was measured differently (k: a [10], b [20]): its figures must not be compared with the others.",
        ),
        (
            *(({10: 60.0}, 0.07), ({10: 70.0, 20: 80.0}, 0.1)),
            "measured differently",
            "b was measured differently (temperature: a 0.07, b 0.1): its figures must not be compared with the",
        ),
        (
            *(({5: 60.0, 10: 65.0}, 0.07), ({20: 70.0, 100: 80.0}, 0.07)),
            "measured differently",
            "b was measured differently (k: a [5, 10], b [20, 100]): its figures must not be compared with the",
        ),
    ],
)
def test_runs_are_compared_at_the_k_that_both_have(
    run: Path, tmp_path: Path, first: tuple, other: tuple, told: str, warning: str
) -> None:
    for name, of_run in (("a", first), ("b", other)):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "knn.json").write_text(json.dumps(knn_report(*of_run)))
    assert call(f"run={tmp_path / 'a'},{tmp_path / 'b'}", "images=0") == 0
    text = Page((tmp_path / "a" / "report" / "with_b.html").read_text(encoding="utf-8")).text
    assert told in text
    assert warning in text
    assert ("must not be compared" in text) == bool(warning)


def test_one_figure_of_two_names_is_one_row(run: Path, tmp_path: Path) -> None:
    several = knn_report({10: 60.0, 20: 65.0})
    several["protocol"]["temperature"] = [0.07, 0.1]
    several["measures"] = [
        {
            **measure,
            "name": f"{measure['name']}_temperature{by}",
            "title": f"{measure['title']}, temperature {by}",
            "value": measure["value"] + of_temperature,
        }
        for by, of_temperature in ((0.07, 0.0), (0.1, 1.0))
        for measure in several["measures"]
    ]
    both = {"a": several, "b": knn_report({20: 70.0}), "c": knn_report({20: 80.0}, 0.1)}
    for name, of_run in both.items():
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "knn.json").write_text(json.dumps(of_run))
    for name, told, row in (
        ("b", "b is ahead in k-NN top-1, k=20, with 70.0 %", "top-1, k=20, temperature 0.07 65.00 % 70.00 %"),
        ("c", "c is ahead in k-NN top-1, k=20, temperature 0.1, with", "top-1, k=20, temperature 0.1 66.00 % 80.00 %"),
    ):
        assert call(f"run={tmp_path / 'a'},{tmp_path / name}", "images=0") == 0
        text = Page((tmp_path / "a" / "report" / f"with_{name}.html").read_text(encoding="utf-8")).text
        text = " ".join(text.split())
        assert told in text
        assert row in text
        assert "top-1, k=10, temperature 0.1 61.00 % -" in text
        assert "measured differently" not in text


def test_top_5_is_a_minor_figure_by_any_temperature(run: Path) -> None:
    of_run = knn_report({10: 60.0}, 0.1)
    of_run["measures"].append(of_run["measures"][0] | {"name": "top5_k10_temperature0.1", "title": "top-5, k=10"})
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_text(json.dumps(of_run))
    text = page_of(run).text
    assert text.index("top-1, k=10") < text.index("More figures") < text.index("top-5, k=10")


def test_the_last_monitored_figure_is_told_before_the_loss(run: Path) -> None:
    log(run, [ROWS[1], {"step": 10, "loss": 2.0, "knn_top1": 89.72}])
    assert "K-NN top-1 (%) was 89.72 at step 10." in page_of(run).text


def test_losses_of_two_methods_are_not_told_beside_each_other(run: Path, tmp_path: Path) -> None:
    rows = [ROWS[1], {"step": 10, "loss": 2.0}]

    def first_sentence() -> str:
        assert call(f"run={run},{tmp_path / 'other'}", "images=0") == 0
        page = Page((run / "report" / "with_other.html").read_text(encoding="utf-8"))
        return page.text.split("Doctor")[0]

    log(run, rows)
    settings(run)
    other = other_run(run, tmp_path / "other")
    log(other, rows)
    assert "loss went" not in first_sentence()
    assert "other: nothing that compares with another method was measured" in first_sentence()
    log(other, [rows[0], {**rows[1], "knn_top1": 91.1}])
    assert "loss went" not in first_sentence()
    assert "other: k-NN top-1 (%) was 91.1 at step 10" in first_sentence()
    log(run, [rows[0], {**rows[1], "rankme": 9.0, "knn_top1": 89.7}])
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_text(json.dumps(knn_report({20: 88.0})))
    assert f"{run.name}: k-NN top-1 (%) was 89.7 at step 10; other: k-NN top-1 (%) was 91.1" in first_sentence()


def test_only_the_figures_that_a_setting_decides_are_not_compared(evaluated: Path, tmp_path: Path) -> None:
    other = other_run(evaluated, tmp_path / "other")
    path = other / "eval" / "suite.json"
    report = json.loads(path.read_text())
    report["protocol"]["linear"] |= {"epochs": 99}
    path.write_text(json.dumps(report))
    assert call(f"run={evaluated},{other}", "images=0") == 0
    text = Page((evaluated / "report" / "with_other.html").read_text(encoding="utf-8")).text
    assert "in k-NN top-1" in text.split("Doctor")[0], "which the linear classifiers' settings say nothing about"
    (warning,) = [part for part in text.split("other was measured differently")[1:]]
    assert warning.startswith(
        " in linear probe, top-1; linear probe, top-5; balanced accuracy, linear probe (linear.epochs: run"
    )
    assert "other 99): these figures must not be compared with the others." in warning
    assert "k-NN" not in warning.partition("): these figures")[0]


def test_what_the_doctor_finds_is_shown(run: Path) -> None:
    case = json.loads((DOCTOR / "simclr_rate_zero.json").read_text())
    log(run, case["rows"])
    settings(run, json.dumps(case["config"] | {"recipe": None}))
    page = page_of(run)
    assert "rate is zero" in page.text
    assert "optim.lr" in page.text
    assert "and the doctor has" in page.text


def test_a_mistake_in_the_runs_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"run={run},{run}") == 2
    assert "names one directory twice" in capsys.readouterr().err
    assert call(f"run={run}", "train=x") == 2
    assert "Set test=SHARDS too" in capsys.readouterr().err


def test_names_from_outside_are_text(run: Path, write_shards: Callable[..., Path], tmp_path: Path) -> None:
    log(run, [*ROWS, {"step": 20, "position": 100, "<script>alert(1)</script>": 1.0}, {"step": 21, "<b>": 2.0}])
    settings(run, "method: {name: '<img src=x>'}\nbackbone: {name: '</table><script>'}\n")
    names = ("<script>alert(2)</script>", '"><img src=y onerror=alert(3)>', "\x1b[31m")
    train = write_shards(tmp_path / "train", [0, 1, 2] * 6, names=names, seed=1)
    test = write_shards(tmp_path / "test", [0, 1, 2, 1], names=names, seed=2)
    arguments = [f"run={run}", f"train={train}", f"test={test}", *FAST]
    assert run_command(SuiteConfig, suite.main, command="", argv=arguments) == 0
    page = page_of(run)
    assert "script" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert names[0] in page.text
    assert "\x1b" not in page.text


def test_images_that_are_gone_are_told(evaluated: Path, train: str) -> None:
    path = evaluated / "eval" / "suite.json"
    path.write_text(path.read_text().replace(train, f"{evaluated}/gone"))
    page = page_of(evaluated)
    assert "This cannot be shown" in page.text
    assert "k-NN, top-1, k=5" in page.text


def test_other_images_in_their_place_are_not_shown(
    run: Path, test: str, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    train = tmp_path / "train"
    write_shards(train, [0, 1, 2] * 6, seed=1)
    arguments = [f"run={run}", f"train={train}", f"test={test}", *FAST]
    assert run_command(SuiteConfig, suite.main, command="", argv=arguments) == 0
    assert call(f"run={run}", "images=0") == 0
    place = run / "report" / "index.html"
    assert "img" in Page(place.read_text()).tags
    rmtree(train)
    write_shards(train, [0, 1, 2] * 6, seed=3)
    assert call(f"run={run}", "images=0") == 0
    page = Page(place.read_text())
    assert "holds other images now" in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("eval/suite.json", "{}", "eval/suite.json is not a report of eval.suite"),
        ("eval/dense.json", "[]", "eval/dense.json is not a report of eval.dense"),
        ("metrics.jsonl", "no log", "has no row that can be read"),
        (None, "", "neither metrics.jsonl nor a report in eval/"),
    ],
)
def test_what_is_no_run_is_told(
    file: str | None, content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert call(f"run={tmp_path}") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "report" / "index.html").exists()


def test_the_run_may_still_be_training(run: Path) -> None:
    (run / "backbone.safetensors").unlink()
    log(run, ROWS[1:2])
    (run / "status.json").write_text('{"state": "running", "step": 5, "reason": "", "time": "2026-01-01T00:00:00"}')
    page = page_of(run)
    assert "running, step 5" in page.text
    assert "Nothing was measured yet." in page.text
    assert "Pictures of it come with the run's first checkpoint." in page.text
