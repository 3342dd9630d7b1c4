"""A source of one's own: comparisons in a form that pal_ds does not know."""

import json
from collections.abc import Iterator
from pathlib import Path

from pal_ds import Source
from pal_ds.data.records import Record


class Votes(Source):
    """Comparisons in a file of one's own form: {"who", "question", "left", "right", "prefers": "left" or "right"}."""

    def __init__(self, path: str) -> None:
        self.path = path

    def records(self) -> Iterator[Record]:
        """Yields every vote, in the order of the file."""
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                vote = json.loads(line)
                yield Record(
                    user_id=vote["who"],
                    prompt=vote["question"],
                    responses=(vote["left"], vote["right"]),
                    label=-1 if vote["prefers"] == "left" else 1,
                )

    def describe(self) -> dict:
        """What was read, so that a change is noticed."""
        return {"path": self.path, "bytes": Path(self.path).stat().st_size}
