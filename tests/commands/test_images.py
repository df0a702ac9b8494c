"""What `images=FOLDER` and `recipe=auto` stand for."""

import json
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image

import ssl_pipeline
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.commands import first_look, pretrain
from ssl_pipeline.commands.first_look import Look, largest_view
from ssl_pipeline.commands.images import expand
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.commands.recipe_choice import choose_recipe
from ssl_pipeline.config import RECIPES, ConfigError, load, read_recipe, recipe_files
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.packing.packed_once import pack_once
from ssl_pipeline.training.run import TrainConfig, start_clock
from tests.commands.test_finetune import save_run
from tests.runs import rows, write_recipe
from tests.tiny import CNN, VIT, write_shards


def folder(tmp_path, side=100):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (side, side + 20), (number * 80, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def folders_of_classes(tmp_path):
    for number in range(24):
        (tmp_path / "photos" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number * 10, 0, 0)).save(tmp_path / f"photos/class{number % 2}/{number}.png")


def test_a_folder_becomes_shards_and_a_recipe(tmp_path, capsys):
    output = tmp_path / "run"
    expanded = expand([f"images={folder(tmp_path)}", f"output={output}", "seed=3"])
    assert expanded[0] == "recipe=photos_small"
    assert f"data.shards={output}/images" in expanded
    assert {"seed=3", f"output={output}", f"images={tmp_path}/photos"} <= set(expanded)
    assert len(open_shards(output / "images")) == 3
    assert "recipe=photos_small data.batch_size=2: 3 images of 100 pixels" in capsys.readouterr().out


def test_the_recipe_that_a_run_has_is_kept(tmp_path):
    output = tmp_path / "run"
    images = folder(tmp_path)
    expand([f"images={images}", f"output={output}"])
    (output / "config.yaml").write_text("recipe: digits_simclr\nknn: null\n")
    assert expand([f"images={images}", f"output={output}"])[:2] == ["recipe=digits_simclr", "knn=null"]


def test_a_run_goes_on_from_its_packed_images_where_the_folder_is_gone(tmp_path, capsys):
    folders_of_classes(tmp_path)
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", tmp_path, train={"steps": 2, "save_every": 1})
    known = {"images": tmp_path / "photos", "recipe": recipe, "output": tmp_path / "run"}
    settings = {"data.workers": 0, "knn": None, "report": False}
    ssl_pipeline.pretrain(**known, overrides={**settings, "train.steps": 1})
    (tmp_path / "photos").rename(tmp_path / "moved")
    capsys.readouterr()
    ssl_pipeline.pretrain(**known, overrides=settings)
    told = capsys.readouterr().out
    assert f"images={tmp_path}/photos is gone. The run goes on with its images as they were packed, in " in told
    assert [row["step"] for row in rows(tmp_path / "run")][-1] == 2
    typo = [f"images={tmp_path}/photso", f"output={tmp_path}/run"]
    with pytest.raises(
        ConfigError, match=r"photso' does not exist\..* the images of .*photos that were packed"
    ) as error:
        expand(typo)
    works = re.search(r"into it: (images=\S+) (output=\S+) trains on those", str(error.value))
    assert f"data.shards={tmp_path}/run/images" in expand(works.groups())


def test_digits_are_packed_and_found_again(tmp_path):
    for _ in range(2):
        found = expand(["images=digits", f"output={tmp_path}/run", "recipe=digits_dino"])
        assert f"data.shards={tmp_path}/run/images" in found


def test_a_folder_of_zips_is_told_as_that(tmp_path):
    photos = folder(tmp_path)
    (tmp_path / "zips").mkdir()
    for name in ("a", "b"):
        shutil.make_archive(str(tmp_path / "zips" / name), "zip", photos)
    with pytest.raises(ConfigError, match=r"only archives, which are not opened \(2: a\.zip, \.\.\.\)") as error:
        expand([f"images={tmp_path}/zips", f"output={tmp_path}/run"])
    works = re.search(r"or set (images=\S+)\.$", str(error.value))[1]
    assert f"data.shards={tmp_path}/run/images" in expand([works, f"output={tmp_path}/run"])


def test_packed_images_of_no_run_are_named_where_the_folder_is_gone(tmp_path):
    arguments = [f"images={folder(tmp_path)}", f"output={tmp_path}/run"]
    expand(arguments)
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"photos' does not exist\. .*/run has the images that were packed into it"):
        expand(arguments)


def test_a_recipe_of_ones_own_stays_and_names_the_directory(tmp_path, monkeypatch):
    images = folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert expand([f"images={images}", "recipe=dino_vits16"]) == [
        "recipe=dino_vits16",
        f"images={images}",
        "data.shards=runs/dino_vits16/images",
        "output=runs/dino_vits16",
    ]
    assert expand([f"images={images}"])[-1] == "output=runs/photos"


def test_shards_are_taken_as_they_are(tmp_path):
    shards = pack_once(str(folder(tmp_path)), tmp_path / "packed")
    expanded = expand([f"images={shards}", f"output={tmp_path}/run"])
    assert f"data.shards={shards}" in expanded
    assert not (tmp_path / "run").exists()
    assert expand([f"data.shards={shards}", "recipe=auto", "output=x"])[0] == "recipe=photos_small"


@pytest.mark.parametrize("recipe", ["auto", "photos_small"])
def test_labels_of_folders_are_watched(tmp_path, capsys, recipe):
    folders_of_classes(tmp_path)
    arguments = [f"images={tmp_path}/photos", f"recipe={recipe}", f"output={tmp_path}/run"]
    expanded = expand(arguments)
    assert f'knn={{every: 20%, train: "{tmp_path}/run/images", val: null, images: 2000, k: 20}}' in expanded
    assert "each by all others, every 20%" in capsys.readouterr().out
    config = load(PretrainConfig, expanded, recipes=RECIPES)
    assert (config.knn.train, config.knn.val, config.knn.images) == (f"{tmp_path}/run/images", None, 2000)
    for given in ("knn=null", "knn.train=x"):
        assert not any(argument.startswith("knn={") for argument in expand([*arguments, given]))
    knn = load(PretrainConfig, expand([*arguments, "knn.every=10%"]), recipes=RECIPES).knn
    assert (str(knn.every), knn.train, knn.val, knn.k) == ("10%", f"{tmp_path}/run/images", None, 20)
    capsys.readouterr()
    assert not any(argument.startswith("knn={") for argument in expand(arguments, {"knn": None}))
    assert "each by all others" not in capsys.readouterr().out


@pytest.mark.parametrize(("per_class", "watched"), [(1, False), (2, True)])
def test_classes_of_one_image_are_not_watched(tmp_path, capsys, per_class, watched):
    for number in range(24):
        path = tmp_path / "photos" / str(number // per_class) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number * 10, 0, 0)).save(path)
    arguments = [f"images={tmp_path}/photos", f"output={tmp_path}/run"]
    for _ in range(2):  # by the names of the files, and by the shards
        assert any(argument.startswith("knn=") for argument in expand(arguments)) == watched
        told = capsys.readouterr().out
        assert (
            "are of 24 classes, too many for k-NN on 24 of them, so the run does not measure it." in told
        ) != watched
    expanded = expand([*arguments, "backbone.weights=tf_efficientnet_lite0.in1k"])
    assert ("spectrum={every: 20%, images: 1000}" in expanded) != watched


def test_knn_of_a_recipe_is_kept_where_its_images_are(tmp_path, monkeypatch, capsys):
    folders_of_classes(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["images=photos", "recipe=dino_vits16", "output=run"]
    assert any(argument.startswith("knn={") for argument in expand(arguments))
    (tmp_path / "data/imagenet/train-10pct").mkdir(parents=True)
    assert any(argument.startswith("knn={") for argument in expand(arguments))  # the folder is empty
    (tmp_path / "data/imagenet/train-10pct").rmdir()
    write_shards(tmp_path / "data/imagenet/train-10pct")
    capsys.readouterr()
    assert not any(argument.startswith("knn") for argument in expand(arguments))
    assert capsys.readouterr().out == ""


def test_images_without_labels_are_watched_from_weights_on(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(24):
        Image.new("RGB", (64, 64), (number * 10, 0, 0)).save(tmp_path / f"photos/{number}.png")
    arguments = [f"images={tmp_path}/photos", f"output={tmp_path}/run"]
    assert not any(argument.startswith(("knn", "spectrum")) for argument in expand(arguments))
    from_weights = [*arguments, "backbone.weights=tf_efficientnet_lite0.in1k"]
    assert "spectrum={every: 20%, images: 1000}" in expand(from_weights)
    assert "watches RankMe of the features from the initial weights on" in capsys.readouterr().out
    capsys.readouterr()
    for without in (expand([*from_weights, "spectrum=null"]), expand(from_weights, {"spectrum": None})):
        assert not any(argument.startswith("spectrum={") for argument in without)
    assert "RankMe" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["knn", "spectrum", "train.steps", "backbone.weights", "data.batch_size"])
def test_none_in_overrides_is_null_on_the_command_line(tmp_path, capsys, name):
    folders_of_classes(tmp_path)
    arguments = [f"images={tmp_path}/photos", f"output={tmp_path}/run"]
    expand(arguments)  # packs
    capsys.readouterr()
    expected = [argument for argument in expand([*arguments, f"{name}=null"]) if argument != f"{name}=null"]
    said = capsys.readouterr().out
    assert expand(arguments, {name: None}) == expected
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("place", ["mine", "mine/backbone.safetensors"])
@pytest.mark.parametrize(("network", "recipe"), [(VIT, "continue_vit_small"), (CNN, "continue_cnn_small")])
def test_weights_of_a_run_choose_the_recipe_and_bring_their_network(tmp_path, network, recipe, place):
    save_run(tmp_path / "mine", network)
    arguments = [f"images={folder(tmp_path)}", f"backbone.weights={tmp_path / place}", f"output={tmp_path / 'run'}"]
    sizes = ["augment.global.size=16", "augment.local.size=16"] if network is VIT else []
    for expanded in (expand(arguments), expand([*arguments, "recipe=auto"])):
        config = load(PretrainConfig, [*expanded, *sizes], recipes=RECIPES)
        assert config.recipe == recipe
        assert (config.backbone.name, config.backbone.arguments) == (network.name, network.arguments)
        assert config.backbone.small_images == network.small_images
        assert (config.data.mean, config.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert config.backbone.frozen_batch_norm == (network is CNN)
        assert config.backbone.drop_path == (0.1 if network is VIT else 0.0)
        create_backbone(config.backbone)


def test_a_full_name_of_timm_brings_its_network_whatever_the_recipe(tmp_path, capsys):
    arguments = [f"images={folder(tmp_path)}", f"output={tmp_path / 'run'}", "backbone.weights=resnet18.a1_in1k"]
    for more, recipe in (([], "continue_cnn_small"), (["recipe=photos_small"], "photos_small")):
        config = load(PretrainConfig, expand([*arguments, *more]), recipes=RECIPES)
        assert (config.recipe, config.backbone.name, config.backbone.weights) == (recipe, "resnet18", "a1_in1k")
        assert config.data.mean == (0.485, 0.456, 0.406)
    assert "weights of a CNN (resnet18) to continue from" in capsys.readouterr().out
    by_override = expand(arguments[:2], {"backbone": {"weights": "vit_small_patch14_dinov2.lvd142m"}})
    assert "recipe=continue_dinov2_small" in by_override
    assert "backbone.name=vit_small_patch14_dinov2" in by_override


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (["nowhere.safetensors"], r"^backbone\.weights=nowhere\.safetensors does not exist"),
        (["a1_in1k"], "It is not known which network the weights a1_in1k belong to"),
        (["{run}", "backbone.name=resnet18"], r"mine/backbone\.safetensors does not fit: it misses conv1"),
        (["resnet18.nosuchtag"], "run or pretrained 'resnet18.nosuchtag'"),
    ],
)
def test_wrong_weights_are_told_before_anything_is_packed_or_tried(tmp_path, weights, sentence, monkeypatch):
    monkeypatch.setattr("ssl_pipeline.commands.images.expected_time", None)
    run = save_run(tmp_path / "mine")
    arguments = [f"images={folder(tmp_path)}", f"output={tmp_path / 'run'}", f"backbone.weights={weights[0]}"]
    with pytest.raises(ConfigError, match=sentence):
        expand([argument.format(run=run) for argument in [*arguments, *weights[1:]]], timed=PretrainConfig)
    assert not (tmp_path / "run").exists()
    shards = pack_once(str(tmp_path / "photos"), tmp_path / "packed")
    arguments[0] = f"images={shards}"
    with pytest.raises(ConfigError, match=sentence):
        expand([argument.format(run=run) for argument in [*arguments, *weights[1:]]], timed=PretrainConfig)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_only_shown_is_not_packed(tmp_path, monkeypatch, capsys, labelled):
    if labelled:
        folders_of_classes(tmp_path)
    else:
        folder(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "images=photos", "output=run", "--print"])
    assert pretrain.main("pretrain.py") == 0
    said = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before
    assert f"{24 if labelled else 3} images of photos would be packed into run/images" in said.err
    shown = yaml.safe_load(said.out)
    (tmp_path / "shown.yaml").write_text(said.out)
    config = load(PretrainConfig, expand(["images=photos", "output=run"]), recipes=RECIPES)
    assert shown["data"]["batch_size"] == config.data.batch_size
    assert shown["data"]["shards"] == config.data.shards
    assert (shown["knn"] is not None) == (config.knn is not None) == labelled


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["backbone.name=nosuchnet"], "No timm model 'nosuchnet'"),
        (["backbone.weights=in2k"], "run or pretrained 'vit_small_patch16_224.in2k'"),
        (
            ["augment.global.size=100"],
            "augment.global.size must be a multiple of the backbone's patch size 16. Got 100",
        ),
        (["backbone.name=resnet18", "data.batch_size=1"], "has batch norm, which needs more than one image"),
    ],
)
def test_what_is_only_shown_tells_what_a_run_would_refuse(tmp_path, monkeypatch, capsys, settings, sentence):
    for images in ([f"images={folder(tmp_path)}"], ["data.shards=none"]):
        argv = ["pretrain.py", "recipe=dino_vits16", *images, f"output={tmp_path}/run", "--print", *settings]
        monkeypatch.setattr("sys.argv", argv)
        assert pretrain.main("pretrain.py") == 2
        found = capsys.readouterr()
        assert yaml.safe_load(found.out)["recipe"] == "dino_vits16"
        assert sentence in found.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["recipe=mae_vitb16", "backbone.name=test_resnet"], "needs a backbone with patch tokens"),
        (["recipe=photos_small", "backbone.name=test_resnet"], "but .*/photos has 3 images. Lower data.batch_size"),
        (["backbone.name=test_resnet", "data.batch_size=1"], "has batch norm, which needs more than one image"),
        (["backbone.name=nosuchnet"], "No timm model 'nosuchnet'"),
    ],
)
def test_what_no_images_can_mend_is_told_before_they_are_packed(tmp_path, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        expand([f"images={folder(tmp_path)}", f"output={tmp_path / 'run'}", *settings], timed=PretrainConfig)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["auto", "photos_small"])
def test_a_wrong_setting_is_told_before_images_are_packed(tmp_path, recipe):
    arguments = [f"images={folder(tmp_path)}", f"recipe={recipe}", f"output={tmp_path}/run", "train.steps=abc"]
    with pytest.raises(ConfigError, match=r"train\.steps"):
        expand(arguments, timed=PretrainConfig)
    assert not (tmp_path / "run").exists()


def test_what_was_packed_for_no_run_is_packed_anew_in_the_same_way_and_not_by_print(tmp_path, capsys):
    photos, output = folder(tmp_path, side=3000), tmp_path / "run"
    arguments = [f"images={photos}", "recipe=photos_small", f"output={output}"]
    expand(arguments)
    Image.new("RGB", (3000, 3020)).save(photos / "more.png")
    capsys.readouterr()
    expand(arguments, packs=False)
    assert len(open_shards(str(output / "images"))) == 3
    expand(arguments)
    assert "It is packed again" in capsys.readouterr().out
    index = open_shards(str(output / "images"))
    assert (len(index), int(index.sizes().min())) == (4, 256)
    (output / "config.yaml").write_text("recipe: photos_small")
    (photos / "more.png").unlink()
    with pytest.raises(DataError, match="has changed since it was packed"):
        expand(arguments)


@pytest.mark.parametrize("timed", [None, PretrainConfig])
def test_a_folder_without_an_image_is_told_as_that(tmp_path, timed):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ConfigError, match=r"^images='.*' has no image file \(.* among 1 files"):
        expand([f"images={tmp_path}", f"output={tmp_path / 'run'}"], timed=timed)
    assert not (tmp_path / "run").exists()


def test_fewer_images_than_a_step_takes_get_a_batch_that_fits(tmp_path):
    arguments = [f"images={folder(tmp_path)}", f"output={tmp_path}/run"]
    assert "data.batch_size=2" in expand(arguments)
    (tmp_path / "run/config.yaml").write_text("recipe: photos_small\nknn: null\n")
    assert "data.batch_size=2" in expand(arguments)
    given = [argument for argument in expand([*arguments, "data.batch_size=3"]) if argument.startswith("data.batch")]
    assert given == ["data.batch_size=3"]


def test_too_few_images_are_those_of_the_folder(tmp_path):
    images = folder(tmp_path)
    given = [f"images={images}", "recipe=photos_small", "data.batch_size=8", f"output={tmp_path}/run"]
    with pytest.raises(ConfigError, match=rf"= 8, but {images} has 3 images\."):
        expand(given, timed=PretrainConfig)
    expand(given)  # packs, and the run itself would say the same
    data = DataConfig(shards=str(tmp_path / "run/images"), batch_size=8)
    with pytest.raises(ConfigError, match=rf"= 8, but {images} has 3 images\."):
        start_clock(open_shards(data.shards), data, TrainConfig(steps=1))


def test_one_photograph_is_told_as_that(tmp_path):
    one = folder(tmp_path) / "0.png"
    with pytest.raises(ConfigError, match=r"0\.png is one photograph\. Pretraining needs a folder or a zip of many"):
        expand([f"images={one}", f"output={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_large_photographs_are_packed_small_and_found_again(tmp_path, capsys):
    output, images = tmp_path / "run", folder(tmp_path, side=600)
    arguments = [f"images={images}", "recipe=photos_small", f"output={output}"]
    expanded = expand(arguments)
    said = capsys.readouterr().out
    assert "images of 600 pixels (median of the shorter sides) are packed as JPEG of 256 pixels at most" in said
    assert "photos_small has views of 96" in said
    index = open_shards(output / "images")
    assert index.sizes().min(axis=1).tolist() == [256, 256, 256]
    assert json.loads((output / "images" / "manifest.json").read_text())["source"]["short_side"] == 256
    assert expand(arguments) == expanded
    assert capsys.readouterr().out == ""
    assert open_shards(output / "images").fingerprint == index.fingerprint


@pytest.mark.parametrize(
    ("side", "more", "kept"),
    [(512, ["recipe=photos_small"], True), (600, ["augment.view.size=[96,151]", "recipe=photos_small"], True),
     (514, [], False), (600, ["recipe=dino_vits16"], True)],
)  # fmt: skip
def test_what_is_not_twice_as_large_as_needed_is_stored_as_it_is(tmp_path, capsys, side, more, kept):
    images = folder(tmp_path, side=side)
    expand([f"images={images}", f"output={tmp_path}/run", *more])
    assert ("are packed as JPEG" not in capsys.readouterr().out) == kept
    sizes = open_shards(tmp_path / "run" / "images").sizes().min(axis=1)
    assert (sizes == (side if kept else 256)).all()


@pytest.mark.parametrize(
    ("name", "view"), [("photos_small", 96), ("dino_vits16", 224), ("dinov3_vitl16_highres", 1152)]
)
def test_the_largest_view_of_a_recipe_is_found(name, view):
    assert largest_view(read_recipe(name, RECIPES), {}) == view


def test_other_arguments_are_left_alone():
    assert expand(["recipe=digits_dino", "seed=1"]) == ["recipe=digits_dino", "seed=1"]
    assert expand(["seed=1"]) == ["seed=1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["images=a", "data.shards=b"], r"Give one of the two\."),
        (["images="], r"^images= is empty\."),
        (["recipe=auto"], r"Set images=FOLDER, or data\.shards=SHARDS\."),
        (["images=a", "images=b"], "images is given twice"),
        (["images=nowhere"], r"^images='nowhere' does not exist\. Needed: a folder or a zip of images, or shards\.$"),
        (["images=[a,b]"], r"^images= takes one folder or zip\. Got the list \[a,b\]"),
    ],
)
def test_mistakes_are_told(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        expand(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "side", "name", "has_gpu", "recipe"),
    [
        (5000, 300, None, False, "photos_small"),
        (5000, 300, None, True, "photos_small"),
        (50_000, 300, None, True, "dinov2_small"),
        (50_000, 64, None, True, "photos_small"),
        (500_000, 300, None, False, "photos_small"),
        (500_000, 300, None, True, "dino_vits16"),
        (50_000, 32, None, True, "cifar10_simclr_resnet18"),
        (5000, 300, "resnet50", False, "continue_cnn_small"),
        (5000, 300, "vit_small_patch16_224", False, "continue_vit_small"),
        (5000, 300, "vit_small_patch14_dinov2", False, "continue_dinov2_small"),
        (5000, 300, "vit_small_patch16_dinov3", False, "continue_dinov3_small"),
    ],
)
def test_the_choice_is_a_shipped_recipe(count, side, name, has_gpu, recipe):
    with torch.device("meta"):
        network = None if name is None else create_backbone(BackboneConfig(name=name))
    arguments, why = choose_recipe(Look(count, side, 0), network, has_gpu=has_gpu)
    assert arguments[0] == f"recipe={recipe}"
    assert recipe in recipe_files(RECIPES)
    assert f"{count:,} images of {side} pixels" in why


def test_a_folder_without_images_is_told_in_the_words_of_images(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jxl").write_bytes(b"x")
    with pytest.raises(ConfigError) as error:
        expand([f"images={tmp_path}/photos", f"output={tmp_path}/run", "recipe=digits_simclr"])
    told = str(error.value)
    assert told.startswith("images='")
    assert "among 3 files: a format that is not read: .jxl (3)." in told
    assert "source" not in told
    assert "prefix" not in told


def test_a_choice_gives_way_to_what_is_given(tmp_path):
    images = folder(tmp_path, side=32)  # for which the choice brings knn=null
    found = expand([f"images={images}", f"output={tmp_path}/run", "knn=null", "recipe=auto"])
    assert found[0] == "recipe=cifar10_simclr_resnet18"
    assert [argument.partition("=")[0] for argument in found].count("knn") == 1


def test_labels_are_watched_where_the_choice_would_leave_k_nn_out(tmp_path):
    for number in range(24):
        path = tmp_path / "photos" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 90 * (number % 2), 0)).save(path)
    found = expand([f"images={tmp_path / 'photos'}", f"output={tmp_path}/run"])
    assert found[0] == "recipe=cifar10_simclr_resnet18"
    (knn,) = [argument for argument in found if argument.partition("=")[0] == "knn"]
    assert knn.startswith("knn={every")


def test_the_images_are_looked_at_once_before_they_are_packed(tmp_path, monkeypatch):
    looked, look_at = [], first_look.look_at
    monkeypatch.setattr(first_look, "look_at", lambda files: looked.append(files) or look_at(files))
    arguments = [f"images={folder(tmp_path)}", f"output={tmp_path / 'run'}", "data.batch_size=2"]
    expand([*arguments, "train.steps=1"], timed=PretrainConfig)
    assert len(looked) == 1
    expand(arguments)
    assert len(looked) == 1
