"""Progress bars for long work: throughput and time left, on rank 0 only."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_shown_bars: list[str] = []


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, *, shown: bool, unit: str = "texts"
) -> Iterator[Callable[..., None]]:
    """Yields `advance(num_units, **facts)`: one step of `total`, `num_units` for the throughput, facts to display.

    A bar inside another is not shown.
    """
    if not shown or _shown_bars:
        yield lambda num_units=0, **facts: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task(label, total=total, rate="", facts="")
        num_done = 0

        def advance(num_units: int = 0, **facts: object) -> None:
            nonlocal num_done
            num_done += num_units
            seconds = progress.tasks[task].elapsed or 0.0
            rate = f"{num_done / seconds:,.1f} {unit}/s" if seconds > 0 else ""
            shown_facts = " ".join(f"{name} {value}" for name, value in facts.items())
            progress.update(task, advance=1, rate=rate, facts=shown_facts)

        _shown_bars.append(label)
        try:
            yield advance
        finally:
            _shown_bars.pop()
