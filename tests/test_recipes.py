"""The recipes: each loads, prints and trains; the official ones hold the official numbers."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.commands.before_packing import check_outline
from ssl_pipeline.commands.compare import CompareConfig
from ssl_pipeline.commands.pretrain import PretrainConfig, pretrain
from ssl_pipeline.config import COMPARISONS, RECIPES, ConfigError, dump, load, read_yaml, recipe_files, validate
from ssl_pipeline.files import write_tensors
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.modules.tokenizer import Tokenizer, save_tokenizer
from ssl_pipeline.schedule import Duration, Progress, Schedule
from ssl_pipeline.training.preflight import check_recipe
from tests.tiny import write_shards

FILES = recipe_files(RECIPES)
NAMES = list(FILES)
ORDERED = {
    "digits_dino",
    "digits_simclr",
    "cifar10_simclr_resnet18",
    "cifar10_dino_vit_tiny",
    "dino_vits16",
    "simclr_resnet50",
}
TINY = {
    "num_prototypes": 32,
    "queue_size": 32,
    "decoder_depth": 1,
    "_dim": 32,
    "mask_size": 16,
    "num_tokens": 32,
}  # by the end of a method's key
TINY_RESNET = ["backbone.name=test_resnet", "backbone.arguments.stem_type=''"]
TINY_VIT: dict[str, bool | int | float | str] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}


def recipe(name: str, *argv: str) -> PretrainConfig:
    return load(PretrainConfig, [f"recipe={name}", *argv], recipes=RECIPES)


def on_meta(config: PretrainConfig) -> Method:
    begins_anew = config.backbone.model_copy(update={"weights": None, "frozen_batch_norm": False})
    method = config.method
    if getattr(method, "num_classes", 0) is None:  # the run's labels tell it, of which there are none here
        method = method.model_copy(update={"num_classes": 10})
    with torch.device("meta"):
        return build_method(method, create_backbone(begins_anew))


def trained_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_the_ordered_recipes_are_there():
    assert set(NAMES) >= ORDERED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_what_reads_back_equal(name):
    config = recipe(name)
    assert validate(PretrainConfig, read_yaml(dump(config), where=name)) == config
    assert yaml.safe_load(dump(config)) == read_yaml(dump(config), where=name)  # other readers see the same


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_source_and_numbers_in_its_header(name):
    lines = FILES[name].read_text().splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for pattern in ("Theirs: ", "Ours: ", rf"accelerate launch (--num_processes \d+ )?pretrain\.py recipe={name}\b"):
        assert re.search(pattern, header), pattern


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete(name):
    # no recipe inherits: what it says of the method, the views and the optimizer does not rest on our defaults
    tree = read_yaml(FILES[name].read_text(), where=name)
    assert {"seed", "method", "backbone", "augment", "data", "optim", "train", "knn"} <= tree.keys()
    assert {"name", "lr", "weight_decay"} <= tree["optim"].keys()
    for group in tree["augment"].values():
        own_crops = set() if "crops_of" in group else {"scale", "flip_prob"}
        assert {"count", "size", "jitter_prob", "gray_prob", "blur_prob", *own_crops} <= group.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_and_has_the_views_that_its_method_reads(name):
    config = recipe(name)
    method = on_meta(config)
    assert type(method).config_class is type(config.method)
    check_recipe(method, method.backbone, config.augment, config.data)
    assert all(parameter.is_meta for parameter in method.parameters())


def test_a_view_group_that_is_missing_or_unread_is_told():
    config = recipe("dino_vits16")
    method = on_meta(config)
    views = dict(config.augment)

    def check(views: dict[str, ViewGroup]) -> None:
        check_recipe(method, method.backbone, views, config.data)

    check({"global": views["global"]})  # local crops are optional
    with pytest.raises(ConfigError, match=r"^DINO needs the view group augment\.global\. The recipe has local\.$"):
        check({"local": views["local"]})
    with pytest.raises(
        ConfigError, match=r"^DINO does not use the view group augment\.locla\. It reads global, local\.$"
    ):
        check(views | {"locla": views["local"]})
    of_nobody = views["local"].model_copy(update={"crops_of": "globl"})
    with pytest.raises(ConfigError, match=r"^augment\.local\.crops_of must be .* Did you mean 'global'\?$"):
        check(views | {"local": of_nobody})


# the official numbers


def test_dino_vits16_has_the_official_size():
    method = on_meta(recipe("dino_vits16"))
    backbone = 21_665_664  # 21.67 M
    head = (384 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 256 + 256) + 256 * 65536
    assert sum(parameter.numel() for parameter in method.backbone.parameters()) == backbone
    assert trained_parameters(method) == backbone + head
    assert trained_parameters(method.backbone) == 0  # the teacher's


def test_simclr_resnet50_has_the_official_size():
    method = on_meta(recipe("simclr_resnet50"))
    backbone = 23_508_032
    projector = 2 * (2048 * 2048 + 2 * 2048) + (2048 * 128 + 128)  # batch norm after each layer, the last without shift
    assert trained_parameters(method.backbone) == backbone
    assert trained_parameters(method) == backbone + projector


@pytest.mark.parametrize(
    ("name", "processes", "global_batch", "learning_rate"),
    [
        ("dino_vits16", 8, 512, 1e-3),
        ("simclr_resnet50", 32, 4096, 4.8),
        ("cifar10_simclr_resnet18", 1, 128, 0.06),
        ("cifar10_simclr_resnet18", 4, 512, 0.24),
    ],
)
def test_the_published_global_batch_has_the_published_learning_rate(name, processes, global_batch, learning_rate):
    config = recipe(name)
    assert processes * config.data.batch_size * config.train.accumulate == global_batch
    assert config.optim.effective_lr(global_batch).value == pytest.approx(learning_rate)


# a few steps of each


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small images of noise without labels, in one shard."""
    directory = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(7)
    with tarfile.open(directory / "noise-000000.tar", "w") as shard:
        for number in range(40):
            encoded = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(encoded, format="png")
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(encoded.getvalue())
            shard.addfile(member, io.BytesIO(encoded.getvalue()))
    return directory


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run; each test here is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of three classes: fewer than a batch."""
    return write_shards(tmp_path_factory.mktemp("labelled") / "shards", (5,))


def tiny(name: str, shards: Path, labelled: Path, output: Path) -> PretrainConfig:
    """The recipe with sizes that take a CPU a second; its losses, optimizer, schedules and precision stay."""
    plain = recipe(name)
    # with the usual stem a ResNet needs 32 pixels: oneDNN's bf16 gradient of a strided 3x3 convolution over a single
    # pixel reads memory that nobody wrote
    size = 16 if plain.backbone.small_images else 32
    vit = plain.backbone.name.startswith(("vit", "beit"))
    sizes = [f"augment.{group}.size={16 if group == 'local' and vit else size}" for group in plain.augment]
    sizes += [f"augment.{group}.size_weights=[]" for group, views in plain.augment.items() if views.size_weights]
    patch = {"patch_size": 2} if "_r_" in plain.backbone.name else {}  # behind a stem that divides by 4
    small_vit = [f"backbone.arguments.{key}={value}" for key, value in {**TINY_VIT, **patch}.items()]
    backbone = small_vit if vit else TINY_RESNET
    if plain.backbone.name == "dalle_encoder":
        backbone = ["backbone.arguments.hidden_dim=4", "backbone.arguments.blocks_per_group=1"]
    backbone = [*backbone, "backbone.weights=null", "backbone.frozen_batch_norm=false"]
    backbone += ["backbone.class_tokens=2"] if plain.backbone.class_tokens else []
    widths = [
        f"method.{key}={value}"
        for key in type(plain.method).model_fields
        for end, value in TINY.items()
        if key.endswith(end)
    ]
    if getattr(plain.method, "learns_from", "") == "all":
        shards = write_shards(output.with_name("all-labelled"), (25, 15))
    where = [f"output={output}", f"data.shards={shards}", "data.batch_size=8", "data.workers=0"]
    where += ["knn=null", "classifier=null"]
    if plain.data.labelled is not None:
        where += [f"data.labelled.shards={labelled}", "data.labelled.batch_size=8"]
    length = ["train.steps=2", "train.log_every=1"]
    files = [f"method={json.dumps(plain.method.model_dump(mode='json') | given)}" for given in files_of(plain, output)]
    return recipe(name, *sizes, *backbone, *where, *length, *files, *widths)


def files_of(plain: PretrainConfig, folder: Path) -> list[dict[str, object]]:
    """Small files in the place of those that a method's settings lead to."""
    if plain.method.name == "distillation":
        teacher = BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT)
        path = folder.with_name("teacher.safetensors")
        state = create_backbone(teacher).model.state_dict()
        write_tensors(path, {key: tensor.contiguous() for key, tensor in state.items()})
        return [{"teacher": teacher.model_copy(update={"weights": str(path)}).model_dump(mode="json")}]
    if plain.method.name == "beit":
        path, tokens = folder.with_name("tokenizer.safetensors"), plain.augment["tokens"]
        encoder = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments=TINY_VIT))
        save_tokenizer(
            path, Tokenizer(encoder, 32), mean=tokens.mean or plain.data.mean, std=tokens.std or plain.data.std
        )
        return [{"tokenizer": str(path), "num_masked": 6, "min_block": 2}]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_looked_at_without_memory_as_it_is_shown(name: str) -> None:
    check_outline(load(PretrainConfig, [f"recipe={name}", "output=x"], recipes=RECIPES))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_a_few_steps(name, shards, labelled, tmp_path):
    config = tiny(name, shards, labelled, tmp_path / "run")
    assert pretrain(config) == 0
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {"epoch", "loss", "learning_rate", "images_per_second", "data_wait", "feature_std"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    lr = config.optim.effective_lr(8)
    assert [row["learning_rate"] for row in rows] == [lr(Progress(step, 2, 40 / 8)) for step in (0, 1)]
    assert rows[-1]["epoch"] == pytest.approx(2 * 8 / 40)
    assert validate(PretrainConfig, read_yaml((run / "config.yaml").read_text(), where="run")) == config

    # what is written is what timm takes, under its own names
    weights = safetensors.torch.load_file(run / "backbone.safetensors")
    about = json.loads((run / "backbone.json").read_text())
    assert (about["name"], about["size"]) == (config.backbone.name, next(iter(config.augment.values())).size)
    if not config.backbone.small_images:
        model = timm.create_model(about["name"], num_classes=0, **about["arguments"])
        model.load_state_dict(weights)
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())


def test_a_schedule_in_a_recipe_is_what_is_written_there() -> None:
    """A method's own schedule by default, which rises for example, adds nothing to `{value: 1.0}`."""
    own = Schedule.model_construct().model_dump(mode="json")
    seen = 0
    for name, path in recipe_files(RECIPES).items():
        written = read_yaml(path.read_text(encoding="utf-8"), where=name)["method"]
        method = load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES).method
        for key, value in written.items():
            resolved = getattr(method, key, None)
            if isinstance(resolved, Schedule):
                given = value if isinstance(value, dict) else {"value": value}
                assert resolved == Schedule.model_validate_json(json.dumps(own | given)), f"{name}: method.{key}"
                seen += 1
    assert seen > 50


def test_a_key_of_a_schedule_that_no_recipe_mentions_changes_the_methods_own(tmp_path: Path) -> None:
    lines = FILES["cifar10_adamatch_wrn28_2"].read_text().splitlines()
    path = tmp_path / "silent.yaml"
    path.write_text("\n".join(line for line in lines if "unlabelled_weight:" not in line))
    method = load(PretrainConfig, [f"recipe={path}", "method.unlabelled_weight.value=2"], recipes=RECIPES).method
    assert method.unlabelled_weight == Schedule(value=2.0, warmup=Duration("50%"), rise="cosine")


@pytest.mark.parametrize("name", sorted(path.stem for path in COMPARISONS.glob("*.yaml")))
def test_the_runs_of_a_comparison_are_valid_and_build(name):
    comparison = load(CompareConfig, [f"recipe={name}"], recipes=COMPARISONS)
    for arguments in comparison.arguments().values():
        config = load(PretrainConfig, [*arguments, "seed=0", "output=out"], recipes=RECIPES)
        method = on_meta(config)
        check_recipe(method, method.backbone, config.augment, config.data)
        assert Path(config.data.shards).parent == Path(comparison.test).parent, "it trains on images of another set"
