"""Worker of test_guard: one rank's batch gives NaN in some updates, at every ZeRO stage and precision."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pal_ds.data.loader import UpdateInputs
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World, leave
from pal_ds.engine import guard
from pal_ds.engine.process_group import distributed
from pal_ds.engine.step import Stepper, UpdateStats
from pal_ds.errors import NumericError
from pal_ds.heads.base import Features
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training import loop
from pal_ds.training.loop import make_update, save
from pal_ds.training.state import Training
from tests import one_training
from tests.one_training import begin
from tests.training.resume_worker import recipe

NUM_UPDATES = 5
POISONED = {0: "the loss of rank 1 is not finite", 2: "a gradient is not finite"}
"""Update -> why it is skipped."""
SKIPPED_WHEN_DUE, SAVED_INSTEAD = 4, 5
SPIKE = 6
VARIANTS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


def poisoned(inputs: UpdateInputs, world: World) -> UpdateInputs:
    """One of rank 1's batches asks for a margin that is no number, so its loss and all its gradients are none."""
    if world.rank != 1:
        return inputs
    first, *rest = inputs.batches
    broken = first._replace(required_margin=first.required_margin * torch.nan)
    return inputs._replace(batches=[broken, *rest])


class NaNBackward(torch.autograd.Function):
    """Passes values on as they are, and gradients as none."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan


@contextlib.contextmanager
def poisoned_gradient(state: Training) -> Iterator[None]:
    """Rank 1's backbone gets gradients that are no numbers, under a finite loss; the head and the users get theirs."""

    def poison(_: Any, __: Any, features: Features) -> Features:
        return features._replace(response=NaNBackward.apply(features.response))

    backbone = state.engine.module.backbone
    handle = backbone.register_forward_hook(poison) if state.world.rank == 1 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def every_variant(data: PreparedData, base: str, out: Path, world: World) -> None:
    for stage, precision in VARIANTS:
        config = recipe(str(data.path), base, "full")
        settings = replace(
            config.train,
            ds_config=f"tests/ds/zero{stage}.json",
            precision=precision,
            max_skips_in_a_row=2,
            keep_checkpoints=10,
        )
        run = RunDirectory(out / f"zero{stage}_{precision}")
        state = begin(replace(config, train=settings), run, data, world)
        stepper, source, reasons = state.stepper, state.inputs, []
        for update in range(NUM_UPDATES):
            save(state)
            inputs = poisoned(source[update], world) if update == 0 else source[update]
            with poisoned_gradient(state) if update == 2 else contextlib.nullcontext():
                state.metrics.add(make_update(state, stepper, inputs))
            reasons.append(state.guard.reason)
            state.metrics.log(state.step, 0.0)
        save(state)
        messages = []
        for _ in range(2):
            try:
                make_update(state, stepper, poisoned(source[state.step], world))
            except NumericError as error:
                messages.append(str(error))
        facts = {**state.guard.state_dict(), "messages": messages, "reasons": reasons}
        (run.path / f"rank_{world.rank}.json").write_text(json.dumps(facts))
        state.engine.destroy()


def disturbed_training(data: PreparedData, base: str, out: Path, world: World) -> None:
    """`train` itself: the update before a save that is due is skipped, and a later one spikes on one rank."""
    config = recipe(str(data.path), base, "full")
    settings = replace(config.train, save_every=4, skip_spikes_sigmas=20.0, keep_checkpoints=10)
    run, make = RunDirectory(out / "disturbed"), loop.make_update

    def disturbed(state: Training, stepper: Stepper, inputs: UpdateInputs) -> UpdateStats:
        if state.step == SKIPPED_WHEN_DUE - 1:
            inputs = poisoned(inputs, world)
        if state.step == SPIKE - 1 and world.rank == 1:
            heavy = inputs.batches[0]._replace(weight=inputs.batches[0].weight * 1e4)
            inputs = inputs._replace(batches=[heavy, *inputs.batches[1:]])
        return make(state, stepper, inputs)

    loop.make_update, guard.MIN_SEEN = disturbed, 3
    one_training.train(replace(config, train=replace(settings, eval_every=100)), run, data, world)
    loop.make_update = make


def main(data_path: str, base: str, out: str) -> None:
    data = PreparedData.open(data_path)
    with distributed() as world:
        every_variant(data, base, Path(out), world)
        disturbed_training(data, base, Path(out), world)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
