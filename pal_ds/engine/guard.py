"""Skips updates whose loss or gradients are not finite or spike, on every rank alike, and counts them.

The guard sits in front of the inner optimizer's `step`: there the gradient norm over all ranks is known, whatever the
ZeRO stage, and nothing has changed yet, so a skipped update leaves weights, moments and step counts as they were.
"""

import logging
import math
import statistics
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from pal_ds.config.run_config import TrainConfig
from pal_ds.distributed.world import World
from pal_ds.errors import NumericError

logger = logging.getLogger(__name__)

WINDOW = 128
"""Number of newest applied updates whose loss and gradient norm say what is usual."""
MIN_SEEN = 32
"""Applied updates that must have been seen before any is called a spike."""


class GuardState(TypedDict):
    """State that a resumed run needs to decide as this one would; a part of the manifest."""

    num_skipped: int
    num_in_a_row: int
    losses: list[float]
    norms: list[float]


class UpdateGuard:
    """Decides for each update whether it is made. All ranks hold equal figures, so all decide alike."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self._sigmas, self._max_in_a_row = config.skip_spikes_sigmas, config.max_skips_in_a_row
        self._world = world
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._read_norm: Callable[[], float | Tensor | None] = lambda: None
        self._update, self._loss = 0, 0.0
        self._decided = False
        self.num_skipped = self.num_in_a_row = 0
        self.reason: str | None = None
        """Reason why the update at hand is skipped; None where it is made."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `optimizer.step()` do nothing, from now on, where the update is skipped."""
        inner = optimizer.step

        def guarded(*args: Any, **kwargs: Any) -> float | None:
            # ZeRO steps once per group of parameters: the first call decides for all of them.
            if not self._decided:
                self._decide()
            return None if self.reason else inner(*args, **kwargs)

        optimizer.step = guarded  # type: ignore[method-assign]

    def open(
        self,
        update: int,
        losses: Tensor,
        users_finite: bool,
        read_norm: Callable[[], float | Tensor | None],
    ) -> None:
        """Begin an update.

        Args:
            update: number of the update.
            losses: [world], each rank's part of the update's mean loss, on the host.
            users_finite: whether all user gradients are finite.
            read_norm: gives the gradient norm over all ranks once the optimizer is asked to step; None: unknown.
        """
        self._update, self._loss, self._read_norm = update, float(losses.sum()), read_norm
        self.reason, self._decided = None, False
        lost = [rank for rank, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        if lost:
            self.reason = f"the loss of rank {', '.join(map(str, lost))} is not finite"
        elif not users_finite:
            self.reason = "a user's gradient is not finite"
        self._decided = self.reason is not None

    def close(self, engine_applied: bool) -> bool:
        """End the update; return True where it was made. `engine_applied` is what DeepSpeed itself says.

        Raises:
            NumericError: too many in a row were skipped.
        """
        if not engine_applied and self.reason is None:
            self.reason = "a gradient is not finite"
        if self.reason is None:
            self.num_in_a_row = 0
            return True
        self.num_skipped += 1
        self.num_in_a_row += 1
        if self._world.is_rank_zero:
            logger.warning(
                "update %d skipped: %s (%d in a row, the run ends at %d)",
                self._update,
                self.reason,
                self.num_in_a_row,
                self._max_in_a_row,
            )
        if self.num_in_a_row >= self._max_in_a_row:
            raise NumericError(
                f"{self.num_in_a_row} updates in a row were skipped, the last, {self._update}, because {self.reason} "
                "(train.max_skips_in_a_row). Look at its comparisons; lower the learning rates, or set "
                "train.gradient_clipping. Started again, the run resumes from its newest checkpoint."
            )
        return False

    def state_dict(self) -> GuardState:
        """Return, as plain numbers, the state that a resumed run needs to decide as this one would."""
        return {
            "num_skipped": self.num_skipped,
            "num_in_a_row": self.num_in_a_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: GuardState) -> None:
        """Go on from what `state_dict` returned."""
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]
        self._losses, self._norms = list(state["losses"]), list(state["norms"])

    def _decide(self) -> None:
        self._decided = True
        norm = self._read_norm()
        norm = 0.0 if norm is None else float(norm)
        # DeepSpeed's sentinel for a norm that is not finite is -1.
        if not math.isfinite(norm) or norm < 0:
            self.reason = "a gradient is not finite"
            return
        if self._sigmas is None:
            return
        measured = [("loss", self._loss, self._losses), ("gradient norm", norm, self._norms)]
        spikes = [
            f"its {name} {value:.4g} is a spike (train.skip_spikes_sigmas)"
            for name, value, seen in measured
            if is_spike(value, seen, self._sigmas)
        ]
        # Nearly equal on all ranks by construction; one of them has to have the last word.
        self.reason = self._world.from_rank_zero(lambda: spikes[0] if spikes else None)
        if self.reason is None:
            for _, value, seen in measured:
                seen.append(value)
                del seen[:-WINDOW]


def is_spike(value: float, seen: list[float], sigmas: float) -> bool:
    """Return True where `value` lies more than `sigmas` standard deviations above the mean of the values in `seen`.

    With fewer than MIN_SEEN values nothing is a spike.

    >>> usual = [1.0, 2.0] * 16
    >>> is_spike(3.0, usual, sigmas=2.0), is_spike(2.5, usual, sigmas=2.0), is_spike(9.0, usual[:31], sigmas=2.0)
    (True, False, False)
    """
    if len(seen) < MIN_SEEN:
        return False
    return value > statistics.fmean(seen) + sigmas * statistics.stdev(seen)
