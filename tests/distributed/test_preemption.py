"""Asked to stop, by whatever way, the ranks make one checkpoint at one update; started again, nothing was lost."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pal_ds.distributed import phase, preemption
from pal_ds.distributed.interrupts import Interrupts
from pal_ds.distributed.preemption import StopWatch, listening
from pal_ds.distributed.world import World
from tests.distributed.stop_worker import IN_UPDATE, STOP_IN_UPDATE
from tests.same_run import assert_same_step, figures
from tests.spawn import run_ranks
from tests.tiny_run import TinyRun
from tests.training.resume_worker import NUM_UPDATES

LAST = f"checkpoints/step_{NUM_UPDATES:08d}"


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stop")
    run_ranks(2, "tests.distributed.stop_worker", tiny_run.data, tiny_run.base, out)
    return out


@pytest.mark.parametrize("name", IN_UPDATE)
def test_one_checkpoint_at_one_update(runs: Path, name: str) -> None:
    at = STOP_IN_UPDATE + 1
    folder = runs / name
    assert json.loads((folder / "first_status.json").read_text()) == {
        "state": "stopped",
        "step": at,
        "num_updates": NUM_UPDATES,
        "reason": "time limit" if name == "clock" else "signal",
    }
    assert [json.loads((folder / f"saves_{rank}.json").read_text()) for rank in (0, 1)] == [
        [at]
    ] * 2
    assert json.loads((folder / "first_steps.json").read_text()) == [at]


@pytest.mark.parametrize("name", IN_UPDATE)
def test_started_again_it_is_the_run_that_was_never_stopped(runs: Path, name: str) -> None:
    whole, folder = runs / f"whole_{4 if name in ('due', 'evaluating') else 100}", runs / name
    assert assert_same_step(whole / LAST, folder / LAST) >= 8
    # The evaluation that the stop left out was made by the second start, and only once.
    assert figures(folder) == figures(whole)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "best.json").read_text() == (whole / "best.json").read_text()


def test_a_signal_outside_training_keeps_its_meaning() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with listening(["USR2"]):
        assert signal.getsignal(signal.SIGUSR2) is not before
        signal.raise_signal(signal.SIGUSR2)
        assert preemption._noted
    assert signal.getsignal(signal.SIGUSR2) is before


def watch_after(
    minutes: float, *, save: float | None, update: float, evaluation: float = 0.0
) -> StopWatch:
    watch = StopWatch(minutes, save)
    watch._longest |= {"update": update, "evaluation": evaluation}
    return watch


@pytest.mark.parametrize(
    ("spent", "save", "update", "evaluation", "stops"),
    [
        (500, 20, 5, 0, False),
        # Two saves of 20 s and an update of 65 s do not fit into 100 s.
        (500, 20, 65, 0, True),
        (500, 20, 5, 90, True),
        # Nothing was saved yet: 30 of the 600 seconds are set aside for it.
        (560, None, 5, 0, False),
        (566, None, 5, 0, True),
    ],
)
def test_the_clock_leaves_room_for_a_save(
    monkeypatch: pytest.MonkeyPatch,
    spent: float,
    save: float | None,
    update: float,
    evaluation: float,
    stops: bool,
) -> None:
    monkeypatch.setattr(phase, "STARTED", time.monotonic() - spent)
    watch = watch_after(10, save=save, update=update, evaluation=evaluation)
    assert watch.out_of_time(evaluation_due=evaluation > 0) == stops
    alone = World(0, 1, None)  # type: ignore[arg-type]
    reason = watch.reason_to_stop(alone, evaluation_due=evaluation > 0)
    assert reason == ("time limit" if stops else None)
    assert not StopWatch(None).out_of_time(evaluation_due=True)


def test_ctrl_c_and_a_closed_terminal_ask_for_a_stop(capfd: pytest.CaptureFixture[str]) -> None:
    # Under nohup a closed terminal means nothing.
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    for number in (signal.SIGINT, signal.SIGHUP):
        with listening(["USR2"]):
            assert not preemption.stop_is_requested()
            signal.raise_signal(number)
            assert preemption.stop_is_requested()
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)) == before
    signal.signal(signal.SIGHUP, inherited)


@pytest.mark.parametrize("may_end_process", [False, True])
def test_a_second_ctrl_c_ends(may_end_process: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with listening(["USR2"], may_end_process=may_end_process):
        signal.raise_signal(signal.SIGINT)
        assert preemption.stop_is_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C again ends at once") == 1
    # The number of each signal goes nowhere any more, and nobody waits for one.
    assert signal.set_wakeup_fd(-1) == -1
    assert "interrupts" not in {thread.name for thread in threading.enumerate()}


def test_two_ctrl_c_for_which_the_handler_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are where both arrive while native code runs."""
    interrupts = Interrupts()
    interrupts.num = 2
    monkeypatch.setattr(preemption, "_counted", [interrupts])
    with listening(["USR2"]), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_worker_writes_no_signals_to_its_parent() -> None:
    with listening(["USR2"], may_end_process=True):
        worker = os.fork()
        if worker == 0:
            os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 1)
        assert os.waitpid(worker, 0)[1] == 0


def test_what_a_process_ignores_stays_ignored() -> None:
    """As of one that `nohup` started, or a shell in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(["USR2"]):
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.stop_is_requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
