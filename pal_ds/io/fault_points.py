"""Named moments at which a test may stop, kill or delay a process; in production nothing happens there."""

from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def reached(moment: str) -> None:
    """Note that this process has come to `moment`."""
    if _hook is not None:
        _hook(moment)


def on_reaching(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of each moment from now on; None for nothing, as at first."""
    global _hook
    _hook = hook
