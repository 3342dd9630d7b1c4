"""The update: forward and backward over its micro-batches, the engine's step, then the user rows.

The loss is the mean over the update's comparisons, whatever the split. The step knows no head and no data source.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.config.run_config import OptimConfig
from pal_ds.data.batch import Batch
from pal_ds.data.plan import keyed_generator
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.optim import schedule_factor
from pal_ds.engine.training_engine import TrainingEngine
from pal_ds.heads.base import HeadOutput, PairLoss, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.kernels.fused_loss import FusedLoss
from pal_ds.losses import PreferenceLoss, decision_margin
from pal_ds.model import user_state
from pal_ds.users import RowPrior, TrainedUsers


@dataclass(frozen=True)
class UpdateStats:
    """Sums over this rank's comparisons, still on the device: reading them waits for it."""

    loss_sum: Float[Tensor, ""]
    correct: Float[Tensor, ""]
    num_pairs: int
    """Comparisons of the whole update, over all ranks; 0 where it was skipped."""
    learning_rate: float
    applied: bool
    """False where the update was skipped (see `engine/guard.py`), for the users too; its sums are 0 then."""
    grad_norm: float | Tensor | None = None


@dataclass(kw_only=True)
class Stepper:
    """Runs updates on a DeepSpeed engine and a user table."""

    engine: TrainingEngine
    users: TrainedUsers
    loss: PreferenceLoss
    optim: OptimConfig
    users_learning_rate: float
    world: World
    num_updates: int
    seed: int
    needs_users: bool
    guard: UpdateGuard
    prior: RowPrior | None = None
    """Pulls the rows of an update, where the recipe has one."""

    def run(
        self, update: int, batches: list[Batch], runs: list[list[np.ndarray]], user_rows: np.ndarray
    ) -> UpdateStats:
        """Make one update, or skip it where the guard says so; every rank calls it with the same `update`.

        Args:
            update: number of the update, from 0.
            batches: this rank's micro-batches, on its device.
            runs: [micro-step][rank], positions within the update of the comparisons that a rank has then.
            user_rows: [comparisons of the whole update], the row of each one's user in the table.

        Raises:
            NumericError: too many updates in a row were skipped.
        """
        factor = schedule_factor(self.optim, update, self.num_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        self.engine.train()
        num_pairs = len(user_rows)
        loss_sum, correct = torch.zeros(2, device=self.world.device)
        leaves: list[Tensor] = []
        reads_rows = self.needs_users or bool(self.users.scalars)
        at_hand = self.users.fetch(torch.from_numpy(user_rows)) if reads_rows else None
        for index, batch in enumerate(batches):
            phase.enter("forward", update)
            # Dropout is a function of these: a resumed run needs no saved generator state.
            key = keyed_generator("dropout", self.seed, update, index, self.world.rank)
            torch.manual_seed(int(key.integers(0, 2**63)))
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            leaf = None if at_hand is None else at_hand.leaf(batch.user_row)
            # ZeRO averages gradients over ranks, hence the factor world size.
            scale = self.world.world_size / num_pairs
            user = self._user_state(batch, leaf, update)
            output = self.engine(batch, user, self._fused_pair_loss(batch, scale))
            total, scaled = self._losses(output, batch, scale)
            phase.enter("backward")
            self.engine.backward(scaled, scale_wrt_gas=False)
            if leaf is not None:
                leaves.append(leaf)
            with torch.no_grad():
                decision = decision_margin(output.margin, batch.window_end) * batch.preferred
                right = (decision > 0).float() + 0.5 * (decision == 0).float()
                correct = correct + (right * batch.weight).sum()
                loss_sum = loss_sum + total.detach()
        phase.enter("step")
        rate = self.users_learning_rate * factor
        gradients = self.user_gradients(leaves, runs) if at_hand is not None else None
        if at_hand is not None and gradients is not None and self.prior is not None:
            rows = torch.from_numpy(user_rows).to(gradients.device)
            gradients = gradients + self.prior.pull(at_hand.leaf(rows).detach(), rows) / num_pairs
        applied, grad_norm = self._apply(update, loss_sum, gradients, user_rows, rate)
        if not applied:
            loss_sum, correct = torch.zeros_like(loss_sum), torch.zeros_like(correct)
        num_made = num_pairs if applied else 0
        full_rate = self.optim.learning_rate * factor
        return UpdateStats(loss_sum, correct, num_made, full_rate, applied, grad_norm)

    def _user_state(self, batch: Batch, leaf: Tensor | None, update: int) -> UserState:
        """The users of a batch, from their values."""
        if leaf is None:
            return user_state(batch, update=update)
        users = self.users
        logits = leaf[:, : users.num_prototypes] if self.needs_users else None
        of_scalars = {f"log_{name}": leaf[:, users.place_of(name)] for name in users.scalars}
        return user_state(batch, logits, update=update)._replace(**of_scalars)

    def _fused_pair_loss(self, batch: Batch, scale: float) -> PairLoss | None:
        """The fused loss of this batch, on hardware where it pays."""
        fused = FusedLoss.where_it_pays(self.loss, self.world.device)
        # The kernels know sure labels alone, and one temperature for all.
        is_plain = batch.target is None and not self.users.has_reliability
        if fused is None or not is_plain or self.loss.has_threshold:
            return None
        facts = batch.facts(scale)
        return lambda placement: fused.compute(placement, facts)

    def _losses(
        self, output: HeadOutput, batch: Batch, scale: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the loss summed over comparisons, and that sum times `scale`, which goes backward."""
        if output.total is not None:
            # Its factor is in the weights of the facts: the gradient that reaches it is 1.
            scaled = output.total + (output.penalty * batch.weight).sum() * scale
            return scaled / scale, scaled
        window = batch.window_start, batch.window_end
        soft = {"target": batch.target, "threshold": output.threshold}
        per_pair = self.loss(output.margin, batch.label, *window, batch.required_margin, **soft)
        total = ((per_pair + output.penalty) * batch.weight).sum()
        return total, total * scale

    def _apply(
        self,
        update: int,
        loss_sum: Float[Tensor, ""],
        gradients: Float[Tensor, "n K"] | None,
        user_rows: np.ndarray,
        users_rate: float,
    ) -> tuple[bool, float | Tensor | None]:
        """Make the engine's step and the users', or neither; return (made or not, gradient norm before clipping)."""
        finite = torch.ones((), dtype=torch.bool, device=loss_sum.device)
        if gradients is not None:
            finite = gradients.isfinite().all()
        # One transfer to the host: whether an update is made is decided there, in front of the engine's own look.
        shared = self.world.all_gather(torch.stack([loss_sum, finite.to(loss_sum.dtype)])).cpu()
        norm = self._grad_norm_at_stage_zero()
        self.guard.open(
            update,
            shared[:, 0] / len(user_rows),
            bool(shared[:, 1].all()),
            lambda: self.engine.optimizer._global_grad_norm if norm is None else norm,
        )
        self.engine.step()
        applied = self.guard.close(self.engine.was_step_applied())
        if applied and gradients is not None:
            # Both are in global order already.
            self.users.apply(torch.from_numpy(user_rows), gradients, None, users_rate)
        return applied, self.engine.get_global_grad_norm() if norm is None else norm

    def user_gradients(
        self, leaves: list[Tensor], runs: list[list[np.ndarray]]
    ) -> Float[Tensor, "n K"]:
        """Gradients of the update's loss for each comparison's user row, in global order, equal on every rank.

        Every rank knows the split, so only the gradients travel: padded to the longest rank, then put in order.
        """
        world_size = self.world.world_size
        sizes = np.array([[max(len(run), 1) for run in step] for step in runs])
        longest = int(sizes.sum(0).max())
        local = torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])
        padded = local.new_zeros(longest, local.shape[1])
        padded[: len(local)] = local
        gathered = self.world.all_gather(padded).flatten(0, 1)
        source = np.empty(sum(len(run) for step in runs for run in step), np.int64)
        for rank in range(world_size):
            column = rank * longest
            for step, step_runs in enumerate(runs):
                source[step_runs[rank]] = column + np.arange(len(step_runs[rank]))
                column += sizes[step, rank]
        return gathered[torch.from_numpy(source).to(gathered.device)] / world_size

    def _grad_norm_at_stage_zero(self) -> Tensor | None:
        """Plain data parallelism in fp32 keeps no norm of its own; elsewhere the engine reports it after its step."""
        if self.engine.zero_optimization() or self.engine.bfloat16_enabled():
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
