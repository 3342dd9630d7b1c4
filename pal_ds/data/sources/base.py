"""The base of all sources: a dataset that yields records, as often as it is asked."""

import codecs
import glob
import itertools
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pal_ds.data.bad_rows import BadRows
from pal_ds.data.records import Record
from pal_ds.errors import UserError
from pal_ds.io.boundary import reading
from pal_ds.io.files import at_home, feed
from pal_ds.io.text_files import as_text, byte_lines, open_bytes, parse_json
from pal_ds.users.ids import POPULATION_USER

MOST_PRETTY_LINES = 10_000
"""Lines within which an object that was written over several lines must end to be named for what it is."""


class Source(ABC):
    """One dataset, one file. `records()` may be called again and then yields the same again."""

    licence: str | None = None

    @cached_property
    def dropped(self) -> Counter[str]:
        """Rows the source itself left out in the last `records()`, by reason."""
        return Counter()

    @cached_property
    def bad_rows(self) -> BadRows:
        """Rows that the last `records()` could not read; `prepare` sets how many there may be."""
        return BadRows()

    def each_row(
        self,
        rows: Iterable[tuple[str, Any]],
        convert: Callable[[str, Any], Iterable[Record]],
    ) -> Iterator[Record]:
        """Yield the records that `convert` makes of each (place, row), with their place; drop and count bad rows.

        A row is bad where `convert` raises UserError, or where it is one itself (`lines_or_errors`).

        Raises:
            UserError: more rows are bad than `bad_rows` lets pass.
        """
        bad_rows = self.bad_rows
        bad_rows.clear()
        for where, row in rows:
            try:
                if isinstance(row, UserError):
                    raise row
                with reading(where, "row of this dataset", "Mend or remove it."):
                    records = [*convert(where, row)]
            except UserError as error:
                bad_rows.add(where, error)
                continue
            bad_rows.num_good += 1
            for record in records:
                yield replace(record, where=where)
        bad_rows.check()

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield every record in a fixed order."""

    @abstractmethod
    def describe(self) -> dict:
        """Describe what was read, for dataset.json and for noticing that it changed."""

    def num_records(self) -> int | None:
        """Return the number of records to expect (for the progress bar), None when unknown."""
        return None


def stable_fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone, on every machine and in every run."""
    key = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(key) / 2**64


def choice_scale(margins: np.ndarray, accuracy: float) -> float:
    """The scale at which choices with probability sigmoid(scale * margin) are right so often, by bisection.

    Args:
        margins: reward of the better response less that of the other, >= 0; [n].
        accuracy: wanted mean probability of the better response.
    """
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = np.mean(1.0 / (1.0 + np.exp(-middle * margins)))
        low, high = (middle, high) if reached < accuracy else (low, middle)
    return low


def preferences_by_score(
    prompt: str, scored: Sequence[tuple[str, float]], dropped: Counter[str]
) -> Iterator[Record]:
    """Every two of some (response, score) as a comparison of the one user `population`: the higher score is preferred.

    Left out and counted in `dropped`: `empty_prompt`, `empty_response`, `tie`.
    """
    for (first, score), (second, other) in combinations(scored, 2):
        if not prompt:
            dropped["empty_prompt"] += 1
        elif not first or not second:
            dropped["empty_response"] += 1
        elif score == other:
            dropped["tie"] += 1
        else:
            label = -1 if score > other else 1
            yield Record(POPULATION_USER, label, prompt=prompt, responses=(first, second))


def check_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files, those of a pattern (`part-*.jsonl`) in the order of their names; `~` is the home folder.

    Raises:
        UserError: one is missing, a folder or empty, or a pattern fits none.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise UserError("no file is given: the list of paths is empty; name at least one file")
    files = [file for path in given for file in _files_of(at_home(path))]
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: no such file; check the path (it is read from {Path.cwd()})")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name the file in it")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; it must hold at least one record")
    return files


def _files_of(path: Path) -> list[Path]:
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not files:
        raise UserError(f"{path}: no file fits this pattern (looked from {Path.cwd()})")
    return files


def describe_files(paths: Iterable[Path]) -> list[dict]:
    """Name, size and content hash of each file."""
    described = []
    for path in paths:
        content = feed(xxhash.xxh3_128(), path).hexdigest()
        described.append({"path": str(path), "bytes": path.stat().st_size, "xxh3_128": content})
    return described


def lines_or_errors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", parsed JSON) for each line that is not blank; a UserError in place of what is no JSON.

    Raises:
        UserError: the file holds a JSON value that is written over several lines.
    """
    rule = "; every line must hold one complete JSON object"
    is_first = True
    for number, line in enumerate(byte_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(as_text(line, where), where, rule)
        except UserError as error:
            if is_first:
                _refuse_pretty_printed(path, line.strip()[:1])
            value = error
        is_first = False
        yield where, value


def _refuse_pretty_printed(path: Path, first: bytes) -> None:
    """Raise UserError where a file, whose first line is no JSON, is CSV, or JSON over several lines."""
    if first not in (b"{", b"["):
        if {".csv", ".tsv"} & set(path.suffixes):
            raise UserError(
                f"{path}: is CSV by its name, and is read as JSON Lines here. A recipe reads it by data.source "
                f"{{class_path: HuggingFace, init_args: {{path: csv, data_files: {path}}}}}."
            )
        return
    beginning = b"".join(itertools.islice(byte_lines(path), MOST_PRETTY_LINES))
    text = beginning.decode("utf-8", "replace").lstrip()
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return
    if "\n" not in text[:end]:
        return  # one line, with another fault
    kind, jq = ("an object", ".") if first == b"{" else ("a list", ".[]")
    raise UserError(
        f"{path}: begins with {kind} of JSON over several lines (pretty-printed); JSON Lines hold one object a line. "
        f"Write it so: jq -c '{jq}' {path.name}"
    )


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", parsed JSON) for each line that is not blank. Raises UserError at a bad one."""
    for where, value in lines_or_errors(path):
        if isinstance(value, UserError):
            raise value
        yield where, value


def json_list_or_errors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, entry) of a JSON list, or of JSON Lines, a UserError in place of a line that is no JSON."""
    with open_bytes(path) as stream:
        first = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first != b"[":
        yield from lines_or_errors(path)
        return
    text = as_text(b"".join(byte_lines(path)), str(path))
    rule = "; the file must hold one JSON list, or one JSON object a line"
    for number, entry in enumerate(parse_json(text, str(path), rule)):
        yield f"{path}, entry {number}", entry


def check_shares(source: str, dev: float, test: float, *, of: str) -> None:
    """Raise UserError where a source's own dev and test fractions are no shares `of` what it splits."""
    if min(dev, test) < 0 or dev + test > 1:
        raise UserError(
            f"{source}: dev_fraction {dev} and test_fraction {test} must be shares of the {of}, their sum at most 1"
        )
