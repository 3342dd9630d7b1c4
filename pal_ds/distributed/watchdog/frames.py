"""The work of this process's threads, read from their frames without stopping them."""

import collections
import dis
import sys
import threading
from collections.abc import Container
from pathlib import Path
from types import FrameType

WAITING_FILES = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/utils/nvtx.py",
    "/torch/utils/file_baton.py",
)
"""Files that hold the innermost Python frame while a rank waits for others; the last, while one builds operators."""


def look(leave_out: Container[int | None]) -> tuple[str, bool]:
    """Return where the main thread is, and whether any thread waits for other ranks (a backward pass has its own)."""
    where, waiting = "nowhere", False
    for ident, frame in sys._current_frames().items():
        code = frame.f_code
        if ident == threading.main_thread().ident:
            where = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        waiting |= ident not in leave_out and is_waiting(frame)
    return where, waiting


def is_waiting(frame: FrameType) -> bool:
    """Return True where a thread whose innermost Python frame is this one waits for other ranks."""
    file = frame.f_code.co_filename
    if frame.f_code.co_name == "<module>":
        return False  # it is being imported
    if any(part in file for part in WAITING_FILES):
        return True
    # DeepSpeed waits for its handles wherever it needs them; what else it does there is work.
    return "/deepspeed/" in file and method_called(frame) == "wait"


def method_called(frame: FrameType) -> str | None:
    """Return the name of the function that a frame is calling, from its code: reading its source might block."""
    names = (
        step.argval
        for step in dis.get_instructions(frame.f_code)
        if step.offset <= frame.f_lasti and step.opname in ("LOAD_METHOD", "LOAD_ATTR")
    )
    last = collections.deque(names, maxlen=1)
    return last[0] if last else None
