"""One training or removal per run directory at a time; a holder that is gone holds nothing."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pal_ds.errors import UserError
from pal_ds.run_dir import RunDirectory
from pal_ds.run_lock import LOCK, only_writer

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
    with pytest.raises(UserError, match=held), only_writer(run, wait_seconds=0.3):
        pytest.fail("two writers at once")
    assert (tmp_path / "run" / LOCK).is_file()


def test_it_waits_for_one_that_is_about_to_end(holder, tmp_path: Path) -> None:
    holder(0.5)
    with only_writer(RunDirectory(tmp_path / "run"), wait_seconds=10):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    assert not (tmp_path / "run" / LOCK).exists()


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
    texts = [{"state": name * 2000} for name in "ab"]

    def write(facts: dict[str, str]) -> None:
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
