"""A rank that hangs, dies or fails ends the whole job within the set time, with a message that names it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal_ds.engine.build_lock import remove_stale_build_locks
from pal_ds.engine.watchdog.frames import is_waiting
from pal_ds.engine.watchdog.heartbeat import Beat, Failure, Ledger, Verdict, blamed
from pal_ds.engine.watchdog.lines import LONGEST_LINE, AwakeClock, Lines
from pal_ds.engine.watchdog.watcher import watch
from tests.engine.conftest import TinyRun
from tests.engine.watchdog_train_worker import ASLEEP_IN_UPDATE
from tests.engine.watchdog_worker import CASES, HANG_SECONDS, MISHAP_AT
from tests.spawn import ROOT, environment

SECONDS_TO_END = 3
"""After the verdict, on a busy machine."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.watchdog_worker"],
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


@pytest.mark.parametrize("name", ["nothing", "slow and alive", "all stopped for a while"])
def test_what_is_no_hang(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["codes"] == [0, 0, 0]
    assert (outcome["lost"], outcome["stacks"]) == (None, [None] * 3)
    assert not any(told(outcome, rank) for rank in range(3))


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(probe.getsockname()[1])
    words = ("train", f"--config={tmp_path / 'recipe.yaml'}", f"--run_dir={tmp_path / 'run'}")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.watchdog_train_worker", *words],
            env=environment(**world, RANK=str(rank), LOCAL_RANK=str(rank)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [5, 5], "\n".join(output)
    message = f"has been in `build batches` at update {ASLEEP_IN_UPDATE} for"
    assert output[0].count("pal-ds: error") == 1
    assert "rank 1 on" in output[0]
    assert message in output[0]
    assert "fall_asleep" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", ASLEEP_IN_UPDATE)
    assert message in status["reason"]


def beat(rank: int, **changes: Any) -> Beat:
    usual = Beat(rank, f"node{rank}", "forward", 7, 1.0, 30, 2, "file.py:1 in f", True)
    return usual._replace(**changes)


beats = st.lists(
    st.builds(
        beat,
        st.just(0),
        step=st.integers(0, 2),
        num_in_step=st.integers(0, 2),
        waiting=st.booleans(),
    ),
    min_size=1,
    max_size=8,
).map(lambda found: [one._replace(rank=rank) for rank, one in enumerate(found)])


@given(beats, st.sets(st.integers(0, 7)), st.randoms())
def test_whom_to_blame(found: list[Beat], silent: set[int], random: Any) -> None:
    ranks = blamed(found, silent)
    assert ranks
    shuffled = random.sample(found, len(found))
    assert blamed(shuffled, silent) == ranks
    chosen = [found[rank] for rank in ranks]
    # Nobody is blamed who waits while another does not, nor anyone heard while another is silent.
    if silent & set(range(len(found))):
        assert set(ranks) <= silent
    elif not all(one.waiting for one in found):
        assert not any(one.waiting for one in chosen)
    # All the blamed have come equally far, and nobody of their kind less far.
    (place,) = {(one.step, one.num_in_step) for one in chosen}
    kind = [
        one
        for one in found
        if (one.rank in silent, one.waiting) == (ranks[0] in silent, chosen[0].waiting)
    ]
    assert place == min((one.step, one.num_in_step) for one in kind) or ranks[0] in silent


@given(beats, st.floats(0, 100))
def test_no_verdict_while_any_rank_makes_progress(found: list[Beat], late: float) -> None:
    ledger = Ledger(10.0, 1.0, "stacks/")
    for one in found:
        ledger.hear(one, 0.0)
    ledger.hear(found[-1]._replace(num_entered=found[-1].num_entered + 1), late)
    assert ledger.verdict(late + 9.5) is None
    for one in found[:-1]:
        ledger.hear(one, late + 10.5)  # saying the same again is no progress
    verdict = ledger.verdict(late + 10.5)
    assert verdict is not None
    assert (verdict.kind, verdict.code) == ("hung", 5)


def ledger_of(*found: Beat) -> Ledger:
    ledger = Ledger(100.0, 1.0, "stacks/")
    for one in found:
        ledger.hear(one, 0.0)
    return ledger


def given_to(verdict: Verdict | None) -> tuple[str, tuple[int, ...], int] | None:
    return None if verdict is None else (verdict.kind, verdict.ranks, verdict.code)


def test_causes_come_before_symptoms() -> None:
    ledger = ledger_of(*map(beat, range(4)))
    ledger.failed(Failure(0, "RuntimeError: Connection closed by peer", 1, True), 1.0)
    assert ledger.verdict(1.5) is None
    ledger.failed(Failure(3, "RuntimeError: Connection closed by peer", 1, True), 1.6)
    ledger.died(0, 1.7)  # a rank that said why it leaves has not died
    assert ledger.verdict(1.8) is None
    assert given_to(ledger.verdict(2.5)) == ("failed", (0,), 5)
    ledger.died(2, 1.9)
    assert given_to(ledger.verdict(2.0)) == ("died", (2,), 5)
    ledger.failed(Failure(1, "disk full", 4, False), 2.0)
    assert given_to(ledger.verdict(2.0)) == ("failed", (1,), 4)


def test_a_time_out_is_the_fault_of_whoever_does_not_wait() -> None:
    ledger = ledger_of(beat(0), beat(1), beat(2, waiting=False, phase="collate"))
    ledger.failed(Failure(0, "RuntimeError: Timed out waiting 1800000ms", 1, True), 1.0)
    assert given_to(ledger.verdict(3.0)) == ("hung", (2,), 5)
    # All wait: the one that says so is all that is known.
    ledger = ledger_of(beat(0), beat(1), beat(2))
    ledger.failed(Failure(0, "RuntimeError: Timed out waiting 1800000ms", 1, True), 1.0)
    assert given_to(ledger.verdict(3.0)) == ("failed", (0,), 5)


def test_ranks_that_left_are_not_waited_for() -> None:
    ledger = ledger_of(beat(0), beat(1))
    ledger.left(1)
    ledger.died(1, 1.0)
    assert ledger.verdict(50.0) is None
    assert given_to(ledger.verdict(101.0)) == ("hung", (0,), 5)


def test_a_rank_alone_that_hangs_is_named() -> None:
    verdict = ledger_of(beat(0, waiting=False)).verdict(150.0)
    assert verdict is not None
    assert "no progress: rank 0 on node0 has been in `forward` at update 7 for 2.5 minutes" in (
        verdict.text
    )


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


def test_zero_minutes_is_no_watch(tmp_path: Path) -> None:
    with watch(None, tmp_path, 0):  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


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
