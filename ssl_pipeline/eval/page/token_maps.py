"""What a ViT looks at, and which of its patches are alike: attention of the last block, patch tokens as colours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.eval.features.extract import eval_mode
from ssl_pipeline.eval.page.examples import Examples
from ssl_pipeline.eval.page.html import Section, about, picture, pictures, rows_of, section
from ssl_pipeline.eval.page.pictures import as_pixels, at_least, data_url, heat

IMAGES, HEADS = 8, 3
SIDE = 112  # pixels of what is shown, at least

# Axes: N images, H heads, T tokens, R rows and C columns of patches, L = R * C, D dimensions.


def token_section(examples: Examples) -> Section | None:
    """Some images with the colours of their patches and the attention of the last block; None for other networks."""
    backbone = examples.model.backbone
    if not isinstance(backbone, TokenBackbone):
        return None
    preprocessing = examples.model.preprocessing
    images = EvaluationSet(examples.index, preprocessing.size, preprocessing.interpolation)
    chosen = [examples.samples[place] for place in examples.spread(IMAGES)]
    pixels_NCHW = torch.stack([images[sample][0] for sample in chosen]).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    normalised_NCHW = ((pixels_NCHW / 255 - mean) / std).to(examples.device)
    with torch.no_grad(), eval_mode(backbone):
        attention_NHRC = attention_of_last_block(backbone, normalised_NCHW)
        tokens = backbone.tokens(normalised_NCHW)
    colours_NCRC = colours_of_patches(tokens.patches.float().cpu()).unflatten(2, tokens.grid)
    rows = []
    for number, image_CHW in enumerate(as_pixels(normalised_NCHW, preprocessing.mean, preprocessing.std)):
        large_CHW = at_least(image_CHW, SIDE)
        shown = [
            picture(data_url(large_CHW), "image", kind="query"),
            picture(data_url(at_least(colours_NCRC[number], SIDE)), "patches"),
        ]
        if attention_NHRC is not None:
            of_image_HRC = attention_NHRC[number].float().cpu()
            shown.append(picture(data_url(heat(of_image_HRC.mean(dim=0), large_CHW)), "attention"))
            heads = of_image_HRC[:HEADS] if len(of_image_HRC) > 1 else ()
            shown += [
                picture(data_url(heat(of_head_RC, large_CHW)), f"head {head + 1}")
                for head, of_head_RC in enumerate(heads)
            ]
        rows.append(pictures(shown))
    return section("Patches and attention", about(_words(tokens.cls is not None)), rows_of(rows))


def _words(has_class_token: bool) -> str:
    where = "of the class token" if has_class_token else "of all patches"
    return (
        "Patches: the first three principal components of the patch tokens of these images as red, green and blue. "
        "Parts of one colour are alike for the network, in all of the images; objects that stand out from their "
        f"background are a good sign. Attention: where that {where} goes in the last block, bright is high, on average "
        "and for single heads."
    )


def colours_of_patches(patches_NLD: Tensor) -> Tensor:
    """Patch tokens -> (N, 3, L) in [0, 255]: the first three principal components over all images."""
    flat_XD = patches_NLD.flatten(0, 1).double()
    centred_XD = flat_XD - flat_XD.mean(dim=0)
    _, _, axes_KD = torch.linalg.svd(centred_XD, full_matrices=False)
    parts_X3 = torch.nn.functional.pad(centred_XD @ axes_KD[:3].T, (0, max(0, 3 - len(axes_KD))))
    low_3, high_3 = (torch.quantile(parts_X3, share, dim=0) for share in (0.02, 0.98))
    colours_X3 = ((parts_X3 - low_3) / (high_3 - low_3).clamp(min=1e-12)).clamp(0, 1) * 255
    return colours_X3.float().unflatten(0, patches_NLD.shape[:2]).transpose(1, 2)


def attention_of_last_block(backbone: TokenBackbone, images_NCHW: Tensor) -> Tensor | None:
    """(N, H, R, C): how much each patch is attended to by the class token, or by all patches on average without one.

    None for networks whose attention does not see all patches at once (Swin).
    """
    blocks = getattr(backbone.model, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
    if attention is None or not isinstance(getattr(attention, "attn_drop", None), nn.Module):
        return None
    seen: list[Tensor] = []
    fused = attention.fused_attn

    def multiply_step_by_step(module: nn.Module, given: object) -> None:
        module.fused_attn = False  # type: ignore[assignment]  # the fused kernel does not say what it attended to

    hooks = [
        attention.register_forward_pre_hook(multiply_step_by_step),
        attention.attn_drop.register_forward_hook(lambda module, given, weights_NHTT: seen.append(weights_NHTT)),
    ]
    try:
        tokens = backbone.tokens(images_NCHW)
    finally:
        attention.fused_attn = fused
        for hook in hooks:
            hook.remove()
    (weights_NHTT,) = seen
    prefix = weights_NHTT.shape[-1] - tokens.grid[0] * tokens.grid[1]
    asking_NHT = weights_NHTT[:, :, 0] if tokens.cls is not None else weights_NHTT[:, :, prefix:].mean(dim=2)
    return asking_NHT[..., prefix:].unflatten(2, tokens.grid)
