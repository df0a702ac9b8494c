"""What a recipe may ask of a view group, and how a mistake reads."""

import itertools

import pytest

from ssl_pipeline.augment.draw import CropUniform, num_draws, num_uniforms
from ssl_pipeline.augment.operations.jitter import Uniform
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import Config, ConfigError, dump, load, read_yaml, validate
from ssl_pipeline.config.descriptions import described_fields


class Recipe(Config):
    """A recipe's view groups."""

    augment: dict[str, ViewGroup]
    """View groups by name."""


def test_one_value_stands_for_all_views_and_a_tuple_for_one_each():
    group = ViewGroup(count=3, size=8, blur_prob=0.5, hue=(0.1, 0.2, 0.3), brightness=(0.7,))
    assert group.per_view(group.blur_prob) == (0.5, 0.5, 0.5)
    assert group.per_view(group.hue) == (0.1, 0.2, 0.3)
    assert group.per_view(group.brightness) == (0.7, 0.7, 0.7)


def test_a_mistake_names_the_group_what_is_needed_and_what_came():
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"augment": {"local": {"size": 96, "count": 8, "blur_prob": [1.0, 0.1]}}})
    sentence = "augment.local.blur_prob must have one value or one per view (count=8). Got 2 values."
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"count": 0}, "count must be at least 1. Got 0."),
        ({"size": 0}, "size must be between 1 and 8192. Got 0."),
        ({"flip_prob": 1.5}, "flip_prob must be between 0 and 1. Got 1.5."),
        ({"gray_prob": -0.1}, "gray_prob must be between 0 and 1. Got -0.1."),
        ({"hue": 0.6}, "hue must be between 0 and 0.5. Got 0.6."),
        ({"contrast": -1.0}, "contrast must be between 0 and 100. Got -1."),
        ({"scale": (0.5, 0.1)}, "scale must be an increasing pair, each above 0 and at most 1. Got [0.5, 0.1]."),
        ({"scale": (0.0, 1.0)}, "scale must be an increasing pair, each above 0 and at most 1. Got [0, 1]."),
        ({"aspect": (0.0, 1.0)}, "aspect must be an increasing pair, each between 0.01 and 100. Got [0, 1]."),
        ({"padding": 0.7}, "padding must be at most 0.5. Got 0.7."),
        (
            {"blur_sigma": (0.0, 2.0)},
            "blur_sigma must be an increasing pair, each above 0 and at most 1000. Got [0, 2].",
        ),
        ({"blur_kernel": 4}, "blur_kernel must be odd and from 1 to 15 for size=8. Got 4."),
        ({"blur_kernel": 17}, "blur_kernel must be odd and from 1 to 15 for size=8. Got 17."),
        ({"solarize_threshold": 128.0}, "solarize_threshold must be at most 1. Got 128.0."),
        ({"rand_augment": -1}, "rand_augment must be at least 0. Got -1."),
        ({"cutout": (0.5, 0.2)}, "cutout must be an increasing pair, each between 0 and 1. Got [0.5, 0.2]."),
        ({"cutout": (0.5, 1.5)}, "cutout must be an increasing pair, each between 0 and 1. Got [0.5, 1.5]."),
        ({"size": (8, 0)}, "size must be between 1 and 8192. Got 0."),
        ({"size": ()}, "size must be a number of pixels, or several. Got none."),
        ({"size": (8, 4), "size_weights": (1.0,)}, "size_weights must be a share for each of the 2 sizes. Got (1.0,)."),
        ({"size_weights": (1.0, 2.0)}, "size_weights must be a share for each of the 1 sizes. Got (1.0, 2.0)."),
        (
            {"size": (8, 4), "size_weights": (0.0, 0.0)},
            "size_weights must be a share for each of the 2 sizes. Got (0.0, 0.0).",
        ),
        ({"size": (8, 32), "blur_kernel": 17}, "blur_kernel must be odd and from 1 to 15 for size=8. Got 17."),
        ({"std": (0.1, 0.0, 0.1)}, "std must be between 0.001 and 2. Got 0."),
        (
            {"crops_of": "image", "scale": (0.4, 1.0)},
            "scale has no effect with crops_of=image. Leave it out; if the recipe sets it, write scale=[0.08, 1.0].",
        ),
        (
            {"crops_of": "image", "flip_prob": 0.0},
            "flip_prob has no effect with crops_of=image. Leave it out; if the recipe sets it, write flip_prob=0.5.",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"augment": {"view": {"size": 8, **settings}}})
    assert str(caught.value) == f"augment.view.{sentence}"


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"augment": {"view": {"size": 8, "hue": 0.6, "padding": 0.7}}})
    assert sorted(str(caught.value).splitlines()) == [
        "augment.view.hue must be between 0 and 0.5. Got 0.6.",
        "augment.view.padding must be at most 0.5. Got 0.7.",
    ]


def test_the_blur_kernel_covers_four_sigmas_unless_the_view_is_too_small():
    assert ViewGroup(size=224).blur_kernel_size(224) == 17
    assert ViewGroup(size=224, blur_sigma=(0.1, 1.1)).blur_kernel_size(224) == 11
    assert ViewGroup(size=4).blur_kernel_size(4) == 7
    assert ViewGroup(size=224, blur_kernel=23).blur_kernel_size(224) == 23


def test_every_setting_has_a_help_text():
    assert all(field.description for field in described_fields(ViewGroup).values())


def test_one_size_or_several_are_read_from_a_recipe_and_from_a_command():
    recipe = validate(Recipe, {"augment": {"view": {"size": [8, 16], "size_weights": [0.3, 0.7]}}})
    assert recipe.augment["view"].sizes == (8, 16)
    assert validate(Recipe, {"augment": {"view": {"size": 8}}}).augment["view"].sizes == (8,)
    assert load(Recipe, ["augment.view.size=8,16,24"]).augment["view"].sizes == (8, 16, 24)
    assert load(Recipe, ["augment.view.size=24"]).augment["view"].size == 24
    with pytest.raises(ConfigError, match=r"^augment\.view\.size must be .*integer.*\. Got "):
        validate(Recipe, {"augment": {"view": {"size": "large"}}})


def test_what_is_printed_of_crops_of_another_group_reads_back():
    settings = {"augment": {"image": {"size": 16}, "token": {"size": 8, "crops_of": "image", "mean": [0.5, 0.5, 0.5]}}}
    recipe = validate(Recipe, settings)
    assert validate(Recipe, read_yaml(dump(recipe), where="printed")) == recipe


def test_the_keys_of_operations_stand_between_crop_and_colours_in_their_order():
    keys = list(ViewGroup.model_fields)
    order = ["count", "size", "crop", "flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob", "cutout"]
    assert sorted(order, key=keys.index) == order


def test_no_two_uses_share_a_uniform():
    starts = sorted(CropUniform)
    assert [after - before for before, after in itertools.pairwise(starts)] == [10, 10, 1, 1]
    assert list(Uniform) == [0, 1, 2]


def test_groups_take_the_uniforms_of_their_operations():
    assert (num_uniforms(ViewGroup(size=8)), num_draws(ViewGroup(size=8))) == (33, 12)
    strong = ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))
    assert (num_uniforms(strong), num_draws(strong)) == (33 + 4 + 3, 12 + 4 + 4)
