"""Projectors, predictors, prototypes and the pixel decoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_pipeline.backbones.patches import random_masking
from ssl_pipeline.backbones.positions import sincos_position_embedding
from ssl_pipeline.modules.heads import MLPHead, PixelShuffleDecoder, PrototypeHead, Prototypes
from ssl_pipeline.modules.pixel_decoder import PixelDecoder


def describe(head):
    names = {nn.Linear: "linear", nn.BatchNorm1d: "norm", nn.ReLU: "relu"}
    words = []
    for layer in head:
        has_bias = isinstance(layer, nn.Linear) and layer.bias is not None
        words.append(names[type(layer)] + ("+bias" if has_bias else ""))
    return " ".join(words)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"batch_norm": False, "bias": True, "last_bias": True}, "linear+bias relu linear+bias"),  # MoCo v2
        ({"last_batch_norm": "no_affine"}, "linear norm relu linear norm"),  # MoCo v3, SimSiam, SimCLR
        ({"bias": True}, "linear+bias norm relu linear"),  # BYOL
        ({"last_bias": True}, "linear norm relu linear+bias"),  # SimSiam's predictor
    ],
)
def test_mlp_head_builds_the_official_layers(arguments, layers):
    head = MLPHead((6, 8, 4), **arguments)
    assert describe(head) == layers
    assert head(torch.randn(5, 6)).shape == (5, 4)


def test_mlp_head_takes_any_number_of_layers():
    assert describe(MLPHead((6, 8, 9, 4))) == "linear norm relu linear norm relu linear"
    assert describe(MLPHead((6, 4))) == "linear"
    with pytest.raises(ValueError, match=r"Got \(6,\)"):
        MLPHead((6,))


@pytest.mark.parametrize(
    ("last_batch_norm", "trained"),
    [("no_affine", set()), ("no_shift", {"1.weight"}), ("affine", {"1.weight", "1.bias"})],
)
def test_the_last_norm_trains_what_it_is_asked_to(last_batch_norm, trained):
    head = MLPHead((6, 4), last_batch_norm=last_batch_norm)
    names = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert names == {"0.weight"} | trained


def prototype_head(**arguments):
    return PrototypeHead(6, 10, hidden_dim=8, bottleneck_dim=4, **arguments).double()


def test_prototype_head_equals_the_formula():
    head = prototype_head()
    weights = head.state_dict()
    features = torch.randn(5, 6, dtype=torch.float64)
    x = F.gelu(features @ weights["mlp.0.weight"].T + weights["mlp.0.bias"])
    x = F.gelu(x @ weights["mlp.2.weight"].T + weights["mlp.2.bias"])
    x = x @ weights["mlp.4.weight"].T + weights["mlp.4.bias"]
    directions = weights["last_layer.weight_v"]
    cosines = [[(row @ v) / (row.norm() * v.norm()) for v in directions] for row in x]
    torch.testing.assert_close(head(features), torch.tensor(cosines))


def test_logits_are_the_bottleneck_times_the_prototypes():
    head, features = prototype_head(fixed_scale=False), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(head.bottleneck(features).norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(head.bottleneck(features) @ head.prototypes().T, head(features))


def test_prototype_head_keeps_the_official_names_in_order():
    names = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias"]
    assert list(prototype_head().state_dict()) == [*names, "last_layer.weight_g", "last_layer.weight_v"]


@pytest.mark.parametrize(
    ("num_layers", "batch_norm", "expected"),
    [
        (1, False, [nn.Linear]),
        (2, False, [nn.Linear, nn.GELU, nn.Linear]),
        (3, True, [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]),
    ],
)
def test_num_layers_counts_the_linear_layers(num_layers, batch_norm, expected):
    head = prototype_head(num_layers=num_layers, batch_norm=batch_norm)
    assert [type(layer) for layer in head.mlp] == expected
    assert head(torch.randn(3, 6, dtype=torch.float64)).shape == (3, 10)


def test_prototype_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="Got 0"):
        prototype_head(num_layers=0)


def test_the_prototypes_have_unit_scale_unless_it_is_trained():
    fixed, trained = prototype_head(), prototype_head(fixed_scale=False)
    assert not fixed.last_layer.weight_g.requires_grad
    assert trained.last_layer.weight_g.requires_grad
    features = torch.randn(5, 6, dtype=torch.float64)
    before = fixed(features)
    with torch.no_grad():
        fixed.last_layer.weight_v.mul_(7)
    torch.testing.assert_close(fixed(features), before)
    assert before.abs().max() <= 1


def test_prototype_head_passes_gradcheck():
    head = prototype_head(num_layers=1, fixed_scale=False)

    def logits(features, directions, scales):
        weights = {"last_layer.weight_v": directions, "last_layer.weight_g": scales}
        return torch.func.functional_call(head, weights, features)

    features = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(logits, (features, head.last_layer.weight_v, head.last_layer.weight_g))


def test_prototype_head_starts_as_the_official_one():
    torch.manual_seed(0)
    head = PrototypeHead(300, 500, hidden_dim=400, bottleneck_dim=64)
    for layer in head.mlp[::2]:
        assert 0.019 < layer.weight.std() < 0.021
        assert layer.bias.abs().max() == 0
    assert head.last_layer.weight_g.eq(1).all()
    assert head.last_layer.weight_v.abs().max() <= 64**-0.5


def decoder_and_inputs():
    torch.manual_seed(0)
    decoder = PixelDecoder(6, (2, 3), 4, dim=8, depth=1, num_heads=2).double()
    kept, _, restore = random_masking(torch.rand(5, 6), ratio=0.5)
    return decoder, torch.randn(5, 1 + kept.shape[1], 6, dtype=torch.float64), restore


def test_pixel_decoder_predicts_every_patch():
    decoder, encoded, restore = decoder_and_inputs()
    assert decoder(encoded, restore).shape == (5, 6, 4 * 4 * 3)


def test_pixel_decoder_predicts_wanted_patches_alone():
    decoder, encoded, restore = decoder_and_inputs()
    wanted = torch.tensor([[5, 0], [1, 2], [3, 3], [4, 5], [0, 1]])
    some, everything = decoder(encoded, restore, wanted), decoder(encoded, restore)
    torch.testing.assert_close(some, torch.stack([rows[of] for rows, of in zip(everything, wanted, strict=True)]))


def test_pixel_decoder_puts_tokens_back_in_image_order():
    decoder, encoded, restore = decoder_and_inputs()
    positions = sincos_position_embedding(8, (2, 3), class_token=False).double()
    tokens = decoder.embed(encoded)
    images = []
    for tokens_of_image, places in zip(tokens, restore, strict=True):
        rows = [tokens_of_image[0]]
        for patch, place in enumerate(places):
            token = tokens_of_image[1 + place] if place < 3 else decoder.mask_token[0, 0]
            rows.append(token + positions[patch])
        images.append(torch.stack(rows))
    expected = decoder.predict(decoder.norm(decoder.blocks(torch.stack(images))))[:, 1:]
    torch.testing.assert_close(decoder(encoded, restore), expected)


def test_pixel_decoder_trains_all_its_parameters():
    decoder, encoded, restore = decoder_and_inputs()
    decoder(encoded, restore).square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_prototypes_have_length_one_until_training_changes_them():
    torch.manual_seed(0)
    prototypes = Prototypes(3, 5)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(5))
    same = prototypes.weight
    with torch.no_grad():
        prototypes.weight.mul_(torch.tensor([[2.0], [3.0], [0.5], [1.0], [7.0]]))
    expected = torch.stack([row / row.norm() for row in prototypes.weight.detach()])
    prototypes.normalize_()
    assert prototypes.weight is same
    assert prototypes.weight.requires_grad
    torch.testing.assert_close(prototypes.weight.detach(), expected)
    embeddings = F.normalize(torch.randn(2, 4, 3), dim=-1)
    scores = prototypes(embeddings)
    assert scores.shape == (2, 4, 5)
    torch.testing.assert_close(scores[1, 2, 3], embeddings[1, 2] @ prototypes.weight[3])
    assert list(prototypes.state_dict()) == ["weight"]


def test_pixel_shuffle_decoder_paints_each_tokens_square():
    torch.manual_seed(0)
    decoder = PixelShuffleDecoder(5, 4, channels=2).double()
    assert [name for name, _ in decoder.named_parameters()] == ["0.weight", "0.bias"]
    tokens = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    pixels = decoder(tokens)
    assert pixels.shape == (3, 2, 8, 12)
    weight, bias = decoder[0].weight[:, :, 0, 0], decoder[0].bias
    for channel, y, x in ((0, 0, 0), (1, 5, 10), (0, 7, 3), (1, 2, 11)):
        output = channel * 16 + (y % 4) * 4 + x % 4  # torch's order: channel, row, column
        expected = tokens[:, :, y // 4, x // 4] @ weight[output] + bias[output]
        torch.testing.assert_close(pixels[:, channel, y, x], expected)


def test_pixel_shuffle_decoder_needs_sizes():
    assert PixelShuffleDecoder(5, 1)(torch.zeros(1, 5, 2, 2)).shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match="Got 5, 0 and 3"):
        PixelShuffleDecoder(5, 0)


def test_without_weight_norm_the_prototypes_are_a_plain_small_layer():
    torch.manual_seed(0)
    head = PrototypeHead(6, 500, hidden_dim=8, bottleneck_dim=40, weight_norm=False)
    assert head.prototypes() is head.last_layer.weight
    assert [name for name, _ in head.last_layer.named_parameters()] == ["weight"]
    assert head.prototypes().std().item() == pytest.approx(0.02, rel=0.05)
    features = torch.randn(3, 6)
    torch.testing.assert_close(head(features), head.bottleneck(features) @ head.last_layer.weight.T)
