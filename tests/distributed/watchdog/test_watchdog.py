"""A rank that hangs, dies or fails ends the whole job within the set time, with a message that names it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pal_ds.distributed.watchdog.heartbeat import is_waiting
from pal_ds.distributed.watchdog.link import LONGEST_LINE, AwakeClock, Lines
from pal_ds.distributed.watchdog.lost_ranks import MEETING_FILES, is_symptom, meeting
from pal_ds.distributed.watchdog.watcher import record, watch
from pal_ds.distributed.world import World
from pal_ds.engine.process_group import remove_stale_build_locks
from pal_ds.errors import RankLostError, StorageError
from tests.distributed.watchdog.watchdog_train_worker import ASLEEP_IN_UPDATE
from tests.distributed.watchdog.watchdog_worker import CASES, HANG_SECONDS, MISHAP_AT
from tests.spawn import ROOT, environment, outcome_of
from tests.tiny_run import TinyRun
from tests.warm import WarmParent

SECONDS_TO_END = 3
"""After the verdict, on a busy machine."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.watchdog.watchdog_worker"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def told(outcome: dict[str, Any], rank: int = 0) -> list[str]:
    lines = outcome["output"][rank].splitlines()
    return [line for line in lines if line.startswith("pal-ds: error")]


@pytest.mark.parametrize(
    ("name", "guilty", "phase", "function"),
    [
        ("asleep in collate", 1, "collate", "sleep_in_collate"),
        ("rank 0 asleep", 0, "collate", "sleep_in_collate"),
        ("asleep in forward", 2, "forward", "sleep_in_forward"),
        ("asleep, and gloo gives up first", 1, "collate", "sleep_in_collate"),
    ],
)
def test_a_rank_that_sleeps(
    outcomes: dict[str, Any], name: str, guilty: int, phase: str, function: str
) -> None:
    outcome = outcomes[name]
    assert outcome["codes"] == [5, 5, 5]
    if "gloo" not in name:
        assert max(outcome["seconds"]) < HANG_SECONDS + SECONDS_TO_END
    (message,) = told(outcome)
    assert f"rank {guilty} on" in message
    assert f"has been in `{phase}` at update {MISHAP_AT} for" in message
    assert f"in {function})" in message
    assert "the others wait for it in `forward`" in message
    assert message.endswith(outcome["lost"])
    assert function in outcome["stacks"][guilty]
    for rank in {0, 1, 2} - {guilty}:
        # Where gloo gave up, the others may have come as far as asking why.
        asking = "gloo" in name and "cause_of" in outcome["stacks"][rank]
        assert asking or "all_reduce" in outcome["stacks"][rank]
        assert function not in outcome["stacks"][rank].partition("\n")[2]


def test_a_rank_whose_native_code_keeps_the_interpreter(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["interpreter kept"]
    # No thread of rank 1 runs, so a launcher has to end it; its stacks are in its output.
    assert outcome["codes"] == [5, -9, 5]
    assert "rank 1 on" in told(outcome)[0]
    assert "stuck in native code" in told(outcome)[0]
    assert "in keep_the_interpreter" in outcome["output"][1]


@pytest.mark.parametrize(("name", "guilty"), [("one raises", 1), ("rank 0 raises", 0)])
def test_a_rank_that_raises(outcomes: dict[str, Any], name: str, guilty: int) -> None:
    outcome = outcomes[name]
    assert outcome["codes"] == [1 if rank == guilty else 5 for rank in range(3)]
    assert max(outcome["seconds"]) < SECONDS_TO_END
    assert "ValueError: a bug of one rank" in outcome["output"][guilty]
    assert "raise_value_error" in outcome["output"][guilty]
    if guilty:
        (message,) = told(outcome)
        cause = f"failed in `collate` at update {MISHAP_AT}: ValueError: a bug of one rank"
        assert f"rank {guilty} on" in message
        assert cause in message
    for rank in {0, 1, 2} - {guilty}:
        assert "Traceback" not in outcome["output"][rank]


def test_what_one_rank_could_not_do_ends_all_with_its_code(outcomes: dict[str, Any]) -> None:
    assert outcomes["one cannot write"]["codes"] == [4, 4, 4]
    (message,) = told(outcomes["one cannot write"])
    assert "rank 2 on" in message
    assert "/full: no space left" in message
    assert outcomes["one interrupted"]["codes"] == [130, 130, 130]


def test_what_all_ranks_raise_alike_is_said_once(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["all raise alike"]
    assert outcome["codes"] == [2, 2, 2]
    assert [told(outcome, rank) for rank in range(3)] == [
        ["pal-ds: error: the data are bad"],
        [],
        [],
    ]
    assert outcome["stacks"] == [None] * 3


@pytest.mark.parametrize(
    ("name", "guilty", "phase"), [("one killed", 2, "collate"), ("rank 0 killed", 0, "forward")]
)
def test_a_rank_that_dies(outcomes: dict[str, Any], name: str, guilty: int, phase: str) -> None:
    outcome = outcomes[name]
    assert outcome["codes"] == [-9 if rank == guilty else 5 for rank in range(3)]
    assert max(outcome["seconds"]) < SECONDS_TO_END
    # Where rank 0 is gone, each of the others says so.
    for rank in [0] if guilty else [1, 2]:
        (message,) = told(outcome, rank)
        assert f"rank {guilty} on" in message
        assert "died without a word" in message
        assert f"`{phase}` at update {MISHAP_AT}" in message
        assert outcome["lost"] in outcome["output"][1 - guilty // 2]
    assert all(outcome["stacks"][rank] for rank in {0, 1, 2} - {guilty})


@pytest.mark.parametrize(
    ("name", "guilty", "witness"), [("one stopped", 1, 0), ("rank 0 stopped", 0, 1)]
)
def test_a_rank_that_is_stopped(
    outcomes: dict[str, Any], name: str, guilty: int, witness: int
) -> None:
    """It ends, too, as soon as it goes on."""
    outcome = outcomes[name]
    assert outcome["codes"] == [5, 5, 5]
    message = told(outcome, witness)[0]
    assert f"rank {guilty} on" in message
    assert f"`collate` at update {MISHAP_AT}" in message
    assert "its process is stopped" in message
    if guilty == 0:
        assert "rank 0 itself was stopped" in outcome["output"][0]
    assert f"rank {guilty} on" in outcome["lost"]


def test_a_save_that_hangs(outcomes: dict[str, Any]) -> None:
    """Told apart from one that is merely slow, which is no hang."""
    outcome = outcomes["save that hangs"]
    assert outcome["codes"] == [5, 5, 5]
    assert f"has been in `collate` at update {MISHAP_AT} for" in told(outcome)[0]
    assert "write_for_ever" in outcome["stacks"][1]


@pytest.mark.parametrize(
    "name", ["nothing", "slow and alive", "slow save", "all stopped for a while"]
)
def test_what_is_no_hang(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["codes"] == [0, 0, 0]
    assert (outcome["lost"], outcome["stacks"]) == (None, [None] * 3)
    assert not any(told(outcome, rank) for rank in range(3))


def test_the_token_is_written_nowhere(outcomes: dict[str, Any]) -> None:
    """Neither to what ranks print, at any level of logging, nor to any file."""
    assert [name for name, outcome in outcomes.items() if outcome["leaked"]] == []


def test_every_mishap_is_looked_at(outcomes: dict[str, Any]) -> None:
    assert outcomes.keys() == CASES.keys()
    for outcome in outcomes.values():
        assert "The watchdog" not in "".join(outcome["output"])


def test_train_ends_when_a_rank_sleeps(tiny_run: TinyRun, tmp_path: Path) -> None:
    pairs = tiny_run.data.parent / "pairs.jsonl"
    recipe = {
        "data": {
            "path": str(tiny_run.data),
            "source": {"class_path": "Jsonl", "init_args": {"path": str(pairs)}},
            "max_length": 64,
            "vocab_size": 400,
            "dev_fraction": 0.2,
            "test_fraction": 0,
        },
        "backbone": {"path": str(tiny_run.base)},
        "head": {"class_path": "BradleyTerry"},
        "train": {"batch_pairs": 8, "log_every": 1, "hang_minutes": 8 / 60},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ("train", f"--config={tmp_path / 'recipe.yaml'}", f"--run_dir={tmp_path / 'run'}")
    worker = "tests.distributed.watchdog.watchdog_train_worker"
    ranks = outcome_of(worker, *words, num_ranks=2, timeout=120)
    output = [said for _, said in ranks]
    assert [code for code, _ in ranks] == [5, 5], "\n".join(output)
    message = f"has been in `build batches` at update {ASLEEP_IN_UPDATE} for"
    assert output[0].count("pal-ds: error") == 1
    assert "rank 1 on" in output[0]
    assert message in output[0]
    assert "fall_asleep" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", ASLEEP_IN_UPDATE)
    assert message in status["reason"]


def frame_of(file: str, source: str) -> FrameType:
    """Where `source`, as a file of this name, calls `here`."""
    found: list[FrameType] = []

    class Handle:
        def wait(self) -> None:
            pass

    def here(*_: object) -> None:
        found.append(sys._getframe(1))

    # In its place, what a built-in would be: it has no Python frame of its own.
    handle = Handle()
    handle.wait = handle.step = here  # type: ignore[attr-defined,method-assign]
    exec(compile(source, file, "exec"), {"handle": handle, "here": here})
    (frame,) = found
    return frame


@pytest.mark.parametrize(
    ("file", "source", "waits"),
    [
        ("torch/distributed/distributed_c10d.py", "def f(): here()\nf()", True),
        ("torch/distributed/fsdp/api.py", "here()", False),
        ("deepspeed/runtime/zero/stage3.py", "def f(): handle.wait()\nf()", True),
        ("deepspeed/runtime/zero/stage3.py", "def f(): [handle][0].wait(len('a'))\nf()", True),
        ("deepspeed/ops/adam/cpu_adam.py", "def f(): _ = handle.wait; handle.step()\nf()", False),
        ("mine/train.py", "def f(): handle.wait()\nf()", False),
    ],
)
def test_frames_that_wait(file: str, source: str, waits: bool) -> None:
    assert is_waiting(frame_of(f"/site-packages/{file}", source)) is waits


def test_time_asleep_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = AwakeClock(2.0)
    now = 101.5
    assert clock.tick() == 0
    now = 4000.0
    assert clock.tick() == 4000.0 - 101.5 - 2.0
    assert clock.now == 3.5


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text())), st.integers(1, 20))
def test_messages_survive_any_cut(messages: list[dict[str, Any]], size: int) -> None:
    stream = "".join(json.dumps(message) + "\n" for message in messages).encode()
    lines = Lines()
    parts = [stream[begin : begin + size] for begin in range(0, len(stream), size)]
    assert [message for part in parts for message in lines.feed(part)] == messages


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * (LONGEST_LINE + 1)])
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ValueError):
        Lines().feed(noise)


def test_a_bug_of_rank_zero_is_a_symptom_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every rank would end as if it had the bug, with a traceback and exit code 1 each."""
    sent: list[Any] = []

    def broadcast(outcome: list[Any], **_: object) -> None:
        if outcome != [None, None]:
            sent[:] = outcome
        outcome[:] = sent

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    for rank, error in ((0, KeyError), (1, RuntimeError)):
        with pytest.raises(error, match="no such column") as raised:
            World(rank, 2, torch.device("cpu")).from_rank_zero(lambda: {}["no such column"])
        assert is_symptom(raised.value) == (rank == 1)
    assert MEETING_FILES[-1].endswith("world.py")


def test_a_rank_that_ends_while_they_meet(warm: WarmParent, tmp_path: Path) -> None:
    """No watch is on yet; exit code 5 says to start again all the same, and no traceback hides the reason."""
    outcome = warm("tests.distributed.watchdog.meeting_case:one_ends_while_they_meet", tmp_path)
    assert outcome["codes"] == [-9, 5]
    assert "rank 1: the ranks could not meet (" in outcome["said"]
    assert "Traceback" not in outcome["said"]


def test_a_rank_that_does_not_come_is_named(warm: WarmParent, tmp_path: Path) -> None:
    """No connection tells of it: the ranks have only heard that it should be there."""
    outcomes = warm("tests.distributed.watchdog.meeting_case:who_does_not_come", tmp_path, 2.0)
    assert outcomes["0"]["codes"] == [-9, 5]
    assert outcomes["0"]["said"][1].count("rank 1: the ranks could not meet at 127.0.0.1:") == 1
    assert outcomes["1"]["codes"] == [5, -9]
    assert outcomes["1"]["said"][0].count("error: rank 1 has not come within 2.0 seconds") == 1
    assert outcomes["port"]["codes"] == [2, 5]
    assert "another program listens there on this machine" in outcomes["port"]["said"][0]
    assert outcomes["port"]["said"][1].count("rank 1: the ranks could not meet at") == 1
    said = [text for outcome in outcomes.values() for text in outcome["said"]]
    assert not any("Traceback" in text for text in said), said


@pytest.mark.parametrize(
    ("file", "shown"), [("/torch/distributed/api.py", RankLostError), ("/mine.py", RuntimeError)]
)
def test_only_what_a_meeting_raises_is_blamed_on_others(
    file: str,
    shown: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(shown, match="reset by peer") as raised, meeting():
        exec(compile("raise RuntimeError('reset by peer\\nframe #0: ...')", file, "exec"))
    is_lost = shown is RankLostError
    assert isinstance(raised.value, RankLostError) == is_lost
    assert ("rank 3: the ranks could not meet (reset by peer)." in caplog.text) == is_lost


def test_zero_minutes_is_no_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = World(0, 1, torch.device("cpu"))
    with watch(alone, tmp_path, 0):
        assert not list(tmp_path.iterdir())

    def cannot_write(_: str) -> None:
        raise StorageError("/full: no space left")

    lost_peer = compile("raise RuntimeError('peer gone')", "/torch/distributed/api.py", "exec")
    recorded: list[str] = []
    # What the disk says must not hide what ended the run.
    for on_loss in (recorded.append, cannot_write):
        with pytest.raises(RuntimeError, match="peer gone"), watch(alone, tmp_path, 0, on_loss):
            exec(lost_peer)
    assert recorded == ["RuntimeError: peer gone"]
    assert caplog.text.count("could not be recorded: /full") == 1


def test_zero_minutes_record_a_failure_of_another_rank(
    warm: WarmParent, harness_folder: Path
) -> None:
    told = warm("tests.engine.checkpoint.storage_cases:one_rank_raises_unwatched", harness_folder)
    assert told["codes"][1] == 1 and told["codes"][0] in (1, -9)
    assert "a bug of one rank" in told["said"][1]
    if told["codes"][0] == 1:
        assert told["status"]["state"] == "failed"
        assert "Connection" in told["status"]["reason"]


def test_what_cannot_be_recorded_does_not_hide_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    def cannot_write(_: str) -> None:
        raise StorageError("/full: no space left")

    record(cannot_write, "rank 1 died")
    assert "could not be recorded: /full" in caplog.text


def test_stale_build_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    held, stale = tmp_path / "held" / "lock", tmp_path / "py311_cpu" / "stale" / "lock"
    for lock in (held, stale):
        lock.parent.mkdir(parents=True)
    stale.touch()
    long_ago = time.time() - 1000
    for path in (stale, stale.parent):
        os.utime(path, (long_ago, long_ago))
    descriptor = os.open(held, os.O_CREAT | os.O_EXCL)
    os.utime(held, (long_ago, long_ago))
    try:
        remove_stale_build_locks(300.0)
    finally:
        os.close(descriptor)
    assert held.exists()
    assert not stale.exists()
    assert "stale/lock: removed" in caplog.text
    # Nobody here holds it now, and it is young: waited for, then removed.
    held.touch()
    begin = time.monotonic()
    remove_stale_build_locks(1.0)
    assert not held.exists()
    assert 0.5 < time.monotonic() - begin < 5
