"""Rows that cannot be read: dropped and counted while they are few, refused where they are many."""

import logging
import re
from collections import Counter

from pal_ds.errors import UserError, without_stop

logger = logging.getLogger(__name__)

MAX_BAD_ROWS = 0.01
"""Share of the rows that may be bad where a recipe does not say (`data.max_bad_rows`)."""
REASON = "bad_row"
"""Name of these rows among the counts of what was dropped."""
_FIRST = 100
"""Rows after which a file of nothing but bad rows is refused at once."""
_SHOWN = 5
_VALUE = re.compile(r"(?<= is )[^;]+(?=;)|(?<= holds )[^;]+(?=;)|\b0x[0-9a-f]+\b|-?\b\d+(?:\.\d+)?")
"""Values within a reason, by which one reason would be as many as there are rows."""


def _kind_of(reason: str) -> str:
    """Take a reason without the values that a row brings: the same rule is broken in the same column.

    >>> _kind_of("'y' is 'two'; it must be -1") == _kind_of("'y' is 0.5; it must be -1")
    True
    """
    return _VALUE.sub("...", reason)


class BadRows:
    """Bad rows of one reading of a source, with their reasons.

    The place of each row, its column and the rule are in the messages that readers raise.
    """

    def __init__(self, largest_share: float = MAX_BAD_ROWS) -> None:
        self.largest_share = largest_share
        self.num_good = self.num_bad = 0
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def clear(self) -> None:
        """Begin a new reading."""
        self.num_good = self.num_bad = 0
        self.reasons.clear()
        self._first.clear()

    def add(self, where: str, error: UserError) -> None:
        """Count a row. Raises UserError where none may be bad, or where none of the first 100 is good."""
        message = str(error)
        reason = _kind_of(message.removeprefix(f"{where}: "))
        self.num_bad += 1
        if len(self.reasons) < 1000 or reason in self.reasons:
            self.reasons[reason] += 1
            self._first.setdefault(reason, message)
        if self.largest_share == 0 or (not self.num_good and self.num_bad >= _FIRST):
            self._refuse()

    def check(self) -> None:
        """Raises UserError where more rows are bad than may be, with the first of them and the reasons."""
        if self.num_bad > self.largest_share * (self.num_good + self.num_bad):
            self._refuse()

    def summary(self) -> str:
        """The reasons, each with its first row; the most frequent first."""
        common = self.reasons.most_common(_SHOWN)
        shown = [
            f"{without_stop(self._first[reason])}{f' ({count} such rows)' if count > 1 else ''}"
            for reason, count in common
        ]
        more = self.num_bad - sum(count for _, count in common)
        return "; ".join([*shown, *([f"and {more} other rows"] if more else [])])

    def warn(self) -> None:
        """Tell of the rows that were left out, if there are any."""
        if self.num_bad:
            logger.warning(
                "%d of %d rows are bad and were left out: %s",
                self.num_bad,
                self.num_good + self.num_bad,
                self.summary(),
            )

    def counts(self) -> dict[str, int]:
        """The number of bad rows by the name that counts of dropped rows have for them; empty where there are none."""
        return {REASON: self.num_bad} if self.num_bad else {}

    def _refuse(self) -> None:
        first = next(iter(self._first.values()))
        said = without_stop(first)
        total = self.num_good + self.num_bad
        if total == 1 or self.largest_share == 0:
            raise UserError(first)
        listed = "" if len(self.reasons) == 1 else f". By reason: {self.summary()}"
        raise UserError(
            f"{said}. {self.num_bad} of {total} rows are bad; data.max_bad_rows, {self.largest_share:g}, is the "
            f"largest share that is dropped{listed}"
        )
