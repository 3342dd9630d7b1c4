"""Commands that a signal reaches in the middle of their work, forked for test_signals."""

import os
import pty
import signal
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from tests.warm import LAUNCHER_VARIABLES, fork_ranks, wait_for


def signalled(words: list[str], moment: str, number: int) -> tuple[int, str]:
    """Exit status and output of a command without a launcher that gets a signal at a moment; 0 is no signal.

    A hangup closes its terminal first, so that all it says afterwards fails; its output is empty here.
    """
    from pal_ds.cli import main as cli

    parser, ends = cli.build_parser(words[0]), list[int]()

    def alone() -> None:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if number == signal.SIGHUP:
            ends.extend(pty.openpty())
            for descriptor in (1, 2):
                os.dup2(ends[1], descriptor)
        with patch.object(cli, "build_parser", lambda *_: parser):
            sys.argv = ["pal-ds", *words]
            cli.console()

    def hook(_: int, reached: str) -> None:
        if reached == moment and number not in (0, *sent):
            sent.append(number)
            if number == signal.SIGHUP:
                os.close(ends[0])
            os.kill(os.getpid(), number)

    sent: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        (code,) = wait_for(fork_ranks(1, alone, log, hook), seconds=60)
        return code, Path(f"{log}.0").read_text()
