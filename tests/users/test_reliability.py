"""A reliability per user: careless users of a planted world are found out, and margins then know whom to believe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import list_users
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.spawn import outcome_of, run_command
from tests.tiny_run import TinyRun
from tests.users import planted
from tests.users.planted import prepared

ALONE = World(0, 1, torch.device("cpu"))
TASTE = np.array([1.5, -1.0, 0.5, 0.0])
NUM_USERS, NUM_PAIRS = 60, 24
HEADS = {
    "BradleyTerry": ["--head=BradleyTerry"],
    "Lore": ["--head=Lore", "--head.num_prototypes=2", "--users.prior=learnt"],
    "PalA": [
        *("--head=PalA", "--head.num_prototypes=2", "--head.similarity=cosine"),
        *("--head.num_layers=1", "--users.prior=learnt"),
    ],
}


OTHERS = {
    "PalB": ["--head=PalB", "--head.num_prototypes=2", "--head.num_layers=1"],
    "Vpl": ["--head=Vpl", "--head.latent_dim=4", "--head.width=16"],
    "PerDomain": ["--head=PerDomain", "--head.num_prototypes=1"],
    "MeanVariance": ["--head=MeanVariance"],
    "Categorical": ["--head=Categorical"],
}
"""Heads whose points are not in the table, whose margins are no differences of rewards, and the rest."""


def is_careless(user: str) -> bool:
    return int(user.removeprefix("u")) % 2 == 0


def write_world(path: Path) -> Path:
    """Pairs of vectors; every other user answers by a coin, the rest by one taste and hardly ever wrongly."""
    generator = np.random.default_rng(0)
    with open(path, "w") as stream:
        for index in range(NUM_USERS * NUM_PAIRS):
            pair = generator.normal(size=(2, 4)).round(4)
            user = f"u{index % NUM_USERS}"
            scale = 0.0 if is_careless(user) else 2.0
            chance = 1 / (1 + np.exp(-scale * float((pair[1] - pair[0]) @ TASTE)))
            y = 1 if generator.random() < chance else -1
            row = {"user_id": user, "response_features": pair.tolist(), "y": y, "group": "all"}
            # Each its own, as splits are by prompt; the taste is the same for all.
            row["prompt_features"] = [1.0, *(0.01 * generator.normal(size=3)).tolist()]
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("reliability")
    return prepared(write_world(folder / "pairs.jsonl"))


def trained(data: PreparedData, head: str, reliability: str, epochs: int = 16) -> RunDirectory:
    words = [f"--users.reliability={reliability}", *(HEADS | OTHERS)[head]]
    return planted.trained(data, f"{head}_{reliability}", *words, epochs=epochs)


@pytest.mark.parametrize("head", HEADS)
def test_careless_users_are_found_out(data: PreparedData, head: str) -> None:
    plain, run = (trained(data, head, name) for name in ("none", "learnt"))
    users = restore(run).users
    careless = torch.tensor([is_careless(user) for user in users.ids])
    r = users.log_reliability
    assert r[careless].median() < r[~careless].median() - 0.5
    order = (r[careless][:, None] < r[~careless]).float().mean()
    assert order > 0.9, f"{order} of the pairs of a careless and a careful user are in order"
    assert not restore(plain).users.has_reliability
    without, with_it = (evaluate_run(one, ALONE) for one in (plain, run))
    # Points between opposite prototypes say "careless", too; one reward for everyone cannot.
    assert with_it["brier"] < without["brier"] - (0.02 if head == "BradleyTerry" else 0.0)
    assert with_it["accuracy"] > without["accuracy"] - 0.03


@pytest.mark.parametrize("head", HEADS)
def test_new_users_have_theirs_fitted(data: PreparedData, head: str, tmp_path: Path) -> None:
    run = data.path.with_name(f"{head}_learnt")
    if not run.exists():
        trained(data, head, "learnt")
    run_command("adapt", f"--run_dir={run}", f"--out={tmp_path / 'new'}")
    table = UserTable.load(tmp_path / "new")
    r = table.log_reliability
    careless = torch.tensor([is_careless(user) for user in table.ids])
    assert r[careless].mean() < r[~careless].mean() - 0.5
    report = json.loads((tmp_path / "new" / "report.json").read_text())["users"]
    factors = [report[user]["reliability"] for user in table.ids]
    assert factors == pytest.approx(r.exp().tolist())
    request = split_request("unseen_test")
    strangers = evaluate_run(RunDirectory(run), ALONE, request=request)["unknown_users"]
    known = evaluate_run(RunDirectory(run), ALONE, request=request, users=tmp_path / "new")
    assert strangers["brier"] is not None and known["brier"] is not None
    assert known["pairs"] == strangers["pairs"] and known["brier"] < strangers["brier"]


@pytest.mark.parametrize("head", OTHERS)
def test_every_head_has_it(data: PreparedData, head: str, tmp_path: Path) -> None:
    run = trained(data, head, "learnt", epochs=6)
    users = restore(run).users
    careless = torch.tensor([is_careless(user) for user in users.ids])
    r = users.log_reliability
    assert r[careless].mean() < r[~careless].mean() - 0.2
    listed = list_users(run)
    assert [line["user_id"] for line in listed] == list(users.ids)
    assert [line.get("reliability") for line in listed] == pytest.approx(r.exp().tolist())
    adapt = ["adapt", f"--run_dir={run.path}", f"--out={tmp_path / 'new'}"]
    if head == "PerDomain":
        ((code, words),) = outcome_of("pal_ds", *adapt)
        assert code == 2 and "its head has no users to adapt" in words
        return
    run_command(*adapt)
    known = evaluate_run(run, ALONE, request=split_request("unseen_test"), users=tmp_path / "new")
    assert known["pairs"] and known["adapted_users"]


def test_it_is_refused_where_margins_are_no_log_odds(data: PreparedData, tmp_path: Path) -> None:
    words = [f"--run_dir={tmp_path}", f"--data.path={data.path}", "--head=BradleyTerry"]
    ((code, said),) = outcome_of(
        "pal_ds", "train", *words, "--users.reliability=learnt", "--loss.kind=hinge"
    )
    assert code == 2 and "users.reliability: learnt, and the loss is hinge" in said


def test_an_export_lists_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Of a head that knows no users otherwise; its rewards are the same for everyone."""
    words = ["--head=BradleyTerry", "--backbone.tuning=frozen", "--train.ds_config=zero3_cpu"]
    run_command(
        "train",
        f"--run_dir={tmp_path / 'run'}",
        f"--data.path={tiny_run.data}",
        f"--backbone.path={tiny_run.base}",
        "--users.reliability=learnt",
        *words,
    )
    run_command("consolidate", tmp_path / "run", tmp_path / "out", "--with_users")
    lines = map(json.loads, (tmp_path / "out" / "users.jsonl").read_text().splitlines())
    users = restore(RunDirectory(tmp_path / "run")).users
    factors = users.log_reliability.exp().tolist()
    assert {line["user_id"]: line["reliability"] for line in lines} == pytest.approx(
        dict(zip(users.ids, factors, strict=True))
    )
    assert min(factors) != 1.0
