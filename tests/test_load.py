"""`ssl_pipeline.load`: the backbone of any run, of every shipped recipe, as docs/runs.md and a run show it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_pipeline
from ssl_pipeline.augment.central_crop import central_crop
from ssl_pipeline.backbones import (
    ARCHITECTURE,
    Backbone,
    BackboneConfig,
    Preprocessing,
    TokenBackbone,
    create_backbone,
    save_backbone,
)
from ssl_pipeline.commands.afterwards import in_python
from ssl_pipeline.config import RECIPES, ConfigError, read_yaml, recipe_files, validate
from ssl_pipeline.data.decode import decode_image
from tests.backbones.tiny_vit import tiny_vit

PREPROCESSING = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
RUNS = Path(__file__).parents[1] / "docs" / "runs.md"


def backbones_of_recipes() -> dict[str, BackboneConfig]:
    """Each architecture that a recipe has, once, by the name of the first recipe with it; small ViTs."""
    found: dict[str, BackboneConfig] = {}
    for name, file in recipe_files(RECIPES).items():
        section = read_yaml(file.read_text(), where=name)["backbone"]
        plain = validate(BackboneConfig, {key: section[key] for key in ARCHITECTURE if key in section})
        arguments = {key: value for key, value in plain.arguments.items() if key != "zero_init_last"}
        arguments |= {"depth": max(plain.class_tokens, 1)} if plain.name.startswith("vit") else {}
        config = plain.model_copy(update={"arguments": arguments})
        if config not in found.values():
            found[name] = config
    return found


FAMILIES = backbones_of_recipes()


def test_small_stems_own_networks_and_other_heads_are_among_them():
    assert any(config.small_images for config in FAMILIES.values())
    assert {"wide_resnet28_2", "vit_small_patch16_224"} <= {config.name for config in FAMILIES.values()}
    assert any("num_heads" in config.arguments for config in FAMILIES.values())
    assert any("patch_size" in config.arguments for config in FAMILIES.values())


def own_sides(backbone: Backbone) -> tuple[int, int]:
    """The sides of an image that the backbone takes."""
    if not isinstance(backbone, TokenBackbone):
        return 64, 64
    return backbone.grid[0] * backbone.patch_size, backbone.grid[1] * backbone.patch_size


@pytest.mark.parametrize("name", FAMILIES)
def test_the_backbone_of_every_recipe_comes_back(tmp_path, name):
    torch.manual_seed(1)
    backbone = create_backbone(FAMILIES[name]).eval()
    save_backbone(tmp_path, backbone, PREPROCESSING)
    loaded = ssl_pipeline.load(tmp_path)
    assert not any(part.training for part in loaded.modules())
    assert loaded.preprocessing == PREPROCESSING
    assert (loaded.config.name, loaded.config.arguments) == (FAMILIES[name].name, FAMILIES[name].arguments)
    image = torch.randn(1, 3, *own_sides(backbone))
    with torch.no_grad():
        assert torch.equal(loaded(image), backbone(image))


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_transform_gives_what_the_evaluators_see(tmp_path, mode):
    save_backbone(tmp_path, tiny_vit(), PREPROCESSING)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo(mode).save(file, "png", exif=exif)
    pixels = decode_image(file.getvalue())
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
    seen = central_crop(torch.from_numpy(pixels), 32).float().div(255).sub(mean).div(std)
    transform = ssl_pipeline.load(tmp_path).transform()
    torch.testing.assert_close(transform(Image.open(file)), seen, rtol=0, atol=0)
    torch.testing.assert_close(transform(pixels), seen, rtol=0, atol=0)


def test_what_is_no_image_is_refused(tmp_path):
    save_backbone(tmp_path, tiny_vit(), PREPROCESSING)
    with pytest.raises(ValueError, match=r"or 8-bit RGB \(height, width, 3\)\. Got torch.float32 \(3, 32, 32\)"):
        ssl_pipeline.load(tmp_path).transform()(torch.zeros(3, 32, 32))


def test_a_backbone_of_no_run_has_no_transform():
    with pytest.raises(ConfigError, match=r"does not come from a run, .* ssl_pipeline\.load\(run\) knows them"):
        tiny_vit().transform()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"step": "abc"}, r"^step must be the number of optimizer steps .* Got 'abc'\.$"),
        ({"step": -1}, r"Got -1\.$"),
        ({"step": True}, r"Got True\.$"),
        ({"step": 1.5}, r"Got 1\.5\.$"),
        ({"which": 3}, r"^which must be the name of a backbone, .* Got 3\.$"),
    ],
)
def test_arguments_of_another_type_are_refused(tmp_path, asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ssl_pipeline.load(tmp_path, **asked)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be the directory of a run\. There is no such directory"):
        ssl_pipeline.load(tmp_path / "rnu")
    with pytest.raises(ConfigError, match=r"has no backbone.safetensors, .* and no checkpoint"):
        ssl_pipeline.load(tmp_path)


# The snippets


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with a run and a photograph, from which a program is called."""
    save_backbone(tmp_path / "runs" / "dino_vits16", tiny_vit(), PREPROCESSING)
    photo().save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippet(text: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(text, "snippet", "exec"), names)
    return names


def test_the_snippets_about_runs_work(place):
    section = RUNS.read_text()
    own, with_timm = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = run_snippet(own)
    assert names["features"].shape == (1, names["backbone"].embed_dim)
    model = run_snippet(with_timm)["model"].eval()
    torch.testing.assert_close(model(names["image"][None]), names["features"])


def test_the_snippet_that_a_run_ends_with_works(place):
    title, *lines = in_python(Path("runs/dino_vits16")).splitlines()
    assert title == "In Python:"
    names = run_snippet("\n".join(line.removeprefix("    ") for line in lines))
    assert names["features"].shape == (1, names["backbone"].embed_dim)
    assert json.loads(Path("runs/dino_vits16/backbone.json").read_text())["size"] == names["image"].shape[-1]
