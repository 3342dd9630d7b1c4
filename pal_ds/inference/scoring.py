"""Scores of comparisons at any world size: every pair is scored once, and every rank gets them all."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.loader import split_rows
from pal_ds.data.plan import split_update
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.heads.base import HeadOutput, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.losses import decision_margin
from pal_ds.model import user_state
from pal_ds.progress import progress_bar

logger = logging.getLogger(__name__)

Forward = Callable[[Batch, UserState], HeadOutput]


@dataclass(frozen=True)
class Forwards:
    """A model that reads comparisons of some data, a micro-batch per rank at a time.

    Which pairs share a forward depends on the world size, so scores agree to rounding. A user whom the table does not
    hold (row -1) gets the last mixture, the population's. Without mixtures, users are what the batches say of them
    (their group). Margins are multiplied by the exponential of users' reliability, where it is given; rewards are not.
    """

    forward: Forward
    collator: Collator
    micro_batch_pairs: int
    world: World
    micro_batch_tokens: int | None = None
    """Bounds a forward as it does in training."""
    label: str | None = None
    """Label of a progress bar; none is shown without."""
    between_steps: Callable[[], None] = lambda: None

    def margins(
        self,
        rows: np.ndarray,
        mixtures: Float[Tensor, "U+1 K"] | None,
        log_reliability: Float[Tensor, "U+1"] | None = None,
    ) -> Float[np.ndarray, "n"]:
        """Margins (> 0 prefers response_2) of the comparisons `rows`, in their order, fp64, on every rank."""

        def read(batch: Batch, output: HeadOutput) -> Tensor:
            return decision_margin(output.margin, batch.window_end)[:, None]

        margins = self._gathered(rows, (mixtures, log_reliability), read, 1)[:, 0]
        if self.world.is_rank_zero and (num_lost := int(np.isnan(margins).sum())):
            logger.warning(
                "%d of %d pairs have scores that are no numbers; they count as wrong",
                num_lost,
                len(margins),
            )
        return margins

    def rewards(
        self, rows: np.ndarray, mixtures: Float[Tensor, "U+1 K"] | None
    ) -> Float[np.ndarray, "n 2"]:
        """Rewards of both responses for their user, at the last token as an export scores; fp64, on every rank."""

        def read(batch: Batch, output: HeadOutput) -> Tensor:
            ends = batch.window_end
            sides = [decision_margin(output.reward[:, side], ends) for side in (0, 1)]
            return torch.stack(sides, 1)

        return self._gathered(rows, (mixtures, None), read, 2)

    def _gathered(
        self,
        rows: np.ndarray,
        of_users: Sequence[Tensor | None],
        read: Callable[[Batch, HeadOutput], Float[Tensor, "B c"]],
        num_values: int,
    ) -> Float[np.ndarray, "n c"]:
        """Collect the result of `read` for each comparison, in the order of `rows`.

        `of_users` are mixtures and the log of reliability.
        """
        world, collator = self.world, self.collator
        of_users = [None if part is None else part.to(world.device) for part in of_users]
        prompts = collator.data.response_prompt[collator.data.comparisons["a"][rows]]
        # Comparisons of one prompt side by side: a packed forward then computes it once for them.
        order = np.argsort(prompts, kind="stable")
        ordered = rows[order]
        steps, parts = self._steps(ordered), []
        shown = world.is_rank_zero and self.label is not None
        with (
            torch.no_grad(),
            progress_bar(self.label or "", len(steps), shown=shown, unit="pairs") as advance,
        ):
            for places in steps:
                phase.enter("evaluate")
                self.between_steps()
                share = ordered[places[world.rank]]
                batch = collator(share, np.arange(len(share)), stand_in=int(rows[0]))
                batch = batch.to(world.device)
                points, log_reliability = (
                    None if part is None else part[batch.user_row] for part in of_users
                )
                user = user_state(batch, mixture=points, log_reliability=log_reliability)
                output = self.forward(batch, user)
                padded = torch.full((self.micro_batch_pairs, num_values), torch.nan)
                padded = padded.to(world.device)
                padded[: len(share)] = read(batch, output)[: len(share)]
                parts.append(world.all_gather(padded))
                advance(sum(len(part) for part in places))
        gathered_values = np.empty((len(rows), num_values))
        gathered = torch.stack(parts).double().cpu().numpy() if parts else ()
        for places, of_step in zip(steps, gathered, strict=True):
            for part, values in zip(places, of_step, strict=True):
                gathered_values[order[part]] = values[: len(part)]
        return gathered_values

    def _steps(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """[step][rank] places in `rows` of the comparisons of one forward."""
        world_size, pairs = self.world.world_size, self.micro_batch_pairs
        if self.micro_batch_tokens is None:
            return split_update(len(rows), world_size, pairs) if len(rows) else []
        # In pieces, as an update is: the whole at once would be long in the cutting.
        size = world_size * pairs
        return [
            [begin + part for part in step]
            for begin in range(0, len(rows), size)
            for step in split_rows(
                collator=self.collator,
                rows=rows[begin : begin + size],
                world_size=world_size,
                micro_batch_pairs=pairs,
                micro_batch_tokens=self.micro_batch_tokens,
            )
        ]
