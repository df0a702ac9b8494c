"""What a run has logged, as one series for each name, and what the names mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ssl_pipeline.config import ConfigError

AXES = ("step", "position", "images", "epoch")  # they say where a row is
MONITORED = {  # title, and whether more is better
    "knn_top1": ("k-NN top-1 (%)", True),
    "knn_top5": ("k-NN top-5 (%)", True),
    "classifier_top1": ("classifier top-1 (%)", True),
    "classifier_top5": ("classifier top-5 (%)", True),
    "rankme": ("RankMe", True),
    "rankme_percent": ("RankMe (% of the largest possible)", True),
    "alpha": ("alpha-ReQ", None),
}
FIRST = ("loss", *MONITORED, "learning_rate", "feature_std", "images_per_second", "data_wait", "gradient_norm")
READING = MappingProxyType(
    {
        "loss": "What training makes smaller. Its size means nothing across methods; DINO's may rise for a while.",
        "learning_rate": "The rate of the step, after its scaling with the batch.",
        "gradient_norm": "The length of the gradient before clipping. Peaks of ten times its usual size are a warning.",
        "images_per_second": "Images of all processes per second since the last row, without monitors and checkpoints.",
        "data_wait": "The share of the time that training waited for images. Above 0.1 the loader limits the run.",
        "feature_std": "How spread out the features of a batch are: 1 is even, near 0 all look alike (collapse).",
        "knn_top1": "How often the nearest neighbours of a labelled image vote for its class. It should rise.",
        "knn_top5": "The same, if the class is among the five best.",
        "classifier_top1": "Accuracy of the method's own classifier on labelled images it was not trained on.",
        "classifier_top5": "The same, if the class is among the five best.",
        "rankme": "How many dimensions the features really use. It should rise or stay; a fall is slow collapse.",
        "rankme_percent": "The same in percent of the possible maximum.",
        "alpha": "How fast the spectrum of the features falls; good features are near 1.",
        "target_entropy": "How undecided the teacher's targets are: ln K carries no information, 0 is certain.",
        "patch_target_entropy": "The same for the targets of masked patches.",
        "prototypes_used": "The share of prototypes among the targets of a batch. One for all images is collapse.",
        "class_loss": "The part of the loss on whole images.",
        "patch_loss": "The part of the loss on masked patches.",
        "koleo": "How unevenly the features of a batch are spread (KoLeo); smaller is more even.",
        "gram": "How far the similarities of patches are from those of the Gram teacher.",
        "variance": "VICReg: how far dimensions fall short of a deviation of 1. Near 0 is good.",
        "invariance": "VICReg: how far two views of an image are apart.",
        "covariance": "VICReg: how much dimensions repeat each other.",
        "token_accuracy": "BEiT: how often the code of a masked patch is guessed.",
        "class_cosine": "How similar student and teacher are on whole images; 1 is the same.",
        "patch_cosine": "The same for patches.",
        "reconstruction": "The part of the loss on the predicted pixels.",
        "kl": "How far the codes are from being used evenly.",
        "codes_used": "How many codes are the most likely of some cell.",
        "code_perplexity": "The effective number of codes in use; few of many is collapse.",
        "kept": "The share of unlabelled images whose guess is confident enough to learn from. It should rise.",
        "kept_right": "How many of these guesses are right, where the images have labels.",
        "unlabelled_right": "How many guesses on unlabelled images are right, where they have labels.",
        "guess_right": "How many guesses on unlabelled images are right, where they have labels.",
        "guess_confidence": "The mean probability of the guessed class.",
        "teacher_right": "How many of the teacher's guesses on unlabelled images are right.",
        "target_right": "How many of the targets that are averaged over epochs are right, where there are labels.",
        "labelled_accuracy": "Accuracy on the labelled images of the batch. 1 early in a run means memorising.",
        "labelled_loss": "The part of the loss on labelled images.",
        "unlabelled_loss": "The part of the loss on unlabelled images.",
        "consistency": "How far the guesses for two views of an image are apart.",
        "threshold": "How confident a guess must be to be learnt from; it follows the confidence of the network.",
        "fairness": "FreeMatch: how unevenly the guesses are spread over the classes.",
        "confidence_mean": "SoftMatch: the mean confidence of guesses, around which their weight falls.",
        "confidence_std": "SoftMatch: how far the confidence is spread; smaller lets fewer uncertain guesses count.",
        "rotation_loss": "ReMixMatch: the part of the loss on predicting an image's rotation.",
        "agreement": "How often both networks guess the same class.",
    }
)
"""How each metric is read; docs/report.md has them as a table."""


@dataclass(frozen=True)
class Series:
    """A number that was logged at several steps, ascending."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def title(self) -> str:
        return title_of(self.name)

    @property
    def start(self) -> float | None:
        """What was measured before the first step."""
        return self.values[0] if self.steps[0] == 0 else None

    def best(self) -> tuple[float, int] | None:
        """The largest value and its step, of those of which more is better."""
        if not MONITORED.get(self.name, ("", None))[1]:
            return None
        place = max(range(len(self.values)), key=lambda number: self.values[number])
        return self.values[place], self.steps[place]


def title_of(name: str) -> str:
    return MONITORED[name][0] if name in MONITORED else name.replace("_", " ")


def read_series(run: Path) -> list[Series]:
    """All series of metrics.jsonl, loss and monitors first; empty if nothing was logged.

    A row that is cut short is the one that is being written. Raises ConfigError if no row can be read.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, Series] = {}
    rows = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows += 1
        for name, value in row.items():
            if name not in AXES and isinstance(value, int | float) and not isinstance(value, bool):
                series = found.setdefault(name, Series(name, [], []))
                series.steps.append(step)
                series.values.append(float(value))
    if lines and not rows:
        raise ConfigError(f"{path} has no row that can be read. Is {run} the directory of a run?")
    return sorted(found.values(), key=lambda series: place_of(series.name))


def place_of(name: str) -> tuple[int, str]:
    """By what series are ordered."""
    return (FIRST.index(name), "") if name in FIRST else (len(FIRST), name)
