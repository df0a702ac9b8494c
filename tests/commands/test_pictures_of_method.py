"""What a run's method is shown and what it paints, as its page shows it: for runs of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from ssl_pipeline.commands.pictures_of_method import IMAGES, look, method_sections, with_grey
from ssl_pipeline.commands.report import report
from ssl_pipeline.eval.page.record import read_record
from ssl_pipeline.eval.report import ReportConfig
from tests.runs import Happening, _pretrain, command, write_recipe
from tests.tiny import make_batch, make_method, write_shards


def run_of(name: str, folder: Path, *, steps: int = 2) -> Path:
    shards, run = write_shards(folder / "shards"), folder / "run"
    train = {"steps": steps, "save_every": 2, "log_every": 1, "hang_timeout": 0}
    recipe = write_recipe(folder / "tiny.yaml", name, shards, train=train)
    assert _pretrain([f"recipe={recipe}", f"output={run}"]) == 0
    return run


def count(html: str, caption: str) -> int:
    return html.count(f"<figcaption>{caption}</figcaption>")


@pytest.mark.parametrize(
    ("name", "views", "titles"),
    [
        ("dino", {"global 1": 1, "global 2": 1, "local 3": 1}, ["Views"]),
        ("mae", {}, ["Views", "Reconstructions"]),
        ("simmim", {}, ["Views", "Reconstructions"]),
        ("dvae", {}, ["Views", "Reconstructions"]),
        ("fixmatch", {"weak": 2, "strong": 1}, ["Views"]),
    ],
)
def test_views_and_reconstructions(name: str, views: dict[str, int], titles: list[str], tmp_path: Path) -> None:
    record = read_record(run_of(name, tmp_path))
    found = method_sections(record)
    assert [part.title for part in found] == titles
    html = "".join(part for section in found for part in section.parts)
    assert "cannot be shown" not in html
    for caption, groups in views.items():
        assert count(html, caption) == IMAGES * groups
    if len(titles) > 1:
        assert count(html, "painted") == IMAGES
    assert ("Labelled images" in html) == (name == "fixmatch")


def test_the_views_are_those_of_the_first_step(tmp_path: Path) -> None:
    seen: list[int] = []
    shards, run = write_shards(tmp_path / "shards"), tmp_path / "run"
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", shards)
    record = tmp_path / "ids"
    with pytest.raises(SystemExit):
        command([f"recipe={recipe}", f"output={run}"], Happening(record=record))
    seen = [int(part) for part in record.with_suffix(".0").read_text().split("]")[0].strip("[").split(",")]
    assert look(read_record(run)).batch.sample_ids.tolist() == seen[:IMAGES]


@pytest.mark.parametrize("name", ["dvae", "fixmatch"])
def test_the_whole_page_works_for_them(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path)
    html = report(ReportConfig(run=(run,), device="cpu")).read_text()
    for title in ("Doctor", "Curves", "Views", "Nearest neighbours", "Map of the embeddings", "Settings"):
        assert f"<h2>{title}</h2>" in html
    assert "cannot be shown" not in html


def test_a_run_whose_images_are_gone_has_a_page(tmp_path: Path) -> None:
    run = run_of("simclr", tmp_path)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    html = report(ReportConfig(run=(run,), device="cpu")).read_text()
    assert html.count("This cannot be shown") == 2
    assert "<h2>Curves</h2>" in html


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_what_is_not_masked_stays(name: str) -> None:
    method, batch = make_method(name).eval(), make_batch(name)
    images = batch.views["image"].flatten(0, 1)
    with torch.no_grad():
        painted = method.reconstruct(batch)
    patch = method.needs[0].mask.patch_size
    masks = batch.masks["image"].flatten(0, 1)
    changed = with_grey(torch.zeros_like(images), masks, patch) > 0
    assert torch.equal(painted == images, ~changed)


def test_mae_paints_what_its_loss_compares() -> None:
    """Of targets with their mean and deviation taken out, zeros are the best guess: the mean of each patch."""
    method, batch = make_method("mae").eval(), make_batch("mae")
    torch.nn.init.zeros_(method.decoder.predict.weight)
    torch.nn.init.zeros_(method.decoder.predict.bias)
    painted = method.reconstruct(batch)
    masks, images = batch.masks["image"].flatten(0, 1), batch.views["image"].flatten(0, 1)
    place = masks[0].nonzero()[0].item()
    row, column = divmod(place, 4)
    corner = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
    expected = images[0][:, *corner].mean()
    assert mse_loss(painted[0][:, *corner], expected.expand(3, 4, 4)).item() < 1e-10
