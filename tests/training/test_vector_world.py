"""The vector world end to end: planted prototypes and mixtures come back out of a run made by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.figures import figures_of
from pal_ds.eval.results import file_request
from pal_ds.inference.load_run import OpenRun, restore
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.scoring import Forwards
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import ROOT, run_command

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    folder = tmp_path_factory.mktemp("vector_world")
    recipe = ROOT / "pal_ds" / "recipes" / "vector_world.yaml"
    run_command(
        "train",
        f"--config={recipe}",
        f"--data.path={folder / 'data'}",
        f"--run_dir={folder / 'run'}",
    )
    return restore(RunDirectory(folder / "run"))


@pytest.fixture(scope="module")
def test_margins(trained: OpenRun) -> np.ndarray:
    mixtures = user_mixtures(trained.model.head, trained.users)
    forwards = Forwards(trained.model, trained.parts.collator, 1024, ALONE)
    return forwards.margins(trained.data.rows("test"), mixtures)


def pure(trained: OpenRun) -> np.ndarray:
    """Planted prototype of each user, -1 for mixed ones."""
    names = trained.data.user_group
    return np.asarray([-1 if name is None else int(name.rsplit("_", 1)[1]) for name in names])


def test_pure_users_are_assigned_to_their_planted_group(trained: OpenRun) -> None:
    planted = pure(trained)
    assert (planted >= 0).mean() >= 0.3
    found = trained.users.mixtures().argmax(1).numpy()[planted >= 0]
    counts = np.zeros((3, 3))
    np.add.at(counts, (found, planted[planted >= 0]), 1)
    rows, columns = linear_sum_assignment(-counts)
    assert counts[rows, columns].sum() / counts.sum() >= 0.98


def test_choice_probabilities_of_mixed_users(trained: OpenRun, test_margins: np.ndarray) -> None:
    table = trained.data.comparisons[trained.data.rows("test")]
    mixed = pure(trained)[table["user"]] < 0
    error = np.abs(expit(test_margins[mixed]) - table["probability"][mixed]).mean()
    assert error <= 0.03


def test_accuracy_reaches_bayes(trained: OpenRun, test_margins: np.ndarray) -> None:
    figures = figures_of(trained.data, trained.data.rows("test"), test_margins)
    assert figures["accuracy"] >= 0.98 * figures["bayes_accuracy"]
    assert 0.85 <= figures["bayes_accuracy"] <= 0.92


def write_vectors(path: Path, size: int) -> Path:
    rows = np.random.default_rng(0).normal(size=(6, 2, size)).round(3).tolist()
    lines = [json.dumps({"user_id": "new", "response_features": row, "y": 1}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_evaluates_a_file_of_vectors(trained: OpenRun, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "new.jsonl", 8)
    figures = evaluate_run(trained.run, ALONE, request=file_request(file))
    assert figures["unknown_users"]["pairs"] == 6
    assert figures["prompts_seen_in_training"] == 0


def test_vectors_of_another_size_are_refused(trained: OpenRun, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "new.jsonl", 5)
    with pytest.raises(UserError, match="vectors of 5 numbers, the run was trained on 8"):
        evaluate_run(trained.run, ALONE, request=file_request(file))
