"""JSON figures with an entry per user: in the file itself, or in a table beside it where there are many."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pal_ds.errors import writing
from pal_ds.io.files import replacing, write_json

USERS_IN_PARQUET_ABOVE = 10_000


def write_user_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Writes `figures`, of which "users" is {id: {...}}; above 10,000 users those go to a parquet beside the file.

    "users" then holds the parquet's name. Raises StorageError where a file cannot be written.
    """
    users = figures["users"]
    assert isinstance(users, dict)
    if len(users) > USERS_IN_PARQUET_ABOVE:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"user_id": user, **entry} for user, entry in users.items()]
        table = path.with_suffix(".parquet")
        with writing(table), replacing(table) as aside:
            pq.write_table(pa.Table.from_pylist(rows), aside)
        figures = {**figures, "users": table.name}
    write_json(path, figures)


def read_user_figures(path: Path) -> dict[str, Any]:
    """Read the figures that `write_user_figures` was given."""
    figures = json.loads(path.read_text())
    if isinstance(figures["users"], str):
        import pyarrow.parquet as pq

        rows = pq.read_table(path.with_name(figures["users"])).to_pylist()
        figures["users"] = {row.pop("user_id"): row for row in rows}
    return figures
