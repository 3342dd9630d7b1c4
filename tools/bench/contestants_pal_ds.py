"""pal_ds in `bench_step.py`: its own collator, stepper and DeepSpeed engine (one process, stage 0, fp32).

`PalDs` is the one place where this contestant is built; `packing` chooses its layout.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pal_ds.backbones.config import BackboneConfig
from pal_ds.config.run_config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.batch import Batch
from pal_ds.data.prepare import DataConfig
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.heads import BradleyTerry, PalA, PalB
from pal_ds.heads.base import UserState
from pal_ds.losses import PreferenceLoss
from pal_ds.modeling.build import RunContext, assemble
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.loop import make_update
from pal_ds.training.setup import start_training
from pal_ds.training.state import Training
from tools.bench.step_case import PAD, Case, Contestant, Unavailable, prepared

Method = Literal["pal_a", "pal_b", "pal_b_aligned", "bradley_terry"]
Packing = Literal["padded", "packed"]

# The reference's defaults for opt-350m: K 2, three linear layers, hinge or cross-entropy, cumulative weights.
HEADS: dict[str, Any] = {
    "pal_a": lambda size: PalA(size, 2, residual=True),
    "pal_b": lambda size: PalB(size, 2, prompt_dropout=0.0),
    "pal_b_aligned": lambda size: PalB(size, 2, prompt_position="aligned", prompt_dropout=0.0),
    "bradley_terry": BradleyTerry,
}
LOSSES = {
    "pal_a": PreferenceLoss("hinge", "cumulative"),
    "pal_b": PreferenceLoss("logistic", "cumulative"),
    "pal_b_aligned": PreferenceLoss("logistic", "cumulative"),
    "bradley_terry": PreferenceLoss("logistic", "last"),
}


class PalDs(Contestant):
    """The trainer as `pal_ds train` runs it, without its loop's logging and saving."""

    def __init__(
        self,
        case: Case,
        method: Method,
        world: World,
        packing: Packing = "padded",
        pad_to: int | None = None,
    ) -> None:
        """`pad_to` pads every row to that length in place of the longest of the batch.

        Raises:
            Unavailable: no such layout for this method.
        """
        data = prepared(case)
        separate = method == "pal_b_aligned"
        config = RunConfig(
            data=DataConfig(path=str(case.scratch)),
            head=HEADS[method],
            backbone=BackboneConfig(
                path=str(case.backbone),
                encoding="separate" if separate else "auto",
                packing=packing,
            ),
            loss=LOSSES[method],
            optim=OptimConfig(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0),
            train=TrainConfig(
                epochs=1_000_000,
                batch_pairs=len(case.timed),
                micro_batch_pairs=len(case.timed),
                gradient_clipping=0.0,
                ds_config="zero0",
                hang_minutes=0,
            ),
        )
        run = RunDirectory(case.scratch / "never_written")
        try:
            self.state: Training = start_training(
                RunContext.of(config, run, data, world), assemble(config, data, run)
            )
        except UserError as error:
            raise Unavailable(str(error)) from None
        self.pad_to = pad_to
        # A property that builds anew on each access.
        self.stepper, self.inputs = self.state.stepper, self.state.inputs
        self.num_padded_tokens = sum(_num_tokens(batch) for batch in self._next().batches)

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights by name, and of the parity pairs' user rows as `users`."""
        named = self.state.engine.module.named_parameters()
        own = {name: weight.detach().clone() for name, weight in named}
        return {**own, "users": self._leaf(self._parity_users()).detach()}

    def loss_and_gradients(self) -> dict[str, Tensor]:
        state, module = self.state, self.state.engine.module
        rows = state.data.rows("dev")
        batch = self._padded(self.inputs.collator(rows, np.arange(len(rows)), self.inputs.draws))
        leaf = self._leaf(batch.user_row) if state.parts.needs_users else None
        module.train()
        output = module(batch, UserState(leaf, None))
        facts = (batch.label, batch.window_start, batch.window_end, batch.required_margin)
        loss = state.config.loss(output.margin, *facts).mean()
        wanted = dict(module.named_parameters()) | ({} if leaf is None else {"users": leaf})
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}

    def step(self) -> None:
        make_update(self.state, self.stepper, self._next())

    def _next(self) -> Any:
        inputs = self.inputs[self.state.step]
        return inputs._replace(batches=[self._padded(batch) for batch in inputs.batches])

    def _padded(self, batch: Batch) -> Batch:
        if self.pad_to is None or batch.input_ids is None or batch.attention_mask is None:
            return batch
        room = (0, self.pad_to - batch.input_ids.shape[1])
        ids = torch.nn.functional.pad(batch.input_ids, room, value=PAD)
        mask = torch.nn.functional.pad(batch.attention_mask, room)
        return batch._replace(input_ids=ids, attention_mask=mask)

    def _leaf(self, rows: Tensor) -> Tensor:
        return self.state.users.fetch(rows).leaf(rows)

    def _parity_users(self) -> Tensor:
        return torch.from_numpy(self.state.collator.user_rows(self.state.data.rows("dev")))

    def close(self) -> None:
        """Lets DeepSpeed's engine go."""
        self.state.engine.destroy()


def _num_tokens(batch: Batch) -> int:
    return 0 if batch.input_ids is None else batch.input_ids.numel()
