"""Small networks of each class of timm's that has tokens, with the flags of real ones; weights far from zero."""

import torch
from timm.layers import HybridEmbed
from timm.models import Beit, Eva, SwinTransformer, VisionTransformer
from torch import nn

from ssl_pipeline.backbones import TokenBackbone

SIZE = {"img_size": 32, "num_classes": 0}
VIT = SIZE | {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ANY = {"dynamic_img_size": True}
DINOV3 = {
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "use_fc_norm": False,
    "init_values": 0.3,
    "qkv_bias": False,
    "global_pool": "token",
}
ROPE_VIT = {"attn_type": "rope", "use_rot_pos_emb": True, "rope_grid_indexing": "xy", "global_pool": "token"}
EVA02 = {"swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
MIXED = ROPE_VIT | {"use_abs_pos_emb": False, "rope_type": "mixed", "rope_temperature": 10.0}
PERCEPTION = ROPE_VIT | {"global_pool": "map", "use_pre_transformer_norm": True, "rope_grid_offset": 1.0}


def on_convolutions(**arguments: object) -> HybridEmbed:
    """Patches of 2 x 2 of a map that is 4 times smaller than the image."""
    return HybridEmbed(nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU()), **arguments)


# name -> (class, arguments, whether it takes images of any size)
NETWORKS = {
    "vit": (VisionTransformer, {}, True),
    "vit_dinov2": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3}, True),
    "vit_embedded_registers": (VisionTransformer, {"reg_tokens": 2}, True),
    "vit_averaged": (VisionTransformer, {"class_token": False, "global_pool": "avg"}, True),
    "vit_siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}, True),
    "vit_clip": (VisionTransformer, {"pre_norm": True}, True),
    "vit_without_positions": (VisionTransformer, {"pos_embed": "none"}, True),
    "vit_on_convolutions": (VisionTransformer, {"embed_layer": on_convolutions, "patch_size": 2}, True),
    "vit_of_one_size": (VisionTransformer, {"dynamic_img_size": False}, False),
    "eva": (Eva, {"init_values": 0.3}, True),
    "eva02": (Eva, EVA02, True),
    "eva02_of_one_size": (Eva, EVA02 | {"dynamic_img_size": False}, False),
    "eva_after_norms": (Eva, {"use_post_norm": True}, True),
    "dinov3": (Eva, DINOV3, True),
    "dinov3_large": (Eva, DINOV3 | {"swiglu_mlp": True, "global_pool": "avg", "use_fc_norm": True}, True),
    "rope_without_class_token": (Eva, DINOV3 | {"class_token": False, "global_pool": "avg", "num_reg_tokens": 0}, True),
    "rope_mixed": (Eva, MIXED, True),
    "rope_mixed_ape": (Eva, MIXED | {"use_abs_pos_emb": True, "no_embed_class": True}, True),
    "perception": (Eva, PERCEPTION, True),
    "beit": (Beit, {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.3}, False),
    "beit_pretraining": (Beit, {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "global_pool": ""}, False),
    "beit_absolute": (Beit, {"global_pool": "token"}, False),
    "swin": (SwinTransformer, {"strict_img_size": False}, True),
    "swin_of_one_size": (SwinTransformer, {}, False),
}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": (2, 1, 2), "num_heads": (1, 2, 2), "window_size": 4}
FLAT = [name for name in NETWORKS if not name.startswith("swin")]
SOME_PATCHES = [name for name in FLAT if name not in ("beit", "beit_pretraining", "vit_on_convolutions")]
ANY_SIZE = [name for name, (_, _, any_size) in NETWORKS.items() if any_size]


def network(name: str, **changes: object) -> TokenBackbone:
    """The network `name` with random weights in double precision."""
    kind, flags, _ = NETWORKS[name]
    of_kind = {VisionTransformer: ANY, Eva: ANY, Beit: {}, SwinTransformer: SWIN}[kind]
    torch.manual_seed(0)
    model = kind(**{**(SIZE if kind is SwinTransformer else VIT), **of_kind, **flags, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return TokenBackbone(model.double()).eval()
