"""Room for the threads that ranks need: refused by name before native code starts them.

gloo, torch and DeepSpeed start threads in C++. Where the next one cannot be made they abort the process, or wait for
ever for what it was to do, so this process tries first how much it gets.
"""

import mmap
import os
import resource
import threading

from pal_ds.errors import StorageError

NUM_THREADS = 12
"""Threads that joining a process group and starting an engine add to a process, with some to spare."""
ARENA_BYTES = 64 << 20
"""Address space that glibc's malloc takes for a new thread, keeps, and gives to those after it."""
SPARE_BYTES = 128 << 20
"""For what the threads and libraries take beside it."""
USUAL_STACK_BYTES = 8 << 20

_num_arenas = 0
"""Arenas that this process holds since it tried before."""


def refuse_too_little_room(num_threads: int = NUM_THREADS) -> None:
    """Try whether this process may start so many threads more, and end them again; takes a millisecond.

    Raises:
        StorageError: its limits leave too little address space for them, or let it start fewer.
    """
    global _num_arenas
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = USUAL_STACK_BYTES if stack == resource.RLIM_INFINITY else stack
    needed = SPARE_BYTES + num_threads * stack + max(0, num_threads - _num_arenas) * ARENA_BYTES
    try:
        # Taken and not touched: it counts against the limit and costs no memory.
        mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
    except OSError as error:
        raise StorageError(
            f"address space: this process needs {needed >> 20} MiB more to start its threads{_taken()}: "
            f"{error.strerror}. Raise the limit (`ulimit -v`, or the job's), and start again."
        ) from error
    may_end, threads = threading.Event(), []
    try:
        for _ in range(num_threads):
            thread = threading.Thread(target=may_end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(
            f"threads: this process needs {num_threads} more, and may start {len(threads)}: {error}. Raise the limit "
            "(`ulimit -u`, and what the job or its container allows), and start again."
        ) from error
    finally:
        may_end.set()
        for thread in threads:
            thread.join()
        _num_arenas = max(_num_arenas, len(threads))


def _taken() -> str:
    """Return what is known of the limit, for the message."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    with open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return f", and has taken {used >> 20} of the {limit >> 20} that it may"
