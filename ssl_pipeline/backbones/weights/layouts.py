"""The names that other projects use for timm's networks: tables, read by `matching`.

Looked up in the official repositories: facebookresearch/dino, dinov2, dinov3, mae, moco, moco-v3, swav, simsiam,
bytedance/ibot, microsoft/SimMIM, microsoft/unilm (BEiT), huggingface/transformers, sthalles/PyTorch-BYOL,
ajtejankar/byol-convert, lucidrains/byol-pytorch, pytorch/vision.
"""

from __future__ import annotations

from dataclasses import dataclass

Rules = tuple[tuple[str, str], ...]
"""Regular expressions and their replacements, applied in order."""


@dataclass(frozen=True)
class Layout:
    """How a family of files names the tensors of a network, relative to the place where the network lies in the file.

    anchor: a tensor that each such file has, which shows that place; None for the first one of the network's own names.
    rules: from these names to timm's. Attention that is stored in three parts becomes `attn.q`, `attn.k`, `attn.v`.
    """

    anchor: str | None
    rules: Rules


SWIN_DOWNSAMPLE: Rules = tuple(  # at the end of a stage in the official code, at the start of the next in timm
    (rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in (2, 1, 0)
)
OFFICIAL: Rules = (
    (r"^(?:register_tokens|storage_tokens)$", "reg_token"),  # DINOv2, DINOv3
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, for FSDP: DINOv2 in training
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # SwiGLU: DINOv2's giant
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),  # SwiGLU: DINOv3's plus and 7B
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # BEiT, iBOT, SimMIM
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),  # BEiT, SimMIM
)
HUGGING_FACE: Rules = (
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^(?:encoder\.|model\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.(?:attention|self)\.(?:relative_position_bias\.)?(relative_position_\w+)$", r".attn.\1"),
    (r"\.attention\.(?:attention\.|self\.)?(?:q_proj|query)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.|self\.)?(?:k_proj|key)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.|self\.)?(?:v_proj|value)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.up_proj|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.(?:output\.dense|mlp\.down_proj|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(?:layer_scale([12])\.lambda1|lambda_([12]))$", r".ls\1\2.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
CONVNEXT: Rules = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
)
RESNET_IN_A_ROW: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    *((rf"^{place}\.(\d+)\.", rf"layer{place - 3}.\1.") for place in (4, 5, 6, 7)),
)
LAYOUTS = (
    Layout(None, OFFICIAL),  # timm, torchvision's ResNets, the official code of most methods
    Layout("layers.0.downsample.reduction.weight", SWIN_DOWNSAMPLE),  # official Swin and SimMIM
    Layout("embeddings.patch_embeddings.projection.weight", HUGGING_FACE + SWIN_DOWNSAMPLE),
    # Hugging Face's BEiT with masked images, whose last norm is outside the network
    Layout("beit.embeddings.patch_embeddings.projection.weight", ((r"^beit\.", ""), *HUGGING_FACE)),
    Layout("embeddings.patch_embeddings.weight", HUGGING_FACE),  # DINOv3
    Layout("conv_proj.weight", TORCHVISION_VIT),
    Layout("downsample_layers.0.0.weight", CONVNEXT),  # ConvNeXt's official code, DINOv3
    Layout("0.weight", RESNET_IN_A_ROW),  # a ResNet as nn.Sequential of its children
)

SPELLINGS: Rules = (  # of timm's own networks, where one has another name than most
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.fc1\.", ".mlp.fc1_x."),
    (r"\.attn\.([qkv])\.", r".attn.\1_proj."),
    (r"\.attn\.([qv])\.bias$", r".attn.\1_bias"),
)

# Networks of one file: words in the name of the place where each lies
TEACHERS = {
    *("teacher", "ema", "model_ema", "state_dict_ema", "momentum", "momentum_encoder", "momentum_backbone"),
    *("backbone_momentum", "encoder_k", "target", "target_encoder", "target_network", "target_backbone"),
    "target_network_state_dict",
}
STUDENTS = {
    *("student", "encoder_q", "base_encoder", "online", "online_encoder", "online_network", "online_backbone"),
    "online_network_state_dict",
}
TAKEN_FIRST = {"teacher", "ema", "model_ema", "state_dict_ema"}
"""Whose teacher is taken by default; for MoCo and BYOL it is the student, as their authors do."""

PARTS: Rules = (  # what may be left in a file, by how the names of its tensors begin, and what the message says
    (r"(.*\.)?(relative_position_index|attn_mask)$", "index tables"),
    (r"(rope|rope_embed|rope_embeddings)\.", "rotary tables"),
    (r".*\.bias_mask$", "bias masks"),
    (r"(embeddings\.)?(mask_token|masked_embed)$", "mask token"),
    (r"decoder(_\w+)?(\.|$)", "decoder"),
    (r"prototypes\.", "prototypes"),
    (r"queue(_ptr)?$", "queue"),
    (r"(online_)?predictor(_network_state_dict)?\.", "predictor"),
    (r"(projector|projection_head|projetion|projection|neck|momentum_projector)\.", "projector"),
    (r"(\w+_)?(head|heads|head_dist|fc|classifier|linear|pooler)\.", "head"),
    (r"(local_cls_norm|norms\.\d+)\.", "norms of the training"),
    (r"(center2?|centre|(dino|ibot|ibot_patch)_loss)(\.|$)", "centre of the loss"),
)

DINOV3 = ("dinov3", "dinov3_qkvb")
ARCHITECTURES: dict[tuple[int, ...], tuple[str, ...]] = {
    (192, 3, 16, 16): ("vit_tiny_patch16_224",),
    (384, 3, 16, 16): (
        "vit_small_patch16_224",
        *(f"vit_{size}_patch16_{kind}" for size in ("small", "small_plus") for kind in DINOV3),
    ),
    (768, 3, 16, 16): (
        *("vit_base_patch16_224", "beit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"),
        *(f"vit_base_patch16_{kind}" for kind in DINOV3),
    ),
    (1024, 3, 16, 16): (
        *("vit_large_patch16_224", "beit_large_patch16_224"),
        *(f"vit_large_patch16_{kind}" for kind in DINOV3),
    ),
    (1280, 3, 16, 16): tuple(f"vit_huge_plus_patch16_{kind}" for kind in DINOV3),
    (4096, 3, 16, 16): ("vit_7b_patch16_dinov3",),
    (1280, 3, 14, 14): ("vit_huge_patch14_224",),
    (384, 3, 14, 14): ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    (768, 3, 14, 14): ("vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"),
    (1024, 3, 14, 14): ("vit_large_patch14_dinov2", "vit_large_patch14_reg4_dinov2"),
    (1536, 3, 14, 14): ("vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"),
    (384, 3, 8, 8): ("vit_small_patch8_224",),
    (768, 3, 8, 8): ("vit_base_patch8_224",),
    (96, 3, 4, 4): (
        *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"),
        *("convnext_tiny", "convnext_small", "convnextv2_tiny"),
    ),
    (384, 3, 32, 32): ("vit_small_patch32_224",),
    (768, 3, 32, 32): ("vit_base_patch32_224",),
    (40, 3, 4, 4): ("convnext_atto", "convnextv2_atto"),
    (48, 3, 4, 4): ("convnext_femto", "convnextv2_femto"),
    (64, 3, 4, 4): ("convnext_pico", "convnextv2_pico"),
    (80, 3, 4, 4): ("convnext_nano", "convnextv2_nano"),
    (128, 3, 4, 4): ("swin_base_patch4_window7_224", "convnext_base", "convnextv2_base"),
    (192, 3, 4, 4): ("swin_large_patch4_window7_224", "convnext_large", "convnextv2_large"),
    (64, 3, 7, 7): (
        *("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"),
        *("wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "seresnet50", "densenet121"),
    ),
    (16, 3, 3, 3): (
        *("wide_resnet28_2", "test_resnet", "mobilenetv2_050"),
        *(f"mobilenetv3_{name}" for name in ("small_050", "small_075", "small_100", "large_075", "large_100")),
    ),
    (32, 3, 3, 3): (
        *(f"resnet{depth}d" for depth in (18, 26, 34, 50, 101)),
        *(f"efficientnet_{name}" for name in ("b0", "b1", "b2", "lite0", "lite1", "lite2", "lite3", "lite4")),
        *("tf_efficientnetv2_b0", "mobilenetv2_100", "mobilenetv4_conv_small", "mobilenetv4_conv_medium"),
        *(f"regnet{kind}_{size}" for kind in "xy" for size in ("002", "004", "006", "008", "016", "032")),
    ),
    (24, 3, 3, 3): ("tf_efficientnetv2_s",),
    (40, 3, 3, 3): ("efficientnet_b3",),
    (48, 3, 3, 3): ("efficientnet_b4", "mobilenetv2_140"),
}
"""Networks of timm by their first convolution, which are compared with a file that does not fit."""
