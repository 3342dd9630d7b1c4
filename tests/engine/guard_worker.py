"""Worker of test_guard: one rank's batch gives NaN in some updates, at every ZeRO stage and precision."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pal_ds.data.loader import UpdateInputs
from pal_ds.data.tables import PreparedData
from pal_ds.engine.dist import World, distributed, leave
from pal_ds.errors import NumericError
from pal_ds.run_dir import RunDirectory
from pal_ds.start import start_training
from pal_ds.train import make_update, save
from tests.engine.resume_worker import recipe

NUM_UPDATES = 5
POISONED = (0, 2)
VARIANTS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


def poisoned(inputs: UpdateInputs, world: World) -> UpdateInputs:
    """One of rank 1's batches asks for a margin that is no number, so its loss and all its gradients are none."""
    if world.rank != 1:
        return inputs
    first, *rest = inputs.batches
    broken = first._replace(required_margin=first.required_margin * torch.nan)
    return inputs._replace(batches=[broken, *rest])


def main(data_path: str, base: str, out: str) -> None:
    data = PreparedData.open(data_path)
    with distributed() as world:
        for stage, precision in VARIANTS:
            config = recipe(data_path, base, "full")
            settings = replace(
                config.train,
                ds_config=f"tests/ds/zero{stage}.json",
                precision=precision,
                max_skips_in_a_row=2,
                keep_checkpoints=10,
            )
            run = RunDirectory(Path(out) / f"zero{stage}_{precision}")
            state = start_training(replace(config, train=settings), run, data, world)
            tracker, stepper, source = state.tracker, state.stepper, state.inputs
            for update in range(NUM_UPDATES):
                save(state)
                inputs = source[update]
                if update in POISONED:
                    inputs = poisoned(inputs, world)
                tracker.add(make_update(state, stepper, inputs))
                tracker.log(state.step, 0.0)
            save(state)
            messages = []
            for _ in range(2):
                try:
                    make_update(state, stepper, poisoned(source[state.step], world))
                except NumericError as error:
                    messages.append(str(error))
            facts = {**state.guard.state_dict(), "messages": messages}
            (run.path / f"rank_{world.rank}.json").write_text(json.dumps(facts))
            state.engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
