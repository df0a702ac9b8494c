"""Gram anchoring (DINOv3, Simeoni et al., 2025, https://arxiv.org/abs/2508.10104): an earlier teacher that is kept."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.backbones.weights import load_source
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import Config, ConfigError, InRange
from ssl_pipeline.losses import gram_anchoring_loss
from ssl_pipeline.modules.masked_tokens import MaskedPatches
from ssl_pipeline.modules.teacher import Snapshot
from ssl_pipeline.schedule import Duration, Progress, Schedule

# Axes: N large crops, L patches of each, D dimensions, M masked patches.


class GramConfig(Config):
    """Gram anchoring: the student's patches are to be as alike as those of an earlier teacher.

    It sees the crops of augment.global (`crops_of: global`) at the size of augment.gram.
    """

    weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=2.0)
    """Weight of the loss (`loss_weight_schedule`)."""
    teacher: str | None = None
    """A file with the weights of the Gram teacher's backbone, which then stays fixed; or set first."""
    first: Duration | None = None
    """After how many steps the teacher becomes the Gram teacher; the loss counts from then on (`it_first_update`)."""
    every: Duration | None = None
    """After how many more steps it is taken again, and so on; null: never (`update_frequency`)."""
    max_updates: int | None = Field(None, ge=0)
    """How often it is taken again at most; null: no limit."""
    normalize: bool = True
    """Whether patches are compared by their cosine (`normalized`)."""
    per_image: bool = True
    """Whether patches are compared within an image (`img_level`), or all of a process's batch."""
    tokens: Literal["all", "masked"] = "all"
    """Which patches of the large crops are compared (`tokens_used`)."""
    negatives: Literal["kept", "removed", "teacher_removed"] = "kept"
    """Whether negative similarities count as 0 (`remove_neg`), or those of the teacher (`remove_only_teacher_neg`)."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How the Gram teacher's patches are brought to the student's grid."""
    antialias: bool = False
    """Whether they are smoothed for that."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> GramConfig:
        if (self.teacher is None) == (self.first is None):
            got = "neither" if self.teacher is None else "both"
            raise ValueError(
                "Gram anchoring needs a Gram teacher: set method.gram.first, after how many steps the teacher is kept "
                f"as such (0 with backbone.weights), or method.gram.teacher=FILE. Got {got}."
            )
        if self.every is not None and (self.first is None or self.every == 0):
            raise ValueError("every is how many steps after method.gram.first it is taken again; at least 1.")
        if self.max_updates is not None and self.every is None:
            raise ValueError("max_updates has no effect without method.gram.every. Leave it out.")
        if self.tokens == "masked" and self.per_image:
            raise ValueError("tokens=masked needs per_image=false: images have different numbers of masked patches.")
        return self


class GramTeacher(nn.Module):
    """A frozen copy of the teacher's backbone as it once was; saved with the run, unless it came from a file."""

    def __init__(self, config: GramConfig, backbone: TokenBackbone) -> None:
        super().__init__()
        self.config = config
        if config.teacher is None:
            self.snapshot = Snapshot(backbone)
            return
        file = Path(config.teacher)
        if not file.is_file():
            raise ConfigError(f"method.gram.teacher must be a file of weights. There is no '{file}'.")
        loaded = deepcopy(backbone)
        try:
            load_source(loaded.model, str(file), network=None)
        except ConfigError as error:
            raise ConfigError(f"method.gram.teacher: {error}") from None
        self.snapshot = Snapshot(loaded, source=file)

    def loss(self, student_NLD: Tensor, batch: Batch, masked: MaskedPatches, progress: Progress) -> Tensor:
        """`gram_anchoring_loss` of the student's patches of the large crops; 0 as long as there is no Gram teacher."""
        config, snapshot = self.config, self.snapshot
        if config.first is not None and progress.step < config.first.steps(progress):
            return student_NLD.new_zeros((), dtype=torch.promote_types(student_NLD.dtype, torch.float32))
        network = snapshot.network
        side = batch.views["global"].shape[-1] // network.patch_size
        with torch.no_grad():
            tokens = network.tokens(batch.views["gram"].flatten(0, 1))
            map_NDRC = tokens.patch_map()
            if tokens.grid != (side, side):
                antialias = self.config.antialias
                map_NDRC = F.interpolate(map_NDRC, size=(side, side), mode=config.resize, antialias=antialias)
            teacher_NLD = map_NDRC.flatten(2).transpose(1, 2)
        if config.tokens == "masked":
            student_NLD, teacher_NLD = masked.take(student_NLD)[None], masked.take(teacher_NLD)[None]
        elif not config.per_image:
            student_NLD, teacher_NLD = student_NLD.flatten(0, 1)[None], teacher_NLD.flatten(0, 1)[None]
        return gram_anchoring_loss(student_NLD, teacher_NLD, normalize=config.normalize, negatives=config.negatives)

    def update(self, teacher: nn.Module, progress: Progress) -> None:
        """Take the teacher as it is now, if it is time; `progress` is that of the step just made."""
        config = self.config
        if config.first is None:
            return
        since = progress.step + 1 - config.first.steps(progress)
        every = config.every.steps(progress) if config.every is not None else 0
        due = since == 0 or (since > 0 and every > 0 and since % every == 0)
        if due and (config.max_updates is None or since == 0 or since // every <= config.max_updates):
            self.snapshot.refresh(teacher)
