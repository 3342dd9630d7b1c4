"""Progress bars for long work: throughput and time left, on rank 0 only."""

import contextlib
import datetime
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
_shown_bars: list[str] = []


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, *, shown: bool, unit: str = "texts", outer: bool = False
) -> Iterator[Callable[..., None]]:
    """Yield `advance(num_units, **facts)`: one step of `total`, `num_units` for the throughput, facts to display.

    A bar inside another is not shown, but for those inside an `outer` one, which appear below it for their time.
    """
    if not shown or _shown_bars:
        yield lambda num_units=0, **facts: None
        return
    if _outer:
        with _row(_outer[-1], label, total, unit) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        _TimeLeft(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        if not outer:
            with _row(progress, label, total, unit, keep=True) as advance:
                yield advance
            return
        _outer.append(progress)
        try:
            with _row(progress, label, total, unit, keep=True, alone=False) as advance:
                yield advance
        finally:
            _outer.pop()


@contextlib.contextmanager
def _row(
    progress: Progress, label: str, total: int, unit: str, *, keep: bool = False, alone: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar of a display; while one that is `alone` is there, no other bar is shown inside it."""
    task = progress.add_task(label, total=total, rate="", facts="", outer=not alone)
    num_done = 0

    def advance(num_units: int = 0, **facts: object) -> None:
        nonlocal num_done
        num_done += num_units
        seconds = progress.tasks[progress.task_ids.index(task)].elapsed or 0.0
        rate = f"{num_done / seconds:,.1f} {unit}/s" if seconds > 0 and num_done else ""
        shown_facts = " ".join(f"{name} {value}" for name, value in facts.items())
        progress.update(task, advance=1, rate=rate, facts=shown_facts)

    if alone:
        _shown_bars.append(label)
    try:
        yield advance
    finally:
        if alone:
            _shown_bars.pop()
        if not keep:
            progress.remove_task(task)
