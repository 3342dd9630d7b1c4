"""UKPConvArgCrowd: which of two written arguments convinces more, one answer per crowd worker and pair."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files, read_lines
from pal_ds.data.sources.csv_rows import CsvRows
from pal_ds.errors import UserError
from pal_ds.io.files import at_home
from pal_ds.io.text_files import as_text, byte_lines

LABELS = {"a1": -1, "a2": 1, "equal": 0}
PUBLISHED = ("id", "turkerid", "label", "a1", "a2")
"""Columns of a topic's file; its first line, a comment, names them."""
MERGED = ("topic", "arg1", "arg2", "worker", "label")


@final
@dataclass(eq=False)
class UkpConvArg(Source):
    """Users are the workers, the prompt is the topic with its stance, "equal" is a tie.

    Reads the folder UKPConvArgCrowdSample-new-CSV of UKPLab/tacl2018-preference-convincing as it is (a file of tabs per
    topic: id, turkerid, label, a1, a2), or one CSV of topic, arg1, arg2, worker, label with the texts beside it. The
    published protocol (Simpson and Gurevych, Machine Learning 2020) leaves one topic out: name it in `test_topics`,
    with `data.split: field`.

    Args:
        path: folder of topic files, or a CSV.
        arguments: JSON Lines of {"topic", "arg", "text"}, for a CSV.
        test_topics: topics whose comparisons are of the split `test`.
        dev_topics: topics of the split `dev`; all others are of `train`.
    """

    licence = "CC BY 4.0 (UKPLab/acl2016-convincing-arguments)"

    path: str
    arguments: str | None = None
    test_topics: list[str] = field(default_factory=list)
    dev_topics: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if both := sorted({*self.test_topics} & {*self.dev_topics}):
            raise UserError(f"ukp_conv_arg: topic '{both[0]}' is of test and of dev; choose one")
        if not self._is_folder and self.arguments is None:
            raise UserError(
                f"ukp_conv_arg: {self.path} is no folder of topic files; a CSV needs `arguments`, the JSON Lines of "
                "its texts"
            )

    def records(self) -> Iterator[Record]:
        """Topic by topic in the order of the names, or of the CSV, row by row."""
        self.dropped.clear()
        self._check_topics()
        yield from self.each_row(self._rows(), self._comparison)

    def describe(self) -> dict:
        return {
            "class": "UkpConvArg",
            "files": describe_files(self._files),
            "test_topics": self.test_topics,
            "dev_topics": self.dev_topics,
        }

    @property
    def _is_folder(self) -> bool:
        return at_home(self.path).is_dir()

    @cached_property
    def _files(self) -> list[Path]:
        if not self._is_folder:
            return check_files([self.path, str(self.arguments)])
        files = sorted(at_home(self.path).glob("*.csv"))
        if not files:
            raise UserError(f"ukp_conv_arg: {self.path} holds no TOPIC.csv; give their folder")
        return files

    @cached_property
    def _texts(self) -> dict[tuple[str, str], str]:
        """Text of each (topic, argument)."""
        texts = {}
        for where, line in read_lines(self._files[1]):
            keys = ("topic", "arg", "text")
            if not isinstance(line, dict) or any(
                not isinstance(line.get(key), str) for key in keys
            ):
                raise UserError(f"{where}: a line of `arguments` has texts in {', '.join(keys)}")
            texts[line["topic"], line["arg"]] = line["text"]
        return texts

    def _check_topics(self) -> None:
        known = {path.stem for path in self._files}
        if not self._is_folder:
            known = {topic for topic, _ in self._texts}
        for topic in (*self.test_topics, *self.dev_topics):
            if topic not in known:
                raise UserError(
                    f"ukp_conv_arg: there is no topic '{topic}'{nearest(topic, known)} in {self.path}; there are "
                    f"{', '.join(sorted(known))}"
                )

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """(place, (topic, worker, label, text of a1, text of a2) or UserError) of each row."""
        if not self._is_folder:
            rows = CsvRows(self._files[0], ",")
            self._check_columns(self._files[0], rows.names, MERGED)
            for where, row in rows:
                yield where, row if isinstance(row, UserError) else self._merged(where, row)
            return
        for path in self._files:
            yield from self._published(path)

    def _published(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Rows of a topic's file, whose texts may hold quotes that mean nothing; the first line names the columns."""
        for number, line in enumerate(byte_lines(path), start=1):
            where = f"{path}:{number}"
            cells = as_text(line, where).rstrip("\r\n").split("\t")
            if number == 1:
                # "#id", or "# #id    turkerid ..." with blanks in place of tabs.
                self._check_columns(path, " ".join(cells).replace("#", " ").split(), PUBLISHED)
            elif not line.strip():
                continue
            elif len(cells) != len(PUBLISHED):
                yield (
                    where,
                    UserError(f"{where}: {len(cells)} cells; a row has {', '.join(PUBLISHED)}"),
                )
            else:
                _, worker, label, first, second = cells
                yield where, (path.stem, worker, label, first, second)

    def _merged(self, where: str, row: dict[str, str | None]) -> tuple | UserError:
        topic, worker, label = row["topic"], row["worker"], row["label"]
        texts = [self._texts.get((str(topic), str(row[key]))) for key in ("arg1", "arg2")]
        if None in texts:
            return UserError(f"{where}: `arguments` has no text of {row['arg1']} or {row['arg2']}")
        return topic, worker, label, texts[0], texts[1]

    @staticmethod
    def _check_columns(path: Path, names: list[str], wanted: tuple[str, ...]) -> None:
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{path}: has no column '{missing[0]}'; it needs {', '.join(wanted)}")

    def _comparison(self, where: str, row: tuple) -> Iterator[Record]:
        topic, worker, label, first, second = row
        if label not in LABELS:
            raise UserError(f"{where}: label is {label!r}; it must be one of {', '.join(LABELS)}")
        if not worker:
            raise UserError(f"{where}: names no worker")
        question, _, stance = topic.partition("_")
        named = {"test": self.test_topics, "dev": self.dev_topics}
        yield Record(
            user_id=worker,
            label=LABELS[label],
            prompt=": ".join(part.replace("-", " ").strip() for part in (question, stance) if part),
            responses=(_plain(first), _plain(second)),
            split=next((split for split, topics in named.items() if topic in topics), "train"),
        )


def _plain(text: str) -> str:
    return text.replace("<br/>", "\n").strip()
