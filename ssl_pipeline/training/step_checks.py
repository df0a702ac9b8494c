"""Is a step finite, and did a signal come? All ranks learn the same answer, and the device waits for no host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.config import RunError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.distributed import gather, max_over_ranks

NUM_NAMED_IMAGES = 4
FIRST_STEP = (
    "It is the first, so no learning rate has acted yet: look at train.precision (no is float32), data.std, "
    "temperatures of the method, backbone.weights, and larger views."
)
LATER_STEPS = (
    "The checkpoints are untouched; try a lower optim.lr, a longer warm-up, optim.clip_norm, or another "
    "train.precision."
)


class BrokenStepError(RunError):
    """A step with a loss or gradient that is not finite; `step` steps before it are good."""

    def __init__(self, sentence: str, *, step: int) -> None:
        super().__init__(sentence)
        self.step = step


@dataclass(frozen=True)
class StepCheck:
    """A step with its two flags, on their way to the host: whether it is broken, and the signal that a rank received.

    step: how many were made before it. Apart from the flags everything stays on the device, for the error sentence.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    sample_ids: Tensor
    flags: Tensor
    arrived: torch.cuda.Event | None


def lag_on(device: torch.device) -> int:
    """By how many steps the check of a step may be read late.

    A host that asks a GPU in each step leaves it idle until the next step is queued. So there a check is read while
    the next step runs: the weights of the process may then have taken a broken step, but nothing that is reported or
    saved has, because all checks are read first. On a CPU the answer costs nothing, and a broken step is not made.
    """
    return 1 if device.type == "cuda" else 0


class StepChecks:
    """The checks that have not been read yet, oldest first.

    budget: how many broken steps may be left out; such a step must not be made, so checks are then read without a lag.
    left_out: how many have been, in earlier starts of the run too. say: called for each.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        budget: int = 0,
        left_out: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._index, self._budget, self._say = index, budget, say
        self._waiting: deque[StepCheck] = deque()
        self.left_out = left_out
        self.is_left_out = False
        """Whether the newest step is to be left out, once its check is read."""

    @torch.no_grad()
    def add(
        self,
        step: int,
        *,
        loss: Tensor,
        gradient_norm: Tensor,
        sample_ids: Tensor,
        watched: Tensor,
        signal_number: int,
    ) -> None:
        """Start the check of the step after `step` others: broken on all ranks if `watched` is not finite on any."""
        self.is_left_out = False
        # new_full fills on the device; new_tensor would copy from the host, and wait for that
        flags = torch.stack([(~watched.isfinite()).float(), watched.new_full((), signal_number, dtype=torch.float32)])
        flags = max_over_ranks(flags)
        arrived = None
        if flags.is_cuda:
            flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append(StepCheck(step, loss, gradient_norm, sample_ids, flags, arrived))

    def read(self, *, lag: int = 0) -> int:
        """Read all but the newest `lag` checks: the signal that any rank received, 0 if none.

        Raises BrokenStepError, on all ranks, naming the first broken step and its images, unless it may be left out.
        """
        received = 0
        while len(self._waiting) > lag:
            check = self._waiting.popleft()
            if check.arrived is not None:
                check.arrived.synchronize()
            broken, signal_number = (int(flag) for flag in check.flags.tolist())
            if broken:
                self._leave_out(check)
            received = max(received, signal_number)
        return received

    def _leave_out(self, check: StepCheck) -> None:
        sentence = self._sentence(check)
        if self.left_out >= self._budget:
            spent = f"Already {self._budget} left out (train.nan_budget). " if self._budget else ""
            advice = LATER_STEPS if check.step else FIRST_STEP
            raise BrokenStepError(f"Step {check.step + 1} was not applied: {sentence} {spent}{advice}", step=check.step)
        self.left_out += 1
        self.is_left_out = True
        self._say(
            f"Step {check.step + 1} is left out ({self.left_out} of at most {self._budget}, train.on_nan=skip): "
            f"{sentence}"
        )

    def _sentence(self, check: StepCheck) -> str:
        """What is wrong with a step, with the images of the first rank whose loss is not finite.

        Where all losses are finite it was the gradients, which are averages over all ranks.
        """
        loss_W = gather(check.loss[None])
        broken_rank = int((~loss_W.isfinite()).int().argmax())
        images = gather(check.sample_ids[None])[broken_rank].tolist()
        names = "; ".join(self._index.read(image).location for image in images[:NUM_NAMED_IMAGES])
        more = f"; and {len(images) - NUM_NAMED_IMAGES} more" if len(images) > NUM_NAMED_IMAGES else ""
        return (
            f"on rank {broken_rank} the loss is {loss_W[broken_rank].item():g}, and the gradient norm is "
            f"{check.gradient_norm.item():g}. Images of its batch: {names}{more}."
        )
