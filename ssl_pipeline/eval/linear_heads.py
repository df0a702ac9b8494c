"""Linear classifiers on frozen features: many SGD settings trained at once, and L-BFGS for small sets."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ssl_pipeline.eval.progress import counted

MAX_ITERATIONS = 1000  # of L-BFGS
SMALL_PRODUCT = 50_000_000  # multiplications below which threads gain little, and lose 10x on a busy machine
NEARLY_ZERO = 1e-30  # probabilities up to here are none: a CPU's products take 5 times as long with denormal numbers
FEW_CLASSES = 50  # up to which softmax is faster across the settings
LARGEST_LOGITS = 2**23  # numbers of one product: 16 heads of 1,000 classes at once take 1.2x as long as two times 8
logger = logging.getLogger(__name__)

# Axes: N images, B of one batch, D feature dimensions, S settings of the sweep, C classes.


def stratified_split(labels_N: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Image numbers (kept, held out), ascending: about `fraction` of every class is held out.

    A class with two images or more gives and keeps at least one; a single image is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique().tolist():
        members = (labels_N == label).nonzero().flatten()
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out_N[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out_N).nonzero().flatten(), held_out_N.nonzero().flatten()


def train_linear_heads(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Weights (S, D, C) and biases (S, C) after SGD with momentum 0.9 and a cosine to zero, one head per setting.

    Setting s has `learning_rates[s]` and `weight_decays[s]`. Heads start at zero, see the same batches and do not touch
    one another: one that diverges becomes NaN without affecting the others. The rate in use is learning_rate *
    batch_size / 256.
    """
    batch_size = min(batch_size, len(features_ND))
    size = min(len(learning_rates), max(1, LARGEST_LOGITS // (batch_size * num_classes)))
    with _threads_for(batch_size * features_ND.shape[1] * size * num_classes):
        groups = [
            _train_together(
                features_ND,
                labels_N,
                learning_rates=learning_rates[first : first + size],
                weight_decays=weight_decays[first : first + size],
                num_classes=num_classes,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
            )
            for first in range(0, len(learning_rates), size)
        ]
    weights, biases = zip(*groups, strict=True)
    return torch.cat(weights), torch.cat(biases)


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """torch's threads as they are, or a single one for products so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL_PRODUCT else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_together(
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The same for settings whose logits fit one product: a step is (B, D) x (D, S*C) forward and one backward.

    The gradient of the mean cross-entropy is written out; only weights decay.
    """
    device, num_images = features_ND.device, len(features_ND)
    num_settings = len(learning_rates)
    rates, decays = (  # one per column
        features_ND.new_tensor(list(values)).repeat_interleave(num_classes)
        for values in (learning_rates, weight_decays)
    )
    rates *= batch_size / 256
    decaying = any(weight_decays)
    weights = features_ND.new_zeros(features_ND.shape[1], num_settings * num_classes)
    biases = features_ND.new_zeros(num_settings * num_classes)
    weight_momenta, bias_momenta = torch.zeros_like(weights), torch.zeros_like(biases)

    generator = torch.Generator().manual_seed(seed)
    total_steps = epochs * math.ceil(num_images / batch_size)
    step = 0
    for _ in counted(range(epochs), f"linear probe, {num_settings} settings", unit="epoch"):
        order = torch.randperm(num_images, generator=generator).to(device)
        for rows in order.split(batch_size):
            features_BD = features_ND[rows]
            logits = torch.addmm(biases, features_BD, weights).unflatten(1, (num_settings, num_classes))
            gradients = threshold(_softmax(logits), NEARLY_ZERO, 0.0)
            gradients[torch.arange(len(rows), device=device), :, labels_N[rows]] -= 1.0
            gradients = gradients.flatten(1).div_(len(rows))
            cosine = 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
            weight_gradient = features_BD.T @ gradients
            if decaying:
                weight_gradient.addcmul_(weights, decays)
            weight_momenta.mul_(0.9).add_(weight_gradient)
            bias_momenta.mul_(0.9).add_(gradients.sum(dim=0))
            weights.addcmul_(weight_momenta, rates, value=-cosine)
            biases.addcmul_(bias_momenta, rates, value=-cosine)
            step += 1
    return (
        weights.unflatten(1, (num_settings, num_classes)).movedim(1, 0),
        biases.unflatten(0, (num_settings, num_classes)),
    )


def _softmax(logits_BSC: Tensor) -> Tensor:
    """Over the classes; for few of them across the settings: a CPU takes 10 times as long for rows of 10."""
    if logits_BSC.shape[2] > FEW_CLASSES:
        return logits_BSC.softmax(dim=2)
    return logits_BSC.mT.softmax(dim=1).mT.contiguous()


def logistic_regression(
    features_ND: Tensor, labels_N: Tensor, test_features_ND: Tensor, *, inverse_penalty: float, num_classes: int
) -> Tensor:
    """Log-probabilities (N, C) of scikit-learn's L-BFGS logistic regression; a warning where it did not converge.

    `inverse_penalty` is scikit-learn's C. All features are standardised with the mean and deviation of
    `features_ND`. A class without a training image has log-probability -inf.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    scaler = StandardScaler()
    standardised = scaler.fit_transform(features_ND.cpu().double().numpy())
    classifier = LogisticRegression(C=inverse_penalty, max_iter=MAX_ITERATIONS)
    threads = 1 if features_ND.numel() * num_classes < SMALL_PRODUCT else None
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below in one line
        classifier.fit(standardised, labels_N.cpu().numpy())
    if (classifier.n_iter_ >= MAX_ITERATIONS).any():
        logger.warning(
            "logistic regression with C=%g did not converge in %d iterations", inverse_penalty, MAX_ITERATIONS
        )
    log_probabilities = classifier.predict_log_proba(scaler.transform(test_features_ND.cpu().double().numpy()))
    scores_NC = torch.full((len(test_features_ND), num_classes), -torch.inf)
    scores_NC[:, torch.from_numpy(classifier.classes_)] = torch.from_numpy(log_probabilities).float()
    return scores_NC
