"""Learning only from labels: fine-tuning, and the baseline of the semi-supervised methods.

Layer-wise learning rates (BEiT, Bao et al., 2021, https://arxiv.org/abs/2106.08254), gradual unfreezing (ULMFiT, Howard
& Ruder, 2018, https://arxiv.org/abs/1801.06146), label smoothing (Szegedy et al., 2015,
https://arxiv.org/abs/1512.00567), mixup (Zhang et al., 2017, https://arxiv.org/abs/1710.09412) and CutMix (Yun et al.,
2019, https://arxiv.org/abs/1905.04899) on request.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_pipeline.backbones import Backbone, layers_of
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import FewLabels, FewLabelsConfig
from ssl_pipeline.modules.batch_mixing import as_targets, cutmix_global_batch, draw_for_all, mixup_global_batch
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Progress

ImagesAndTargets = tuple[Tensor, Tensor]


class SupervisedConfig(FewLabelsConfig):
    """Supervised learning: cross-entropy on labelled images, of a few (data.labelled) or of all (data.shards)."""

    name: Literal["supervised"]
    learns_from: Literal["labelled", "all"] = "labelled"
    """`labelled`: the images of data.labelled, in the group augment.weak; those of data.shards only count the epochs.
    `all`: the images of data.shards, which all need a label, in the group augment.view (fine-tuning)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a label that is spread over all classes."""
    mixup_alpha: float = Field(0.0, ge=0, le=1000)
    """mixup's Beta(alpha, alpha), a share for each image; 0: no mixup."""
    cutmix_alpha: float = Field(0.0, ge=0, le=1000)
    """CutMix's Beta(alpha, alpha), a box for each batch; 0: none. With both, a batch takes either."""
    cutmix_share: float = Field(0.5, ge=0, le=1)
    """With mixup and CutMix: how often a batch takes CutMix."""
    mixing_share: float = Field(1.0, ge=0, le=1)
    """How often a batch is mixed at all."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the one before it; the classifier has factor 1.
    Below 1, and with `unfreeze_every`, tokens and positions of a ViT have no weight decay."""
    unfreeze_every: Duration = Duration(0)
    """Gradual unfreezing: only the classifier learns for this long, and then one more layer of the backbone each time,
    from the last to the first; 0: all from the start."""
    frozen_backbone: bool = False
    """Feature extraction: the backbone stays frozen, in evaluation mode, and only the classifier learns."""
    head_batch_norm: bool = False
    """Whether batch norm without parameters comes before the classifier (MAE's linear probe); the export folds it into
    the weights."""

    @model_validator(mode="after")
    def _a_frozen_backbone_has_no_rates(self) -> SupervisedConfig:
        given = [name for name in ("layer_decay", "unfreeze_every") if name in self.model_fields_set]
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.frozen_backbone and changed:
            raise ValueError(f"{changed[0]} needs a backbone that learns. Leave it out, or frozen_backbone.")
        return self


class Supervised(FewLabels):
    """Only labelled images, a few or all, and exceptions for the layers of the backbone.

    Images are mixed over the global batch. With accumulation that is the micro-batch of all processes.
    """

    config_class = SupervisedConfig
    config: SupervisedConfig
    coupled_by = "what images are mixed with"

    def __init__(self, config: SupervisedConfig, backbone: Backbone) -> None:
        if config.frozen_backbone:
            backbone.freeze()
        super().__init__(config, backbone, head_batch_norm=config.head_batch_norm)
        beside = config.learns_from == "labelled"
        self.group = "weak" if beside else "view"
        self.needs = (Views(self.group, count=1, labelled=beside, with_labels=not beside, evaluated=True),)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        learnt = batch.labelled if self.config.learns_from == "labelled" else batch
        assert learnt is not None
        labels = learnt.labels
        images, targets = self._mixed(learnt.one(self.group), labels)
        features, (logits,) = self.pair(images)
        metrics = {
            "labelled_accuracy": accuracy(logits, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(weighted_cross_entropy(logits, targets), metrics)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets (B, classes) of which the loss is taken."""
        config = self.config
        num_classes = self.classifier.out_features
        targets = as_targets(labels, num_classes, smoothing=config.label_smoothing, dtype=images.dtype)
        both = []
        if config.mixup_alpha:
            both.append(mixup_global_batch([images], [targets], alpha=config.mixup_alpha))
        if config.cutmix_alpha:
            both.append(cutmix_global_batch([images], [targets], alpha=config.cutmix_alpha))
        choices = [(mixed, mixed_targets) for (mixed,), (mixed_targets,) in both]
        mixed = choices[0] if choices else (images, targets)
        if len(choices) == 2:
            mixed = self._either(*choices, share=1 - config.cutmix_share)
        if choices and config.mixing_share < 1:
            mixed = self._either(mixed, (images, targets), share=config.mixing_share)
        return mixed

    @staticmethod
    def _either(first: ImagesAndTargets, second: ImagesAndTargets, *, share: float) -> ImagesAndTargets:
        """The first with probability `share`, else the second; the same on all processes, and no host waits for it."""
        is_first = draw_for_all(first[0].device) < share
        images, targets = (torch.where(is_first, *both) for both in zip(first, second, strict=True))
        return images, targets

    def param_rules(self) -> tuple[ParamRule, ...]:
        """Layer by layer: a rate that shrinks towards the input, and when the layer begins to learn."""
        config = self.config
        if config.layer_decay == 1 and config.unfreeze_every.is_zero:
            return ()
        layers = layers_of(self.pair.student.backbone.model)
        return tuple(
            ParamRule(
                f"pair.student.backbone.model.{part.name}",
                lr_scale=config.layer_decay ** (layers.after - part.layer),
                frozen_for=config.unfreeze_every.times(layers.after - part.layer),
                decays=not part.is_token,
            )
            for part in layers.parts
        )
