"""A training that ends on weights that are no numbers, or that skipped most updates, is not finished."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.errors import NumericError, UserError
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.eval.sanity_checks import without_a_number
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.divergence import refuse_lost
from pal_ds.training.log_lines import log_end
from pal_ds.users import UserTable
from tests.spawn import outcome_of, run_command
from tests.tiny import LLAMA, data_keys

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    content = {
        "data": data_keys(folder, 64, dev_fraction=0.2, test_fraction=0.0),
        "backbone": {"architecture": LLAMA},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 2}},
        "optim": {"warmup_fraction": 0.0},
        "train": {"ds_config": "zero0", "batch_pairs": 16, "gradient_clipping": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    run_command("prepare", f"--config={folder / 'recipe.yaml'}")
    return folder / "recipe.yaml"


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_short_run_that_diverges_ends_with_the_code_of_numbers(
    recipe: Path, tmp_path: Path, epochs: int
) -> None:
    """Fewer updates than `train.max_skips_in_a_row`, which would have ended a longer one."""
    run = tmp_path / "run"
    words = ("train", f"--config={recipe}", f"--run_dir={run}", "--optim.learning_rate=1e30")
    ((code, said),) = outcome_of("pal_ds", *words, f"--train.epochs={epochs}", timeout=120)
    assert code == 3 and "Traceback" not in said, said
    assert "updates were skipped" in said or "weights are not finite numbers" in said
    assert "finished" not in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == status["num_updates"]
    assert not RunDirectory(run).complete_steps()


def training(weights: torch.Tensor, logits: float = 0.0, **facts: Any) -> Any:
    """What `refuse_lost` looks at of a training."""
    module, users = torch.nn.Linear(2, 2), UserTable(2, ["mia"])
    with torch.no_grad():
        module.weight.copy_(weights)
    users.logits[0, 1] = logits
    return SimpleNamespace(
        engine=SimpleNamespace(module=module),
        users=users,
        world=ALONE,
        guard=SimpleNamespace(num_skipped=facts.get("num_skipped", 0)),
        step=facts.get("step", 10),
        num_updates=10,
    )


def test_what_is_lost() -> None:
    sound, lost = torch.ones(2, 2), torch.tensor([[1.0, torch.inf], [0.0, 0.0]])
    refuse_lost(training(sound))
    refuse_lost(training(sound, num_skipped=5))
    refuse_lost(training(sound, num_skipped=3, step=4))
    with pytest.raises(NumericError, match=r"after update 10 weights are .* \(weight, and 0"):
        refuse_lost(training(lost))
    with pytest.raises(NumericError, match=r"not finite numbers \(users, and 0 others\)"):
        refuse_lost(training(sound, torch.nan, step=4))
    with pytest.raises(NumericError, match="6 of 10 updates were skipped"):
        refuse_lost(training(sound, num_skipped=6))
    # Frozen weights are none of the training's.
    state = training(lost)
    state.engine.module.requires_grad_(False)
    refuse_lost(state)


def test_the_last_line_names_skipped_updates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        log_end(RunDirectory(tmp_path), {"step": 3, "dev_accuracy": 0.5, "temperature": 1.0}, 2)
        log_end(RunDirectory(tmp_path), {"step": 3, "dev_accuracy": 0.5, "temperature": 1.0})
    assert "; 2 updates were skipped (skipped_updates in metrics.jsonl)" in caplog.messages[0]
    assert "skipped" not in caplog.messages[1]


def test_a_model_of_no_numbers_is_not_evaluated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command("train", f"--config={recipe}", f"--run_dir={tmp_path / 'run'}")
    tensor = ShardedCheckpoint.tensor

    def damaged(self: ShardedCheckpoint, name: str, *rest: Any) -> torch.Tensor:
        return tensor(self, name, *rest) * (torch.nan if name.startswith("head.") else 1)

    monkeypatch.setattr(ShardedCheckpoint, "tensor", damaged)
    with pytest.raises(UserError, match="none of its scores is a finite number"):
        evaluate_run(RunDirectory(tmp_path / "run"), ALONE, request=split_request("dev"))
    import numpy as np

    assert without_a_number(np.array([1.0, np.nan, -np.inf])) == [
        "2 of 3 comparisons have scores that are no finite numbers; they count as wrong"
    ]
    assert without_a_number(np.ones(3)) == without_a_number(np.ones(0)) == []


def test_another_seed_is_not_written_into_a_run_that_is_over(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train", f"--config={recipe}", f"--run_dir={run}")
    run_command(*words)
    before = (run / "config.yaml").read_bytes()
    more = ("--train.seed=4", "--allow_change=train.seed")
    ((code, said),) = outcome_of("pal_ds", *words, *more, timeout=120)
    assert code == 0 and "nothing is trained with the other values of train.seed" in said
    assert (run / "config.yaml").read_bytes() == before
    # Before the end it is what the rest is trained with.
    shutil.rmtree(run)
    run_command(*words, "--train.stop_after=1")
    run_command(*words, *more)
    assert "seed: 4" in (run / "config.yaml").read_text()
