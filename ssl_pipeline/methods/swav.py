"""SwAV (Caron et al., 2020, https://arxiv.org/abs/2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, Width
from ssl_pipeline.distributed import gather, rank, world_size
from ssl_pipeline.losses import crop_pairs, prototype_cross_entropy, prototypes_used, sinkhorn_targets
from ssl_pipeline.losses.precision import sum_dtype
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import MLPHead, Prototypes
from ssl_pipeline.modules.memory import FeatureQueue, check_queue_size
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Progress

NUM_ASSIGNED = 2  # the global crops


class SwAVConfig(Config):
    """SwAV: every crop predicts to which prototypes the large crops of its image are assigned."""

    name: Literal["swav"]
    num_prototypes: int = Field(3000, gt=1, le=2**24)
    """Prototypes that images are assigned to."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the predictions."""
    epsilon: float = Field(0.05, gt=0)
    """Smoothness of the assignment by Sinkhorn-Knopp; lower is nearer to one prototype per image."""
    sinkhorn_iterations: int = Field(3, ge=1, le=1000)
    """Iterations of Sinkhorn-Knopp."""
    queue_size: int = Field(0, ge=0, le=2**24)
    """Earlier embeddings of each large crop that are assigned together with a batch; 0: none."""
    queue_starts: Duration = Duration("15ep")
    """When the queue begins to fill; it is used once it is full."""
    freeze_prototypes_for: Duration = Duration(313)
    """How long the prototypes stay as they were initialised."""
    projector_hidden_dim: Width = 2048
    """Width of the projector's hidden layer."""
    projector_dim: Width = 128
    """Width of the embedding that is compared with the prototypes."""


class SwAV(Method):
    """A backbone, a projector and prototypes of length 1, and a queue of earlier embeddings for each large crop.

    Images are assigned over the global batch. With accumulation that is the micro-batch of all processes:
    k micro-batches are not one big batch here.
    """

    config_class = SwAVConfig
    coupled_by = "the assignment of images to prototypes"
    needs = (Views("global", count=NUM_ASSIGNED), Views("local", optional=True))
    projected = ("prototypes.weight",)

    def __init__(self, config: SwAVConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = (backbone.embed_dim, config.projector_hidden_dim, config.projector_dim)
        self.encoder = Encoder(backbone, MLPHead(dims, bias=True, last_bias=True))
        self.prototypes = Prototypes(config.projector_dim, config.num_prototypes)
        self.queues = nn.ModuleList(
            FeatureQueue(config.queue_size, config.projector_dim)
            for _ in range(NUM_ASSIGNED if config.queue_size else 0)
        )

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def prepare(self, facts: RunFacts) -> None:
        brought = f"the global batch, {facts.global_batch}, or 0"
        check_queue_size(self.config.queue_size, facts.global_batch, multiple_of=brought)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        num_images = batch.views["global"].shape[1]
        # the backbone once per resolution, the head once for all, as the official code
        crops = [batch.views[name].flatten(0, 1) for name in ("global", "local") if name in batch.views]
        features = torch.cat([self.encoder.backbone(views) for views in crops])
        projections = self.encoder.head(features)
        # scores are divided by epsilon: in half precision the codes would be off by a tenth
        with torch.autocast(features.device.type, enabled=False):
            student_ND = F.normalize(projections.to(sum_dtype(projections)), dim=1)
            assigned_MD = student_ND[: NUM_ASSIGNED * num_images].detach()
            targets = sinkhorn_targets(
                assigned_MD,
                self.prototypes.weight,
                epsilon=self.config.epsilon,
                num_iterations=self.config.sinkhorn_iterations,
                num_parts=NUM_ASSIGNED,
                queues_AQD=self._share_of_queues(),
            )
            weights_N, mix_ST = crop_pairs(student_ND, assigned_MD, num_images=num_images)
            loss, target_entropy = prototype_cross_entropy(
                student_ND,
                self.prototypes.weight,
                targets,
                weights_N,
                temperature=self.config.temperature,
                mix_ST=mix_ST,
            )
        metrics = {"target_entropy": target_entropy, "feature_std": feature_std(features[:num_images], progress)}
        if progress.is_logged:
            metrics["prototypes_used"] = prototypes_used(targets)
        return StepOutput(loss, metrics, {"embeddings": assigned_MD.unflatten(0, (NUM_ASSIGNED, -1))})

    def _share_of_queues(self) -> Tensor | None:
        """(2, Q / processes, D): the rows of this process, once the queues are full; Sinkhorn-Knopp sees all."""
        queues = [queue for queue in self.queues if isinstance(queue, FeatureQueue) and queue.full]
        return torch.stack([queue.features.chunk(world_size())[rank()] for queue in queues]) if queues else None

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.prototypes.normalize_()
        if progress.step < self.config.queue_starts.steps(progress):
            return
        for crop, queue in enumerate(self.queues):
            assert isinstance(queue, FeatureQueue)
            # in the order of the global batch: micro-batch, then rank
            queue.enqueue(torch.cat([gather(carry["embeddings"][crop]) for carry in carries]))

    def param_rules(self) -> tuple[ParamRule, ...]:
        return (ParamRule("prototypes.", frozen_for=self.config.freeze_prototypes_for),)
