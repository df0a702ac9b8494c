"""Tokens against timm's own forward passes: whole images of two sizes, masked ones, inner blocks, some patches."""

import copy

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.backbones.patches import patchify, take_patches
from ssl_pipeline.backbones.positions import resample_positions
from ssl_pipeline.config import ConfigError
from tests.backbones.tokens.networks import ANY_SIZE, FLAT, NETWORKS, SOME_PATCHES, network

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def images(height: int = 32, width: int = 32, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def random_mask(backbone: TokenBackbone, count: int = 2) -> torch.Tensor:
    """(N, L), other numbers of masked patches per image, the last image without any."""
    noise = torch.rand(count, backbone.grid[0] * backbone.grid[1], generator=torch.Generator().manual_seed(1))
    mask = noise < 0.4
    mask[-1] = False
    assert mask[0].any()
    return mask


def joined(tokens) -> torch.Tensor:
    """The tokens in a row, as timm's networks give them."""
    prefix = [] if tokens.cls is None else [tokens.cls[:, None]]
    return torch.cat([*prefix, tokens.registers, tokens.patches], dim=1)


def flat(timms: torch.Tensor) -> torch.Tensor:
    """A Swin's map (N, rows, columns, D) in a row."""
    return timms.flatten(1, 2) if timms.ndim == 4 else timms


def assert_timms(backbone: TokenBackbone, pixels: torch.Tensor) -> None:
    model, tokens = backbone.model, backbone.tokens(pixels)
    features = model.forward_features(pixels)
    assert features.std() > 0.01
    assert_close(joined(tokens), flat(features), **CLOSE)
    assert_close(backbone.pool(tokens), model.forward_head(features, pre_logits=True), **CLOSE)
    assert_close(backbone(pixels), model(pixels), **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_and_features_are_timms_at_the_networks_own_size(name):
    backbone = network(name)
    assert_timms(backbone, images())
    tokens = backbone.tokens(images())
    assert tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], backbone.embed_dim)
    assert tokens.registers.shape == (2, backbone.num_prefix_tokens - (tokens.cls is not None), backbone.embed_dim)
    assert tokens.grid == (32 // backbone.stride, 32 // backbone.stride)
    assert tokens.layers == ()
    assert_close(tokens.patch_map()[1, :, 0, 1], tokens.patches[1, 1])


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize(("height", "width"), [(48, 24), (64, 64), (16, 16)])
def test_tokens_and_features_at_another_size_are_timms_but_for_dinos_position_tables(name, height, width):
    backbone = network(name)
    assert backbone.tokens(images(height, width)).grid == (height // backbone.stride, width // backbone.stride)
    if name.startswith("vit") and backbone.model.pos_embed is not None and not backbone.model.num_reg_tokens:
        # resampled as DINO does it, which is not timm's way: a network of that size with that table
        other = network(name, img_size=(height, width))
        table = backbone.model.pos_embed
        num_prefix = table.shape[1] - 16
        resampled = resample_positions(table[:, num_prefix:], (4, 4), other.grid)
        state = {**backbone.state_dict(), "model.pos_embed": torch.cat([table[:, :num_prefix], resampled], dim=1)}
        other.load_state_dict(state)
        assert_timms(other, images(height, width))
        assert_close(backbone.tokens(images(height, width)).patches, other.tokens(images(height, width)).patches)
        assert_close(backbone(images(height, width)), other(images(height, width)))
    else:
        assert_timms(backbone, images(height, width))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ANY_SIZE])
def test_a_network_of_one_size_says_so(name):
    with pytest.raises(ValueError, match=r"takes only images of its own size, 32x32\. Got 48x32\.$"):
        network(name).tokens(images(48, 32))
    with pytest.raises(ValueError, match="Got 16x16"):
        network(name).check_size(16, 16)


@pytest.mark.parametrize("name", ["vit", "dinov3", "swin"])
def test_sides_must_be_multiples_of_the_patch_size(name):
    with pytest.raises(ValueError, match=r"must be multiples of the patch size \d\. Got 32x31\.$"):
        network(name).tokens(images(32, 31))


# masks


def with_replaced_patches(backbone: TokenBackbone, mask: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """timm's own forward pass, with the output of its patch embedding changed on the way."""

    def replace(module, inputs, embedded):
        rows = embedded.flatten(1, -2).clone()
        rows[mask] = token.to(rows.dtype)
        return rows.view_as(embedded)

    handle = backbone.model.patch_embed.register_forward_hook(replace)
    try:
        return flat(backbone.model.forward_features(images()))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_patches_are_the_mask_token_before_their_positions(name):
    backbone = network(name)
    mask, token = random_mask(backbone), torch.randn(1, 1, backbone.patch_dim, dtype=torch.float64)
    tokens = backbone.tokens(images(), mask=mask, mask_token=token)
    assert_close(joined(tokens), with_replaced_patches(backbone, mask, token[0, 0]), **CLOSE)
    whole = backbone.tokens(images())
    assert_close(tokens.patches[1], whole.patches[1], **CLOSE)  # which has no mask
    assert not torch.allclose(tokens.patches[0], whole.patches[0], atol=1e-3)


@pytest.mark.parametrize("name", ["vit_dinov2", "dinov3", "beit", "swin"])
def test_what_is_masked_is_not_seen(name):
    backbone, pixels = network(name), images()
    mask, token = random_mask(backbone), torch.zeros(backbone.patch_dim)
    shown = mask.view(2, 1, *backbone.grid).repeat_interleave(backbone.patch_size, 2)
    shown = ~shown.repeat_interleave(backbone.patch_size, 3)
    seen = [backbone.tokens(given, mask=mask, mask_token=token) for given in (pixels, pixels * shown)]
    assert_close(seen[0].patches, seen[1].patches)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "swin"])
def test_a_mask_token_has_a_gradient_whatever_the_mask(name):
    backbone = network(name)
    for mask, is_seen in ((random_mask(backbone), True), (torch.zeros_like(random_mask(backbone)), False)):
        token = torch.zeros(backbone.patch_dim, requires_grad=True)
        backbone.tokens(images(), mask=mask, mask_token=token).patches.square().sum().backward()
        assert bool(token.grad.any()) == is_seen


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
def test_a_mask_token_may_have_axes_of_one(shape):
    backbone, token = network("vit"), torch.randn(32)
    mask = random_mask(backbone)
    expected = backbone.tokens(images(), mask=mask, mask_token=token)
    assert torch.equal(backbone.tokens(images(), mask=mask, mask_token=token.view(shape)).patches, expected.patches)


def test_masks_that_do_not_fit_are_refused():
    backbone = network("vit")
    mask, token = random_mask(backbone), torch.zeros(32)
    with pytest.raises(ValueError, match=r"needs mask and mask_token together\. Got mask without mask_token"):
        backbone.tokens(images(), mask=mask)
    with pytest.raises(ValueError, match="Got mask_token without mask"):
        backbone.tokens(images(), mask_token=token)
    for wrong in (mask.float(), mask[:, :-1], mask[:1], mask.view(2, 4, 4)):
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 4 \* 4\)"):
            backbone.tokens(images(), mask=wrong, mask_token=token)
    with pytest.raises(ValueError, match=r"must have the 32 values of a patch\. Got \(33,\)"):
        backbone.tokens(images(), mask=mask, mask_token=torch.zeros(33))


# inner blocks


@pytest.mark.parametrize("name", FLAT)
def test_inner_blocks_are_timms_intermediate_layers(name):
    backbone = network(name)
    tokens = backbone.tokens(images(), layers=(0, 2, -2))
    assert_close(joined(tokens), joined(backbone.tokens(images())))
    _, inner = backbone.model.forward_intermediates(
        images(), indices=[0, 1, 2], norm=True, output_fmt="NLC", return_prefix_tokens=backbone.num_prefix_tokens > 0
    )
    inner = [part if isinstance(part, tuple) else (part, part[:, :0]) for part in inner]
    for found, number in zip(tokens.layers, (0, 2, 1), strict=True):
        patches, prefix = inner[number]
        assert_close(joined(found), torch.cat([prefix, patches], dim=1), **CLOSE)
        assert found.grid == tokens.grid
    assert_close(joined(tokens.layers[1]), joined(tokens))


def test_layers_that_do_not_exist_are_refused():
    for layers in ((3,), (-4,), (0, 5)):
        with pytest.raises(ValueError, match="must be numbers of the 3 blocks, from 0"):
            network("vit").tokens(images(), layers=layers)
    with pytest.raises(ValueError, match="must be empty for a Swin"):
        network("swin").tokens(images(), layers=(-1,))


# some patches


@pytest.mark.parametrize("name", SOME_PATCHES)
def test_some_patches_are_embedded_as_in_the_whole_image(name):
    backbone, places = network(name), torch.tensor([[3, 7, 1], [15, 0, 8]])
    whole = backbone.embed(images())
    some = backbone.embed_patches(take_patches(patchify(images(), 8), places), places)
    assert_close(some, take_patches(whole, places), **CLOSE)
    assert_close(backbone.encode(whole), flat(backbone.model.forward_features(images())), **CLOSE)


@pytest.mark.parametrize("name", [name for name in SOME_PATCHES if name not in ("vit", "beit_absolute")])
def test_some_patches_are_encoded_as_if_attention_saw_no_others(name):
    backbone, kept = network(name), torch.tensor([[3, 7, 1, 12, 9], [15, 0, 8, 4, 5]])
    num_prefix = backbone.num_prefix_tokens
    seen = torch.zeros(2, num_prefix + 16, dtype=torch.bool)
    seen[:, :num_prefix] = True
    seen.scatter_(1, kept + num_prefix, True)
    places = kept if name.startswith(("eva02", "dinov3", "rope", "perception")) else None
    encoded = backbone.encode(take_patches(backbone.embed(images()), kept), places)
    whole = backbone.model.forward_features(images(), attn_mask=seen[:, None, None].expand(-1, 1, seen.shape[1], -1))
    assert_close(encoded[:, :num_prefix], whole[:, :num_prefix], **CLOSE)
    assert_close(encoded[:, num_prefix:], take_patches(whole[:, num_prefix:], kept), **CLOSE)


@pytest.mark.parametrize("name", ["dinov3", "rope_mixed", "eva02"])
def test_networks_that_rotate_tokens_must_know_their_places(name):
    backbone = network(name)
    tokens = backbone.embed(images())
    with pytest.raises(ValueError, match=r"needs the positions of these tokens: .* Got 3 tokens of 16 patches\.$"):
        backbone.encode(tokens[:, :3])
    places = torch.arange(16).expand(2, -1)
    assert_close(backbone.encode(tokens, places), backbone.encode(tokens))
    with pytest.raises(AssertionError):
        assert_close(backbone.encode(tokens, places.flip(1)), backbone.encode(tokens))


@pytest.mark.parametrize("name", ["beit", "beit_pretraining", "swin", "vit_on_convolutions"])
def test_networks_that_need_all_patches_say_which_do_not(name):
    backbone = network(name)
    assert not backbone.takes_some_patches
    sentence = "needs all patches of an image. Networks that take some of them: timm's VisionTransformer without"
    with pytest.raises(ConfigError, match=sentence):
        backbone.embed(images())
    with pytest.raises(ConfigError, match=sentence):
        backbone.embed_patches(torch.zeros(2, 3, 192), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match=sentence):
        backbone.encode(torch.zeros(2, 16, 32, dtype=torch.float64))


def test_dropped_patches_leave_no_tokens():
    backbone = network("vit", patch_drop_rate=0.5)
    assert backbone.tokens(images()).patches.shape[1] == 16  # in evaluation mode none is dropped
    with pytest.raises(ValueError, match=r"this network left 8 of them\. Leave .*patch_drop_rate out\.$"):
        backbone.train().tokens(images())


# what training does with them


@pytest.mark.parametrize("name", ["vit", "dinov3", "rope_mixed", "beit_pretraining", "swin"])
@pytest.mark.parametrize("layers", [(), (0, 1)])
def test_checkpointed_activations_change_no_gradient(name, layers):
    if name == "swin" and layers:
        return
    gradients = []
    for checkpointed in (False, True):
        backbone = network(name, drop_path_rate=0.5).train()
        backbone.model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(3)
        tokens = backbone.tokens(images(count=8), layers=layers)
        sum(part.patches.square().sum() for part in (tokens, *tokens.layers)).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert_close(*gradients)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "swin"])
def test_a_copy_is_a_network_of_its_own(name):
    backbone = network(name)
    before = backbone(images())
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other.tokens(images()).patches, backbone.tokens(images()).patches)
    assert torch.equal(backbone(images()), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "swin"])
def test_tokens_compile_in_place_for_two_sizes(name):
    backbone = network(name, **({"depths": (1, 1), "num_heads": (1, 2)} if name == "swin" else {"depth": 1}))
    expected = [backbone.tokens(images(size, size)).patches for size in (32, 16)]
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    backbone.compile(backend="eager", fullgraph=True)
    assert_close([backbone.tokens(images(size, size)).patches for size in (32, 16)], expected)
    assert_close(backbone(images()), backbone.model(images()))


def test_the_rotations_of_a_grid_are_made_once(monkeypatch):
    backbone = network("dinov3")
    made = []
    original = backbone.model.rope.get_embed
    monkeypatch.setattr(backbone.model.rope, "get_embed", lambda shape: made.append(shape) or original(shape=shape))
    with torch.inference_mode():
        backbone.tokens(images())
    for size in (32, 32, 16, 32):
        backbone.train().tokens(images(size, size)).patches.sum().backward()
    assert made == [(4, 4), (2, 2)]


def test_rotations_that_are_drawn_anew_are_made_in_every_pass():
    backbone = network("dinov3", rope_rescale_coords=2.0)
    assert_timms(backbone, images())
    whole = backbone.tokens(images()).patches
    backbone.train()
    drawn = [backbone.tokens(images()).patches for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(4)
    timms = backbone.model.forward_features(images())
    torch.manual_seed(4)
    assert_close(joined(backbone.tokens(images())), timms, **CLOSE)
    assert torch.equal(backbone.eval().tokens(images()).patches, whole)
