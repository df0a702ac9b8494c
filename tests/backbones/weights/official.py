"""Tiny checkpoints under the names that the official code of each method gives them, from a network of timm."""

from __future__ import annotations

import argparse
import re

import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
RESNET = "test_resnet"
RESNET_ARGUMENTS = {"stem_type": ""}


def random_network(name: str, seed: int = 0, **arguments: object) -> nn.Module:
    """A timm network in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(drawn.abs() + 0.5 if "running_var" in name else drawn)
    return model


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """The state under other names, by regular expressions applied in turn."""
    names = list(state)
    for pattern, replacement in rules:
        names = [re.sub(pattern, replacement, name) for name in names]
    return dict(zip(names, state.values(), strict=True))


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def split(state: State, template: str, *, key_bias: bool = True) -> State:
    """Attention in three parts: `template` has {part} for query, key and value."""
    found: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*attn\.)qkv\.(weight|bias)", name)
        if match is None:
            found[name] = tensor
            continue
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            if part != "k" or match[2] == "weight" or key_bias:
                found[match[1] + template.format(part=part) + match[2]] = third
    return found


def mlp_head(prefix: str = "head.") -> State:
    return {f"{prefix}mlp.0.weight": torch.ones(16, 48), f"{prefix}last_layer.weight_v": torch.ones(8, 16)}


def optimizer() -> dict[str, object]:
    return {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def dino(state: State, student: State) -> dict[str, object]:
    """main_dino.py: student and teacher with their heads."""
    return {
        "student": below("module.backbone.", student) | below("module.", mlp_head()),
        "teacher": below("backbone.", state) | mlp_head(),
        "optimizer": optimizer(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def ibot(state: State, student: State) -> dict[str, object]:
    """main_ibot.py: the student has a token for masked patches; gammas as BEiT's where there is LayerScale."""
    masked = {"masked_embed": torch.ones(1, 48)}
    spelt = [renamed(one, (r"ls([12])\.gamma$", r"gamma_\1")) for one in (state, student)]
    return {
        "student": below("module.backbone.", spelt[1] | masked) | below("module.", mlp_head()),
        "teacher": below("module.backbone.", spelt[0] | masked) | below("module.", mlp_head()),
        "optimizer": optimizer(),
        "ibot_loss": {"center": torch.zeros(1, 1, 8), "center2": torch.zeros(1, 1, 8)},
    }


def mae(state: State) -> dict[str, object]:
    """main_pretrain.py of MAE, with the decoder."""
    decoder = {
        "mask_token": torch.ones(1, 1, 16),
        "decoder_pos_embed": torch.ones(1, 17, 16),
        "decoder_embed.weight": torch.ones(16, 48),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(48, 16),
        "decoder_norm.weight": torch.ones(16),
        "decoder_pred.bias": torch.ones(192),
    }
    return {"model": state | decoder, "optimizer": optimizer(), "scaler": {"scale": torch.ones(1)}, "epoch": 3}


def moco_v3_vit(state: State, momentum: State) -> dict[str, object]:
    head = {"head.0.weight": torch.ones(8, 48), "head.1.running_mean": torch.ones(8)}
    networks = below("module.base_encoder.", state | head) | below("module.momentum_encoder.", momentum | head)
    return {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": networks | {"module.predictor.0.weight": torch.ones(8, 8)},
        "optimizer": optimizer(),
    }


def moco_v2(state: State, momentum: State) -> dict[str, object]:
    head = {"fc.0.weight": torch.ones(8, 8), "fc.2.bias": torch.ones(8)}
    queue = {"module.queue": torch.ones(8, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    networks = below("module.encoder_q.", state | head) | below("module.encoder_k.", momentum | head)
    return {"epoch": 200, "arch": "resnet50", "state_dict": networks | queue, "optimizer": optimizer()}


def simsiam(state: State) -> dict[str, object]:
    head = {"fc.0.weight": torch.ones(8, 8), "fc.6.bias": torch.ones(8)}
    beside = {"module.predictor.0.weight": torch.ones(8, 8)}
    return {"epoch": 100, "arch": "resnet50", "state_dict": below("module.encoder.", state | head) | beside}


def swav(state: State) -> State:
    """hubconf.py: the file has no table around its tensors."""
    heads = {"projection_head.0.weight": torch.ones(8, 8), "prototypes.weight": torch.ones(8, 8)}
    return below("module.", state | heads)


def byol_pytorch(state: State, target: State) -> State:
    """lucidrains/byol-pytorch, the whole learner."""
    projector = {"projector.0.weight": torch.ones(8, 8)}
    online = below("online_encoder.", below("net.", state) | projector)
    targets = below("target_encoder.", below("net.", target) | projector)
    return online | targets | {"online_predictor.0.weight": torch.ones(8, 8)}


def in_a_row(state: State) -> State:
    """A ResNet as nn.Sequential(*resnet.children())."""
    rules = (
        (r"^conv1\.", "0."),
        (r"^bn1\.", "1."),
        *((rf"^layer{stage}\.", f"{stage + 3}.") for stage in (1, 2, 3, 4)),
    )
    return renamed(state, *rules)


def byol_sthalles(state: State, target: State) -> dict[str, object]:
    """sthalles/PyTorch-BYOL: the ResNet is a Sequential, and the projector is spelt so."""
    head = {"projetion.net.0.weight": torch.ones(8, 8)}
    return {
        "online_network_state_dict": below("encoder.", in_a_row(state)) | head,
        "target_network_state_dict": below("encoder.", in_a_row(target)) | head,
        "optimizer_state_dict": optimizer(),
    }


def byol_converted(state: State) -> State:
    """ajtejankar/byol-convert: DeepMind's weights, which count no batches."""
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


def dinov2(state: State, *, registers: int = 0) -> State:
    """hubconf.py: registers have no position, the class token has one."""
    found = renamed(state, ("^reg_token$", "register_tokens"))
    if registers:
        first = torch.full((1, 1, 48), 0.1)
        found["cls_token"] = found["cls_token"] - first
        found["pos_embed"] = torch.cat([first, found["pos_embed"]], dim=1)
    return found | {"mask_token": torch.ones(1, 48)}


def dinov2_training(state: State, *, registers: int = 0) -> dict[str, object]:
    """teacher_checkpoint.pth: blocks in chunks."""
    chunked = renamed(dinov2(state, registers=registers), (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    heads = {"dino_head.mlp.0.weight": torch.ones(8, 48), "ibot_head.mlp.0.weight": torch.ones(8, 48)}
    return {"teacher": below("backbone.", chunked) | heads}


def dinov3(state: State) -> State:
    """hubconf.py: one bias for query, key and value, with a mask over the key's; periods of the rotation."""
    found: State = {}
    for name, tensor in renamed(state, ("^reg_token$", "storage_tokens"), (r"gamma_([12])$", r"ls\1.gamma")).items():
        if name.endswith("attn.v_bias"):
            continue
        if name.endswith("attn.q_bias"):
            stem, value = name.removesuffix("q_bias"), state[name.replace("q_bias", "v_bias")]
            found[f"{stem}qkv.bias"] = torch.cat([tensor, torch.full_like(tensor, 7.0), value])
            ones = torch.ones_like(tensor)
            found[f"{stem}qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
            continue
        found[name] = tensor
    swiglu = ((r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3"))
    gated = any("fc1_g" in name for name in found)
    found = renamed(found, *(swiglu if gated else ()))
    return found | {
        "mask_token": torch.ones(1, 48),
        "rope_embed.periods": torch.ones(4),
        "local_cls_norm.bias": torch.ones(48),
    }


def hugging_face_dinov3(state: State, *, gated: bool = False) -> State:
    """transformers' DINOv3ViTModel: the key has no bias."""
    mlp = (r"mlp\.fc1_g", "mlp.gate_proj") if gated else (r"mlp\.fc1\.", "mlp.up_proj.")
    return renamed(
        split(state, "{part}_proj.", key_bias=False),
        (r"^(cls_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"attn\.([qv])_bias$", r"attn.\1_proj.bias"),
        (r"attn\.proj\.", "attn.o_proj."),
        (r"attn\.", "attention."),
        (r"gamma_([12])$", r"layer_scale\1.lambda1"),
        mlp,
        (r"mlp\.fc1_x", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
        (r"^blocks\.", "layer."),
    ) | {"embeddings.mask_token": torch.ones(1, 1, 48)}


def hugging_face_vit(state: State, *, prefix: str = "", layer_scale: str = "", key_bias: bool = True) -> State:
    """transformers' ViTModel; with `layer_scale` Dinov2Model, whose norms and MLP have other names."""
    inner = (
        ((r"ls([12])\.gamma$", r"layer_scale\1.lambda1"),)
        if layer_scale
        else (
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"mlp\.fc1\.", "intermediate.dense."),
            (r"mlp\.fc2\.", "output.dense."),
        )
    )
    names = {"q": "query", "k": "key", "v": "value"}
    found = split(state, "{part}.", key_bias=key_bias)
    found = renamed(
        found,
        *inner,
        *((rf"attn\.{part}(?:\.|_)(weight|bias)$", rf"attention.attention.{word}.\1") for part, word in names.items()),
        (r"attn\.proj\.", "attention.output.dense."),
        (r"attn\.relative_position", "attention.attention.relative_position_bias.relative_position"),
        (r"gamma_([12])$", r"lambda_\1"),
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^register_tokens$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^rel_pos_bias\.", "encoder.relative_position_bias."),
        (r"^blocks\.", "encoder.layer."),
        (r"^norm\.", "layernorm."),
        (r"^fc_norm\.", "pooler.layernorm."),
    )
    return below(prefix, found) | {"classifier.weight": torch.ones(10, 48)}


def hugging_face_swin(state: State) -> State:
    """transformers' SwinForImageClassification."""
    names = {"q": "query", "k": "key", "v": "value"}
    found = renamed(
        split(official_swin(state), "{part}."),
        *((rf"attn\.{part}\.", f"attention.self.{word}.") for part, word in names.items()),
        (r"attn\.proj\.", "attention.output.dense."),
        (r"attn\.", "attention.self."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"mlp\.fc1\.", "intermediate.dense."),
        (r"mlp\.fc2\.", "output.dense."),
        (r"^layers\.", "encoder.layers."),
        (r"^norm\.", "layernorm."),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
    )
    return below("swin.", found) | {"classifier.weight": torch.ones(10, 192)}


def beit(state: State) -> dict[str, object]:
    """run_beit_pretraining.py and run_class_finetuning.py: index tables are in the file."""
    indices = {
        re.sub("bias_table$", "index", name): torch.zeros(17, 17, dtype=torch.long)
        for name in state
        if name.endswith("relative_position_bias_table")
    }
    return {"model": state | indices | {"mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(8, 48)}}


def simmim(state: State) -> dict[str, object]:
    """main_simmim.py: the encoder and a decoder of one convolution."""
    indices = {
        re.sub("bias_table$", "index", name): torch.zeros(4, 4, dtype=torch.long)
        for name in state
        if name.endswith("relative_position_bias_table")
    }
    encoder = below("encoder.", state | indices | {"mask_token": torch.ones(1, 1, 48)})
    decoder = {"decoder.0.weight": torch.ones(12, 48, 1, 1), "decoder.0.bias": torch.ones(12)}
    return {"model": encoder | decoder, "optimizer": optimizer(), "lr_scheduler": {"last": torch.ones(1)}, "epoch": 800}


def official_swin(state: State) -> State:
    """Patches are merged at the end of a stage, not at the start of the next."""
    return renamed(
        state, *((rf"^layers\.{stage}\.downsample", f"layers.{stage - 1}.downsample") for stage in (1, 2, 3))
    )


def official_convnext(state: State) -> State:
    """facebookresearch/ConvNeXt and DINOv3's distilled ConvNeXts, with a norm for each stage."""
    found = renamed(
        state,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."),
    )
    return found | {"norms.3.weight": found["norm.weight"]}
