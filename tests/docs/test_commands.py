"""Every command and snippet of README and of the first pages runs, on few small images, or is marked as not run."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, save_backbone
from ssl_pipeline.commands.console import COMMANDS
from ssl_pipeline.config import RECIPES, recipe_files, validate
from ssl_pipeline.config.recipes import OTHERS
from tests.docs.shell import PREPARES, blocks_of, commands_of, entry_of, run_command

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/start.md", "docs/images.md", "docs/weights.md", "docs/few_labels.md", "docs/export.md"]
SHORT = [
    "train.epochs=null",
    "train.steps=2",
    "data.batch_size=4",
    "data.workers=0",
    "train.hang_timeout=0",
    "knn=null",
]
SMALLER = {  # where a recipe's own network or views would take minutes: a small ResNet, views of 32 pixels and less
    "dino_vits16": [
        "backbone.name=test_resnet",
        "augment.global.size=32",
        "augment.local.size=32",
        "method.num_prototypes=64",
        "train.compile=false",
        "train.precision=no",
    ],
    "images": ["augment.view.size=32"],
    "cifar10_fixmatch_wrn28_2": ["data.labelled.batch_size=2", "method.num_classes=null"],
}
WORDS = {  # what stands for something of the reader's, and what the test has instead
    "train=SHARDS": "train=data/labelled/train",
    "test=SHARDS": "test=data/labelled/test",
    "weights=FILE": "weights=FILE.safetensors",
    "backbone.weights=FILE": "backbone.weights=FILE.safetensors",
    "k=200": "k=5",
    "DIR": "data/photos",
    "output=DIR": "output=exported/readme",
}
NEEDS_EXTRA = {"format=onnx": "onnxscript"}


def write_images(folder: Path, *, count: int, side: int = 40) -> None:
    """Photographs of two classes, some higher than wide."""
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 120, (side, side + number % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels + np.uint8(120 * (number % 2))).save(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the pages take for granted: photographs, labelled shards, a zip of CIFAR-10, weights."""
    import timm
    from safetensors.torch import save_file

    from ssl_pipeline.packing.make_shards import MakeShards, make_shards

    write_images(tmp_path / "photos", count=24)
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    for split in ("train", "test"):
        write_images(tmp_path / "cifar" / split, count=64, side=32)
        for shards in (f"data/labelled/{split}", f"data/cifar10/{split}"):
            folder = str(tmp_path / "cifar" / split)
            make_shards(MakeShards(source=folder, output=tmp_path / shards, labels="folders", workers=1))
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
        for path in (tmp_path / "cifar").rglob("*.jpg"):
            archive.write(path, path.relative_to(tmp_path / "cifar"))
    network = timm.create_model("resnet18", num_classes=0)
    save_file(network.state_dict(), tmp_path / "FILE.safetensors")
    runs = {"digits_dino": {"name": "test_resnet", "arguments": {"stem_type": ""}, "small_images": True}}
    for name, config in {**runs, "photos": {"name": "test_resnet"}}.items():
        backbone = create_backbone(validate(BackboneConfig, config))
        save_backbone(tmp_path / "finished" / name, backbone, Preprocessing(32, (0.5,) * 3, (0.5,) * 3), step=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def further(words: list[str]) -> list[str]:
    """The arguments that make a command short."""
    module, given = entry_of(words)
    if module == "ssl_pipeline.packing.make_shards":
        replaces = Path(next(word for word in given if word.startswith("output=")).removeprefix("output=")).exists()
        return ["workers=1"] + (["overwrite=true"] if replaces and "overwrite=true" not in given else [])
    if module == "ssl_pipeline.data_tools.split_labels":
        return ["overwrite=true"] if Path("data/cifar10/labels250").exists() else []
    if module == "ssl_pipeline.commands.pretrain":
        recipe = next((word.removeprefix("recipe=") for word in given if word.startswith("recipe=")), "images")
        return [
            word
            for word in SHORT + SMALLER.get(recipe, [])
            if word.split("=")[0] not in {w.split("=")[0] for w in given}
        ]
    if module in ("ssl_pipeline.eval.knn", "ssl_pipeline.eval.linear", "ssl_pipeline.eval.suite"):
        short = ["workers=0", "device=cpu"]
        return (
            short
            if module.endswith("linear")
            else [*short, *([] if any(w.startswith("k=") for w in given) else ["k=5"])]
        )
    return []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, place, capfd):
    if page == "docs/export.md":  # which takes for granted what the pages before it leave
        shutil.move("finished", "runs")
    for language, text in blocks_of(ROOT / page):
        if language == "python":
            exec(compile(text, page, "exec"), {"__name__": "block"})
            continue
        for words in commands_of(text):
            if words[0] in PREPARES or any(needed in words for needed in NEEDS_EXTRA):
                continue
            words = [WORDS.get(word, word) for word in words]
            code = run_command(words, further(words))
            assert code == 0, f"{' '.join(words)}\n{capfd.readouterr().err}"


def test_what_is_not_run_says_why():
    for page in PAGES:
        for reason in re.findall(r"<!-- not run: ?(.*?) ?-->", (ROOT / page).read_text()):
            assert len(reason) > 10


def test_makefile_has_what_pages_make():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for text in (text for language, text in blocks_of(page) if language == "sh"):
            made = [words[1] for words in commands_of(text) if words[0] == "make"]
            assert set(made) <= set(targets), page


def test_recipes_that_pages_name_exist():
    known = recipe_files(RECIPES).keys() | {path.stem for other in OTHERS for path in (RECIPES / other).glob("*.yaml")}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"\brecipe=(\w+)", page.read_text()))
        assert named <= known | {"NAME", "auto"}, page


def test_every_command_is_told_of():
    told = (ROOT / "docs" / "commands.md").read_text()
    spelled = {name: (name, name.replace("-", "_")) for name in COMMANDS}
    assert [
        name for name, words in spelled.items() if not any(re.search(rf"[. ]{word}\b", told) for word in words)
    ] == []
