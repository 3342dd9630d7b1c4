"""Reading a source, which may be somebody's own: what it does wrong is told with the place in its file."""

import json
import traceback
from collections.abc import Iterator
from typing import NoReturn

from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError


def records_of(source: Source) -> Iterator[Record]:
    """Yield a source's records. Raises UserError for what it yields that is no record, and for what it raises."""
    kind, num_yielded = type(source), 0
    try:
        for record in source.records():
            if not isinstance(record, Record):
                raise UserError(
                    f"{kind.__name__}.records() yields {type(record).__name__}; a source yields "
                    "pal_ds.data.records.Record(user_id=..., prompt=..., responses=(..., ...), label=-1 or 1)."
                )
            num_yielded += 1
            yield record
    except (UserError, OSError):
        raise
    except Exception as error:
        _tell(source, "records", error, f", after {num_yielded} records")


def description_of(source: Source) -> dict[str, object]:
    """Return what a source says of itself. Raises UserError for what JSON cannot hold, and for what it raises."""
    named = f"data.source: {type(source).__name__}.describe()"
    try:
        facts = source.describe()
    except (UserError, OSError):
        raise
    except Exception as error:
        _tell(source, "describe", error)
    try:
        json.dumps(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{named} returns what JSON cannot hold ({error}). Return texts, numbers, lists and dicts."
        ) from None
    if not isinstance(facts, dict):
        raise UserError(f"{named} returns {type(facts).__name__}; it must return a dict.")
    return facts


def _tell(source: Source, method: str, error: Exception, after: str = "") -> NoReturn:
    """Raise UserError with the place in the file of a source of somebody's own, or the error as it is."""
    kind = type(source)
    if kind.__module__.partition(".")[0] == "pal_ds":
        raise error
    place = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(
        f"data.source: {kind.__module__}.{kind.__name__}.{method}() raised {type(error).__name__} ({error}) at "
        f"{place.filename}:{place.lineno}{after}. Mend the source or what it reads."
    ) from error
