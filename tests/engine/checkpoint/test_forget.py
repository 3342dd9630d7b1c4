"""Forgetting a user: gone from every checkpoint and evaluation, nobody else moved, no interruption loses a step."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint import forget
from pal_ds.engine.checkpoint.forget import forget_user, recover
from pal_ds.engine.checkpoint.retention import retain
from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.eval import evaluate as evaluating
from pal_ds.eval import results
from pal_ds.eval.results import split_request
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import list_users
from pal_ds.runs.lock import only_writer
from pal_ds.runs.run_dir import RunDirectory
from tests.bad_input.conftest import contents
from tests.engine.newest import newest_intact
from tests.spawn import run_command
from tests.tiny import LLAMA, data_options, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
USER = "u1"
TEMPERATURE = 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Five users, checkpoints at two steps, an evaluation with strangers in it and one of some other users."""
    folder = tmp_path_factory.mktemp("forget")
    pairs = write_pairs(folder / "pairs.jsonl", 60, num_users=5)
    run_command(
        "train",
        *data_options(folder, pairs),
        "--data.test_fraction=0.3",
        f"--backbone.architecture={json.dumps(LLAMA)}",
        "--head=PalA",
        "--head.num_prototypes=3",
        f"--head.temperature={TEMPERATURE}",
        "--train.batch_pairs=16",
        "--train.epochs=2",
        "--train.shuffle_unit=item",
        "--train.ds_config=zero0",
        f"--run_dir={folder / 'run'}",
    )
    run = RunDirectory(folder / "run")
    assert len(run.complete_steps()) == 2
    evaluating.evaluate_run(run, ALONE)
    return run


@pytest.fixture
def run(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy to change."""
    shutil.copytree(trained.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def read_users(step: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Ids and tensors of a step, from the files themselves."""
    with pa.ipc.open_file(str(step / "users.arrow")) as reader:
        index = reader.read_all()
    assert index["row"].to_pylist() == list(range(len(index)))
    return index["id"].to_pylist(), load_file(step / "users.safetensors")


def check_forgotten(run: RunDirectory, trained: RunDirectory) -> None:
    """Every step is there, whole, without the user, and otherwise as trained."""
    assert run.complete_steps() == trained.complete_steps()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(
        path.name for path in trained.checkpoints.iterdir()
    )
    for step in run.complete_steps():
        manifest = verify_checkpoint(run.checkpoint(step))
        before_ids, before = read_users(trained.checkpoint(step))
        ids, tensors = read_users(run.checkpoint(step))
        assert ids == [user for user in before_ids if user != USER]
        kept = [before_ids.index(user) for user in ids]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name][kept]), name
        for file in forget.USER_FILES:
            assert USER.encode() not in (run.checkpoint(step) / file).read_bytes()
        was = verify_checkpoint(trained.checkpoint(step))
        assert manifest["files"].keys() == was["files"].keys()
        changed = {name for name in was["files"] if was["files"][name] != manifest["files"][name]}
        assert changed == set(forget.USER_FILES)


def test_gone_from_checkpoints_and_evaluations(run: RunDirectory, trained: RunDirectory) -> None:
    figures = json.loads((run.eval / "test.json").read_text())
    assert USER in figures["users"]
    # The same users as strangers of another evaluation.
    other = {**figures, "users": {}, "unknown_users": {**figures, "users": figures["users"]}}
    (run.eval / "other.json").write_text(json.dumps(other))
    (run.eval / "few_shot.json").write_text(json.dumps({"step": 1, "curve": []}))
    done = forget_user(run, USER)
    assert done == {
        "user_id": USER,
        "steps": trained.complete_steps(),
        "evaluations": ["other.json", "test.json"],
    }
    check_forgotten(run, trained)
    kept = {user: entry for user, entry in figures["users"].items() if user != USER}
    assert json.loads((run.eval / "test.json").read_text()) == {**figures, "users": kept}
    assert json.loads((run.eval / "other.json").read_text())["unknown_users"]["users"] == kept
    assert restore(run).users.ids == [user for user in restore(trained).users.ids if user != USER]


def test_gone_from_large_evaluations_and_leftovers(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "USERS_IN_PARQUET_ABOVE", 1)
    figures = evaluating.evaluate_run(run, ALONE, request=split_request("test", "large"))
    leftovers = [run.path / f"pairs-of-{name}" for name in ("x-1.tables", "y.tables.tmp-12")]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "users.arrow").write_text(USER)
    assert "large.parquet" in forget_user(run, USER)["evaluations"]
    assert not any(leftover.exists() for leftover in leftovers)
    rows = pq.read_table(run.eval / "large.parquet").to_pylist()
    kept = {user: entry for user, entry in figures["users"].items() if user != USER}
    assert {row["user_id"]: row["accuracy"] for row in rows} == {
        user: entry["accuracy"] for user, entry in kept.items()
    }


def test_refusals_change_nothing(run: RunDirectory) -> None:
    damaged = run.checkpoint(run.complete_steps()[-1]) / "engine"
    for user, match in (("nobody", "no checkpoint of"), (USER, "does not match the hash|bytes")):
        if user == USER:
            shard = next(damaged.glob("*.pt"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        before = contents(run.path)
        with pytest.raises(UserError, match=match):
            forget_user(run, user)
        assert contents(run.path) == before


class PowerCutError(Exception):
    """The power went off."""


@pytest.mark.parametrize("moment", range(6))
def test_interruptions_lose_nothing(
    run: RunDirectory, trained: RunDirectory, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each renaming and deletion; clean-up of a training that goes on must not hurt either."""
    seen = 0

    def interrupting(act: Any) -> Any:
        def acted(path: Path, *target: Path) -> Any:
            nonlocal seen
            if Path(path).parent.name == "checkpoints":
                if seen == moment:
                    raise PowerCutError
                seen += 1
            return act(path, *target)

        return acted

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupting(Path.rename))
        patched.setattr(forget.shutil, "rmtree", interrupting(shutil.rmtree))
        with pytest.raises(PowerCutError):
            forget_user(run, USER)
    retain(run, 2, None, now=max(run.complete_steps()))
    recover(run)
    assert run.complete_steps() == trained.complete_steps()
    for step in run.complete_steps():
        verify_checkpoint(run.checkpoint(step))
    if any(USER in read_users(run.checkpoint(step))[0] for step in run.complete_steps()):
        forget_user(run, USER)
    check_forgotten(run, trained)
    assert newest_intact(run) is not None


def test_an_unfinished_copy_is_dropped(
    run: RunDirectory, trained: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(forget.UserTable, "save", fail)
        with pytest.raises(PowerCutError):
            forget_user(run, USER)
    list_users(run)
    assert sorted(contents(run.checkpoints).values()) == sorted(
        contents(trained.checkpoints).values()
    )
    forget_user(run, USER)
    check_forgotten(run, trained)


def hold(path: Path, ready: Any) -> None:
    with only_writer(RunDirectory(path)):
        ready.send(True)
        time.sleep(30)


def test_a_list_leaves_alone_what_another_process_is_writing(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """As tools/reshard.py or a removal does, under the lock; without them the same is an interrupted one's rest."""
    step = run.checkpoint(run.complete_steps()[-1])
    edited = step.with_name(forget.EDITED + step.name)
    (edited / "engine").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(run.path, theirs))
    holder.start()
    try:
        assert ours.poll(10) and ours.recv()
        listed = list_users(run)
        assert (edited / "engine").is_dir()
        assert "listed is what is whole now" in caplog.text
    finally:
        holder.kill()
        holder.join()
    assert list_users(run) == listed
    assert not edited.exists()


def test_a_damaged_copy_gives_way_to_the_old_one(run: RunDirectory) -> None:
    step = run.checkpoint(run.complete_steps()[0])
    edited, old = (step.with_name(prefix + step.name) for prefix in (forget.EDITED, forget.OLD))
    shutil.copytree(step, edited)
    (edited / "users.arrow").write_bytes(b"")
    step.rename(old)
    intact = contents(old)
    damaged = old / "users.arrow"
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        recover(run)
    assert edited.exists() and old.exists()
    damaged.write_bytes(content)
    recover(run)
    assert sorted(contents(step).values()) == sorted(intact.values())
    assert not edited.exists() and not old.exists()


def test_a_deleted_step_does_not_bring_the_user_back(run: RunDirectory) -> None:
    """The old copy is left after the edited one took its place; retention deletes that: both are gone."""
    first, last = run.complete_steps()
    shutil.copytree(run.checkpoint(first), run.checkpoints / f"old-{run.checkpoint(first).name}")
    shutil.rmtree(run.checkpoint(first))
    recover(run)
    assert [path.name for path in run.checkpoints.iterdir()] == [run.checkpoint(last).name]


def test_list_shows_what_the_head_uses(trained: RunDirectory) -> None:
    listed = {line["user_id"]: line["mixture"] for line in list_users(trained)}
    users = restore(trained).users
    expected = torch.softmax(users.logits / TEMPERATURE, -1)
    assert list(listed) == users.ids
    assert torch.allclose(torch.tensor(list(listed.values())), expected, atol=1e-6)
    assert not torch.allclose(expected, torch.softmax(users.logits, -1), atol=1e-3)


def test_list_of_a_head_with_hard_evaluation(run: RunDirectory) -> None:
    config = run.config_file.read_text()
    assert "evaluation: soft" in config
    run.config_file.write_text(config.replace("evaluation: soft", "evaluation: hard"))
    assert all(sorted(line["mixture"]) == [0.0, 0.0, 1.0] for line in list_users(run))
