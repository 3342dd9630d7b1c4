"""`pal-ds` with a rank 1 that falls asleep while it collates the batches of an update."""

import os
import time

import pal_ds.engine.checkpoint.forget
import pal_ds.training.loop  # noqa: F401  (imported at the start of a training, which takes seconds)
from pal_ds.cli.main import console
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase

ASLEEP_IN_UPDATE = 2

collate_as_usual = Collator.__call__


def collate_or_sleep(self: Collator, *arguments: object, **options: object) -> object:
    if os.environ["RANK"] == "1" and phase.current().step == ASLEEP_IN_UPDATE:
        fall_asleep()
    return collate_as_usual(self, *arguments, **options)  # type: ignore[arg-type]


def fall_asleep() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    Collator.__call__ = collate_or_sleep  # type: ignore[assignment]
    console()
