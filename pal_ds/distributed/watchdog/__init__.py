"""The watchdog: a rank that hangs, dies or fails ends the job within a set time, with a message that names it.

A thread of each rank (`watcher.py`) tells rank 0 what the rank is doing (`link.py`, `coordinator.py`); rank 0 judges
(`heartbeat.py`). On its verdict every rank writes its stacks down and ends with exit code 5, even where its main
thread is stuck in native code. Calls of `phase.enter` and `phase.progress` count as progress, so long work must contain
some; a phase in which others' code works for long asks for patience.
"""

from pal_ds.distributed.watchdog.lost_ranks import is_symptom, meeting
from pal_ds.distributed.watchdog.watcher import watch, watch_from_the_start

__all__ = ["is_symptom", "meeting", "watch", "watch_from_the_start"]
