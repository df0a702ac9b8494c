"""A classifier in training with the moving average that is evaluated: what semi-supervised methods are built on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, NormalisedLinear
from ssl_pipeline.batch import RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.teacher import Teacher


class ClassifierPair(nn.Module):
    """A student, backbone with a linear classifier, and its moving average, the teacher.

    num_classes: None until `prepare` sets it.
    head_batch_norm: whether batch norm comes before the classifier.
    buffers: what becomes of the teacher's batch-norm statistics, as in Teacher.
    """

    student: Encoder[nn.Linear]
    teacher: Teacher[Encoder[nn.Linear]]

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int | None,
        *,
        head_batch_norm: bool = False,
        buffers: Literal["own", "copy"] = "copy",
    ) -> None:
        super().__init__()
        self._head_class = NormalisedLinear if head_batch_norm else nn.Linear
        self.buffer_source = buffers
        self._backbone = (backbone,)  # not a part of this module until its classifier is made
        if num_classes is not None:
            self._build(num_classes)

    def prepare(self, facts: RunFacts, num_classes: int | None, *, one_pass: Sequence[str]) -> int:
        """Make the classifier if the number of classes was not known, and return that number.

        num_classes: what the settings say, None for that of the labelled images.
        one_pass: the groups of views that go through the network together, and so need one size.

        Raises ConfigError if settings, labelled images and views do not fit each other.
        """
        known = facts.classes(num_classes)
        if num_classes is None:
            self._build(known)
        sizes = {name: facts.view_sizes[name] for name in one_pass}
        if len(set(sizes.values())) > 1:
            names = " and ".join(f"augment.{name}.size" for name in sizes)
            found = " and ".join(" or ".join(map(str, of_group)) for of_group in sizes.values())
            raise ConfigError(f"{names} must be the same. Got {found}.")
        return known

    def _build(self, num_classes: int) -> None:
        (backbone,) = self._backbone
        classifier = self._head_class(backbone.embed_dim, num_classes)
        nn.init.xavier_normal_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self.student = Encoder(backbone, classifier)
        self.teacher = Teacher(self.student, buffers=self.buffer_source)

    def forward(self, *parts: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Parts (B, C, H, W) -> the student's features of all images, and the logits (B, classes) of each part.

        In one pass, so that batch norm sees one distribution.
        """
        features = self.student.backbone(torch.cat(parts))
        return features, self.student.head(features).split([len(part) for part in parts])

    def update(self, momentum: float) -> None:
        """Let the teacher follow the student."""
        self.teacher.update(self.student, momentum)

    def backbones(self) -> dict[str, Backbone]:
        """The teacher's first: it is what is evaluated."""
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    @property
    def classifier(self) -> nn.Linear:
        """The teacher's."""
        return self.teacher.network.head


@torch.no_grad()
def are_right(guesses_N: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether each guess is the label; labels are (N,), -1 for none, or soft (N, C), a row of 0 for none."""
    if labels.ndim == 2:
        weights, labels = labels.max(dim=1)
        return (guesses_N == labels) & (weights > 0)
    return guesses_N == labels


@torch.no_grad()
def accuracy(logits_NC: Tensor, labels: Tensor) -> Tensor:
    """(): the share of rows whose largest logit is that of the label; labels as in `are_right`."""
    return are_right(logits_NC.argmax(dim=1), labels).float().mean()
