"""Few-shot accuracy: logistic regression on the frozen features of a few labelled images, drawn several times.

As MSN evaluates (Assran et al., 2022, https://arxiv.org/abs/2204.07141): 1, 2, 5 images of each class and 1 % of them,
features centred and of length 1, an L2-penalised logistic regression without bias whose penalty is not tuned.
`classifier=centroid` takes the nearest class mean of centred features instead (Wang et al., 2019, SimpleShot, CL2N,
https://arxiv.org/abs/1911.04623).
"""

from __future__ import annotations

import re
import warnings
from statistics import mean, pstdev
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError, Seed
from ssl_pipeline.eval.accuracy import top_k_hits
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import mean_interval
from ssl_pipeline.eval.labelled import LabelledImages, draw_per_class, open_labelled, say
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.protocol import EvaluationConfig, LabelledFeatures, Measured, conclude, measure_models
from ssl_pipeline.eval.search.neighbours import require_finite
from ssl_pipeline.files import JSON

MAX_ITERATIONS, TOLERANCE = 1000, 1e-6  # of L-BFGS; at the usual 1e-4 it stops while labels still change

# Axes: M training images that are drawn, N test images, D feature dimensions, C classes.


class FewShotConfig(EvaluationConfig):
    """Accuracy of frozen features from a few labelled images of each class: mean and spread of several draws."""

    per_class: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2, 5, 10)
    """Labelled images of each class; those above the size of a class are left out, with a warning."""
    fractions: tuple[str, ...] = ("1%", "10%")
    """Shares of each class, rounded, at least one image."""
    draws: Annotated[int, Field(gt=0, le=1000)] = 5
    """How often the labelled images are drawn; the mean is reported, and the standard deviation over draws."""
    seed: Seed = 0
    """Seed of the first draw; the next draws take the next seeds. Within a draw, fewer images are a subset of more."""
    classifier: Literal["logistic", "centroid"] = "logistic"
    """`logistic` as MSN evaluates, `centroid` the nearest class mean."""
    inverse_penalty: Annotated[float, Field(gt=0)] = 4000.0
    """`logistic`: scikit-learn's C; 1 / 0.00025 is the default of MSN's evaluation."""

    @field_validator("fractions")
    @classmethod
    def _fractions_are_shares(cls, fractions: tuple[str, ...]) -> tuple[str, ...]:
        for fraction in fractions:
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", fraction)
            if not (match and 0 < float(match[1]) <= 100):
                raise ValueError(f"fractions must be shares above 0% and up to 100%, such as 1%,10%. Got {fraction}.")
        return fractions


def few_shot_scores(
    train_MD: Tensor, labels_M: Tensor, test_ND: Tensor, *, num_classes: int, config: FewShotConfig
) -> Tensor:
    """Class scores (N, C) of the test images; -inf for classes of which no image was drawn.

    logistic: each row less its own mean, of length 1, as MSN prepares them. centroid: less the mean of the drawn
    images, of length 1, the score of a class is minus the squared distance to the mean of its images.
    """
    present = labels_M.unique()
    scores_NC = torch.full((len(test_ND), num_classes), -torch.inf)
    if config.classifier == "centroid":
        centre_D = train_MD.mean(dim=0)
        train_MD, test_ND = (normalize(part - centre_D, dim=1) for part in (train_MD, test_ND))
        means = torch.stack([train_MD[labels_M == label].mean(dim=0) for label in present])
        scores_NC[:, present] = -torch.cdist(test_ND, means).square()
        return scores_NC
    train_MD, test_ND = (normalize(part - part.mean(dim=1, keepdim=True), dim=1) for part in (train_MD, test_ND))
    weights_CD = _logistic_weights(train_MD, labels_M, inverse_penalty=config.inverse_penalty)
    found = test_ND @ weights_CD.T
    scores_NC[:, present] = found if len(weights_CD) > 1 else torch.cat([-found, found], dim=1)
    return scores_NC


def _logistic_weights(train_MD: Tensor, labels_M: Tensor, *, inverse_penalty: float) -> Tensor:
    """Weights of each class that has images, ascending; of two classes only those of the second."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=inverse_penalty, max_iter=MAX_ITERATIONS, tol=TOLERANCE, fit_intercept=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable classes: the labels are decided long before
        classifier.fit(train_MD.double().numpy(), labels_M.numpy())
    return torch.from_numpy(classifier.coef_).float()


def few_shot(features: LabelledFeatures, config: FewShotConfig) -> Found:
    """The accuracy for each number of labelled images: mean and spread over draws, interval over test images."""
    require_finite(features.train, task="Few-shot evaluation", what="training images")
    require_finite(features.test, task="Few-shot evaluation", what="test images")
    measures, by_draw = [], {}
    counts: tuple[int | str, ...] = (*config.per_class, *config.fractions)
    for count in counts:
        called = f"{count} per class" if isinstance(count, int) else f"{count} of the labels"
        hits_SN = torch.stack(
            [
                _hits(features, count, seed=config.seed + draw, config=config)
                for draw in counted(range(config.draws), f"few-shot, {called}", unit="draw")
            ]
        )
        top1 = [100.0 * share for share in hits_SN.double().mean(dim=1).tolist()]
        name = f"top1_{count}_per_class" if isinstance(count, int) else f"top1_{count.rstrip('% ')}_percent"
        measures.append(
            Measure(
                name,
                f"top-1, {called}",
                mean(top1),
                interval=mean_interval(100.0 * hits_SN.double().mean(dim=0)),
                spread=pstdev(top1) if config.draws > 1 else None,
            )
        )
        by_draw[name] = top1
    return Found(tuple(measures), {"by_draw": by_draw})


def _hits(features: LabelledFeatures, count: int | str, *, seed: int, config: FewShotConfig) -> Tensor:
    """Whether each test image (N,) is recognised."""
    drawn = torch.from_numpy(draw_per_class(features.train_labels, count, seed=seed))
    scores_NC = few_shot_scores(
        features.train[drawn],
        features.train_labels[drawn],
        features.test,
        num_classes=features.num_classes,
        config=config,
    )
    return top_k_hits(scores_NC, features.test_labels, k=1)


def evaluate_few_shot(config: FewShotConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    images = open_labelled(config.train, config.test, task="few-shot evaluation")
    config = fitted(config, images)
    return measure_models(config, images, lambda features: few_shot(features, config)), few_shot_settings(config)


def few_shot_settings(config: FewShotConfig) -> dict[str, JSON]:
    """The evaluator's part of the protocol."""
    return {
        "classifier": config.classifier,
        "per_class": config.per_class,
        "fractions": config.fractions,
        "draws": config.draws,
        "seed": config.seed,
        **({"inverse_penalty": config.inverse_penalty} if config.classifier == "logistic" else {}),
    }


def fitted(config: FewShotConfig, images: LabelledImages) -> FewShotConfig:
    """With the numbers that every class has, a warning for the others; ConfigError if nothing is left to measure."""
    _, counts = images.train_labels.unique(return_counts=True)
    fewest = int(counts.min())
    fitting = tuple(count for count in config.per_class if count <= fewest)
    if left_out := [str(count) for count in config.per_class if count > fewest]:
        said = f"per_class={','.join(left_out)} is more than {images.train.called} has of one of its classes: {fewest}"
        if not fitting and not config.fractions:
            raise ConfigError(f"{said}. Take at most that many.")
        say([f"{said}; left out."])
    if not fitting and not config.fractions:
        raise ConfigError("Few-shot evaluation needs per_class=1,2,... or fractions=1%,... Got neither.")
    return config.model_copy(update={"per_class": fitting})


def main(config: FewShotConfig) -> None:
    measured, settings = evaluate_few_shot(config)
    conclude(config, "few_shot", measured, settings)


def command(name: str = "python -m eval.few_shot") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(FewShotConfig, main, command=name)
