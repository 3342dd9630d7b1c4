"""One training or removal per run directory at a time; a holder that is gone holds nothing."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from pal_ds.distributed import phase
from pal_ds.distributed.preemption import listening
from pal_ds.errors import BusyError, UserError
from pal_ds.io import files
from pal_ds.io.files import replacing
from pal_ds.runs.lock import LOCK, only_writer
from pal_ds.runs.run_dir import RunDirectory

FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: Connection, seconds: float) -> None:
    with only_writer(RunDirectory(path)):
        ready.send(True)
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path: Path):
    """Starts a process that holds the lock of `tmp_path / "run"` for a while."""
    started = []

    def start(seconds: float):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path / "run", theirs, seconds))
        process.start()
        started.append(process)
        assert ours.poll(10) and ours.recv()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_writer_is_refused_by_name(holder, tmp_path: Path) -> None:
    process = holder(30)
    held = rf'in use by .*"pid": {process.pid}'
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(BusyError, match=held) as refused, only_writer(run, wait_seconds=0.3):
        pytest.fail("two writers at once")
    # A batch system may start the same again, which it must not for a mistake.
    assert refused.value.exit_code == 6 != UserError.exit_code
    assert "start again later" in str(refused.value)
    assert (tmp_path / "run" / LOCK).is_file()


def test_a_job_of_slurm_is_told_by_its_number(
    holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    holder(30)
    held = '"slurm_job": "4711", "slurm_restarts": "2"'
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(BusyError, match=held), only_writer(run, wait_seconds=0):
        pytest.fail("two writers at once")


def test_the_wait_for_it_is_progress(holder, tmp_path: Path) -> None:
    """It has its own end, and may be longer than what the watchdog allows."""
    holder(0.7)
    before = phase.current().num_entered
    with only_writer(RunDirectory(tmp_path / "run"), wait_seconds=10):
        assert phase.current().num_entered > before


def test_it_waits_for_one_that_is_about_to_end(holder, tmp_path: Path) -> None:
    holder(0.5)
    with only_writer(RunDirectory(tmp_path / "run"), wait_seconds=10):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_stop_is_not_kept_waiting(holder, tmp_path: Path) -> None:
    holder(30)
    begin = time.monotonic()
    with listening(["USR2"]):
        signal.raise_signal(signal.SIGUSR2)
        with pytest.raises(BusyError), only_writer(RunDirectory(tmp_path / "run"), wait_seconds=60):
            pytest.fail("two writers at once")
    assert time.monotonic() - begin < 10


def test_a_killed_holder_holds_nothing(holder, tmp_path: Path) -> None:
    process = holder(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / LOCK).is_file()
    with only_writer(RunDirectory(tmp_path / "run"), wait_seconds=0):
        pass


def test_a_forked_worker_does_not_keep_it(tmp_path: Path) -> None:
    """Data-loader workers may outlive their rank for seconds."""
    with only_writer(RunDirectory(tmp_path / "run")):
        worker = FORK.Process(target=time.sleep, args=(30,))
        worker.start()
    try:
        other = FORK.Process(target=hold_at_once, args=(tmp_path / "run",))
        other.start()
        other.join(10)
        assert other.exitcode == 0
    finally:
        worker.kill()
        worker.join()


def hold_at_once(path: Path) -> None:
    with only_writer(RunDirectory(path), wait_seconds=0):
        pass


def test_nothing_is_left_of_a_start_that_wrote_nothing(tmp_path: Path) -> None:
    with only_writer(RunDirectory(tmp_path / "a" / "run")):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"), only_writer(RunDirectory(tmp_path / "file")):
        pass


def test_small_files_are_whole_whoever_writes_them(tmp_path: Path) -> None:
    """The watchdog's thread writes status.json beside the main thread; a killed writer's rest is cleared away."""
    run = RunDirectory(tmp_path)
    common: Any = {"state": "running", "num_updates": 9}
    texts: list[Any] = [{**common, "step": n, "reason": str(n) * 2000} for n in (1, 2)]

    def write(facts: Any) -> None:
        for _ in range(30):
            run.write_status(facts)

    threads = [threading.Thread(target=write, args=(facts,)) for facts in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert run.status() in (None, *texts)
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    (tmp_path / "status.json.tmp-1-2").write_text("half")
    run.discard_temporaries()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_killed_evaluations_left_is_cleared(tmp_path: Path) -> None:
    """They hold no lock, so what is young may be in the hands of one."""
    run = RunDirectory(tmp_path)
    run.eval.mkdir()
    for name, age in (("old.parquet.tmp-1-2", 7200), ("new.parquet.tmp-1-2", 0), ("a.json", 7200)):
        (run.eval / name).write_text("x")
        os.utime(run.eval / name, (time.time() - age,) * 2)
    (run.path / "base.tmp-a_host-3").mkdir()
    run.discard_temporaries()
    assert not (run.path / "base.tmp-a_host-3").exists()
    assert {path.name for path in run.eval.iterdir()} == {"new.parquet.tmp-1-2", "a.json"}


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(files, "sync_to_disk", lambda path: done.append(path.name))
    with replacing(tmp_path / "x.parquet") as aside:
        aside.write_text("x")
    assert done == [aside.name, tmp_path.name]
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "x.parquet") as aside:
        aside.write_text("y")
        raise OSError("full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]
