"""Progress bars for long work: throughput and time left, on rank 0 only."""

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _TimeLeft(TimeRemainingColumn):
    """Time left at the mean pace so far, for an outer bar: one step of it outlasts what rich looks back on."""

    def render(self, task: Task) -> Text:
        if not task.fields["outer"] or not task.completed or task.elapsed is None:
            return super().render(task)
        seconds = task.elapsed / task.completed * ((task.total or 0) - task.completed)
        return Text(str(datetime.timedelta(seconds=round(seconds))), style="progress.remaining")


_outer: list[Progress] = []
"""The display that bars inside of it may add a row to."""
_shown_bars: list[Progress] = []
"""The display of the bar that is shown alone, inside which no other is."""


_quiet = False
"""True from `be_quiet` on."""


def be_quiet() -> None:
    """Show no bars and log no more than warnings in the rest of this process."""
    global _quiet
    _quiet = True
    package = logging.getLogger("pal_ds")
    package.setLevel(max(package.level, logging.WARNING))


def is_quiet() -> bool:
    """Return whether `be_quiet` was called."""
    return _quiet


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, *, shown: bool, unit: str = "texts", outer: bool = False
) -> Iterator[Callable[..., None]]:
    """Yield `advance(num_units, **facts)`: one step of `total`, `num_units` for the throughput, facts to display.

    A bar inside another is not shown, but for those inside an `outer` one, which appear below it for their time.
    """
    if not shown or _shown_bars or _quiet:
        yield lambda num_units=0, **facts: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        _TimeLeft(),
        TextColumn("{task.fields[facts]}"),
    )
    num_done, inner = 0, bool(_outer)

    def advance(num_units: int = 0, **facts: object) -> None:
        nonlocal num_done
        num_done += num_units
        seconds = progress.tasks[progress.task_ids.index(task)].elapsed or 0.0
        rate = f"{num_done / seconds:,.1f} {unit}/s" if seconds > 0 and num_done else ""
        shown_facts = " ".join(f"{name} {value}" for name, value in facts.items())
        progress.update(task, advance=1, rate=rate, facts=shown_facts)

    with contextlib.ExitStack() as held:
        display = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        progress = _outer[-1] if inner else held.enter_context(display)
        opens = outer and not inner
        task = progress.add_task(label, total=total, rate="", facts="", outer=opens)
        if inner:
            held.callback(progress.remove_task, task)
        bars = _outer if opens else _shown_bars
        bars.append(progress)
        held.callback(bars.pop)
        yield advance
