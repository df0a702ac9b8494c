"""Every size of every method: a network is built, or one sentence names the key, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods import build_method
from tests.tiny import CONFIGS, VIT, tiny_settings

SIZES = ("_dim", "_heads", "_layers", "_depth", "_blocks", "_hidden", "_bottleneck")  # how such settings end


def sizes() -> Iterator[tuple[str, str]]:
    for name, config in CONFIGS.items():
        yield from ((name, field) for field in config.model_fields if field.endswith(SIZES))


def refusal(name: str, **settings: object) -> str | None:
    """What is wrong with settings of a method; None if nothing is, and its networks are built of them."""
    try:
        config = CONFIGS[name](**tiny_settings(name) | settings)
    except ValidationError as error:
        return str(error)
    build_method(config, create_backbone(VIT))
    return None


@pytest.mark.parametrize(("name", "setting"), list(sizes()))
def test_a_size_is_taken_or_refused_by_its_key(name: str, setting: str) -> None:
    is_depth = setting.endswith(("_layers", "_depth", "_blocks"))
    for value in (1, 3, 7) if is_depth else (1, 3, 7, 255):
        assert setting in (refusal(name, **{setting: value}) or setting)
    assert setting in (refusal(name, **{setting: 2**31 - 1}) or "taken")  # no network has that


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["decoder_heads=7"], "a multiple of 4 and of decoder_heads=7. Got 256; try decoder_dim=252."),
        (["decoder_dim=255"], "a multiple of 4 and of decoder_heads=8. Got 255; try decoder_dim=256."),
        (["decoder_dim=6", "decoder_heads=3"], "a multiple of 4 and of decoder_heads=3. Got 6; try decoder_dim=12."),
    ],
)
def test_sizes_of_maes_decoder_are_told_while_settings_are_read(arguments: list[str], sentence: str) -> None:
    argv = ["recipe=cifar10_mae_vit_tiny", *(f"method.{argument}" for argument in arguments)]
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, argv, recipes=RECIPES)
    assert f"decoder_dim must be {sentence}" in str(error.value)
