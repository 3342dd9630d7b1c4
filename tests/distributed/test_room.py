"""Too little room for the threads of ranks is refused by name, before native code meets it."""

import resource
import subprocess
import sys
import threading

import pytest

from pal_ds.distributed.room import refuse_too_little_room
from pal_ds.errors import StorageError
from tests.spawn import ROOT, environment


def test_threads_that_may_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, []

    def start_five(thread: threading.Thread) -> None:
        if len(begun) == 5:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_five)
    with pytest.raises(StorageError, match=r"needs 8 more, and may start 5: .*`ulimit -u`"):
        refuse_too_little_room(8)
    assert len(begun) == 5 and not any(thread.is_alive() for thread in begun)


def test_address_space_that_is_limited() -> None:
    code = (
        "import resource, sys\n"
        "from pal_ds.distributed.room import refuse_too_little_room as refuse\n"
        "refuse()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)\n"
        "refuse()\n"
    )

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, str(limit)]
        return subprocess.run(words, env=environment(), cwd=ROOT, text=True, capture_output=True)

    assert run(resource.RLIM_INFINITY).returncode == 0
    # An interpreter and the arenas of the first try take more than half of it.
    assert "StorageError: address space: this process needs " in run(1 << 30).stderr
