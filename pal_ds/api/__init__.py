"""The commands as functions that return objects: for notebooks and scripts, alone or under torchrun.

Mistakes that a person can mend are raised as UserError; nothing here ends the process. Alone, a function is a world of
one rank; under a launcher every rank calls it, and every rank is returned the same. `run` is a directory that `train`
wrote, as a path or as the `Run` that `train` returned.
"""

from pal_ds.api.run import Run, prepare, train
from pal_ds.api.scores import ask, score, score_with_std
from pal_ds.api.use import AdaptedUsers, adapt, consolidate, evaluate, few_shot

__all__ = [
    "AdaptedUsers",
    "Run",
    "adapt",
    "ask",
    "consolidate",
    "evaluate",
    "few_shot",
    "prepare",
    "score",
    "score_with_std",
    "train",
]
