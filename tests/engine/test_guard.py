"""An update that is not finite on any rank is made on none, for the users neither; it is counted."""

import json
import math
from pathlib import Path

import pytest
import torch

from pal_ds.config.run_config import TrainConfig
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.engine.guard import MIN_SEEN, WINDOW, UpdateGuard, is_spike
from pal_ds.errors import NumericError
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.engine.guard_worker import (
    NUM_UPDATES,
    POISONED,
    SAVED_INSTEAD,
    SKIPPED_WHEN_DUE,
    SPIKE,
    VARIANTS,
)
from tests.same_run import assert_same_step
from tests.spawn import outcome_of, run_ranks
from tests.tiny_run import TinyRun


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guard")
    run_ranks(2, "tests.engine.guard_worker", tiny_run.data, tiny_run.base, out)
    return out


@pytest.mark.parametrize(("stage", "precision"), VARIANTS)
def test_a_poisoned_update_changes_nothing_on_any_rank(
    runs: Path, stage: int, precision: str
) -> None:
    run = RunDirectory(runs / f"zero{stage}_{precision}")
    weights = [ShardedCheckpoint(run.checkpoint(step)) for step in range(NUM_UPDATES + 1)]
    users = [UserTable.load(run.checkpoint(step)).logits for step in range(NUM_UPDATES + 1)]
    for update in range(NUM_UPDATES):
        before, after = weights[update], weights[update + 1]
        same = [torch.equal(before.tensor(name), after.tensor(name)) for name in before.names]
        made = update not in POISONED
        assert all(same) == (not made), f"update {update}"
        assert torch.equal(users[update], users[update + 1]) == (not made), f"update {update}"
        assert all(after.tensor(name).isfinite().all() for name in after.names)
        assert users[update + 1].isfinite().all()
    # The second one came when there were moments and step counts to spoil.
    assert assert_same_step(run.checkpoint(2), run.checkpoint(3), tensors_only=True) >= 8


@pytest.mark.parametrize(("stage", "precision"), VARIANTS)
def test_skips_are_counted_and_too_many_end_the_run(runs: Path, stage: int, precision: str) -> None:
    folder = runs / f"zero{stage}_{precision}"
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["num_skipped"] == len(POISONED) + 2
    assert ranks[0]["reasons"] == [POISONED.get(update) for update in range(NUM_UPDATES)]
    (message,) = ranks[0]["messages"]
    assert "2 updates in a row were skipped" in message
    assert "the loss of rank 1 is not finite" in message
    assert "rows " in message
    assert "comparisons.npy" in message
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # NaN is no JSON: readers in other languages would choke on it.
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["skipped_updates"] for row in rows] == [
        int(update in POISONED) for update in range(NUM_UPDATES)
    ]
    assert [row["loss"] is None for row in rows] == [row["skipped_updates"] == 1 for row in rows]


def test_a_save_that_met_a_skipped_update_is_made_up_for(runs: Path) -> None:
    """At most one interval is ever lost: the next update that is made is saved."""
    run = RunDirectory(runs / "disturbed")
    assert SAVED_INSTEAD in run.complete_steps()
    assert SKIPPED_WHEN_DUE not in run.complete_steps()
    rows = run.read_metrics()
    skipped = [row["step"] for row in rows if row.get("skipped_updates")]
    # The second is the spike on rank 1, agreed on by both in the middle of the engine's step.
    assert skipped == [SKIPPED_WHEN_DUE, SPIKE]
    assert rows[-1]["step"] == 8


def test_a_diverged_run_ends_with_its_own_exit_code(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = {
        "data": {"path": str(tiny_run.data)},
        "backbone": {"path": str(tiny_run.base)},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "optim": {"learning_rate": 1e30, "warmup_fraction": 0.0},
        "train": {"ds_config": "zero0", "batch_pairs": 4, "epochs": 2, "gradient_clipping": 0},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ("train", f"--config={tmp_path / 'recipe.yaml'}", f"--run_dir={tmp_path / 'run'}")
    often = ("--train.save_every=1", "--train.eval_every=3")
    ((code, said),) = outcome_of("pal_ds", *words, *often, timeout=120)
    assert code == 3, said
    assert "Traceback" not in said
    assert "10 updates in a row were skipped" in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    # Evaluations on the way meet scores that are no numbers: all wrong, and the best of nothing.
    assert "pairs have scores that are no numbers; they count as wrong" in said
    assert not (tmp_path / "run" / "best.json").exists()
    # Nothing is saved while updates are skipped: the checkpoints before them are the ones worth keeping.
    assert RunDirectory(tmp_path / "run").complete_steps() == [1]


def guarded(
    sigmas: float | None = None, in_a_row: int = 3
) -> tuple[UpdateGuard, torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    config = TrainConfig(skip_spikes_sigmas=sigmas, max_skips_in_a_row=in_a_row)
    guard = UpdateGuard(config, World(0, 1, torch.device("cpu")))
    guard.attach(optimizer)
    return guard, optimizer, parameter


def make(
    guard: UpdateGuard,
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    *,
    loss: float = 1.0,
    norm: float | None = 1.0,
    users_finite: bool = True,
) -> bool:
    """One update of a plain optimizer that steps twice, as ZeRO does with two groups; whether it was made."""
    parameter.grad = torch.ones(1)
    guard.open(7, torch.tensor([loss]), users_finite, lambda: norm)
    before = parameter.item()
    optimizer.step()
    optimizer.step()
    made = guard.close(engine_applied=True)
    assert (parameter.item() != before) == made
    return made


@pytest.mark.parametrize(
    "poison",
    [
        {"loss": math.nan},
        {"loss": -math.inf},
        {"norm": math.inf},
        {"norm": math.nan},
        {"norm": -1.0},
        {"users_finite": False},
    ],
)
def test_every_figure_is_looked_at(poison: dict) -> None:
    parts = guarded()
    assert make(*parts)
    assert not make(*parts, **poison)
    assert make(*parts)
    assert parts[0].num_skipped == 1
    assert parts[0].num_in_a_row == 0


def test_what_the_engine_itself_skipped_counts() -> None:
    guard, _, _ = guarded(in_a_row=1)
    guard.open(0, torch.tensor([1.0]), True, lambda: 1.0)
    with pytest.raises(NumericError, match="a gradient is not finite"):
        guard.close(engine_applied=False)


def usual(index: int) -> float:
    return 1.0 + 0.1 * math.sin(index)


@pytest.mark.parametrize("figure", ["loss", "norm"])
def test_spikes_are_skipped_once_enough_is_known(figure: str) -> None:
    parts = guarded(sigmas=6.0)
    for index in range(MIN_SEEN):
        # Before that a spike passes: nobody knows what is usual.
        value = 50.0 if index == 3 else usual(index)
        assert make(*parts, **{figure: value})
    for index in range(WINDOW):
        assert make(*parts, **{figure: usual(index)})
    assert not make(*parts, **{figure: 5.0})
    # It is no part of what is usual, nor is a good surprise a spike.
    assert not make(*parts, **{figure: 5.0})
    assert make(*parts, **{figure: 0.1})


def test_spikes_pass_where_nobody_asked() -> None:
    parts = guarded()
    for index in range(2 * MIN_SEEN):
        assert make(*parts, loss=usual(index))
    assert make(*parts, loss=1e6, norm=1e6)


def test_a_resumed_guard_decides_as_the_first_would() -> None:
    parts = guarded(sigmas=6.0)
    for index in range(2 * WINDOW):
        make(*parts, loss=usual(index))
    state = json.loads(json.dumps(parts[0].state_dict()))
    assert len(state["losses"]) == WINDOW
    other = guarded(sigmas=6.0)
    other[0].load_state_dict(state)
    assert other[0].state_dict() == parts[0].state_dict()
    assert not make(*other, loss=5.0)


def test_is_spike_is_one_sided() -> None:
    seen = [1.0 + 0.01 * (index % 2) for index in range(MIN_SEEN)]
    assert is_spike(1.2, seen, 6)
    assert not is_spike(0.0, seen, 6)
    assert not is_spike(1.2, seen[1:], 6)
