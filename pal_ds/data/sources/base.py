"""The base of all sources: a dataset that yields records, as often as it is asked."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import xxhash

from pal_ds.data.records import Record
from pal_ds.errors import UserError
from pal_ds.io.files import feed
from pal_ds.users.ids import POPULATION_USER


class Source(ABC):
    """One dataset, one file. `records()` may be called again and then yields the same again."""

    licence: str | None = None

    @cached_property
    def dropped(self) -> Counter[str]:
        """Rows the source itself left out in the last `records()`, by reason."""
        return Counter()

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
    """The paths as a list; a UserError names one that is missing, a folder or empty."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise UserError("no file is given: the list of paths is empty; name at least one file")
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file; check the path (it is read from {Path.cwd()})")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name the file in it")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; it must hold at least one record")
    return [Path(path) for path in paths]


def describe_files(paths: Iterable[Path]) -> list[dict]:
    """Name, size and content hash of each file."""
    described = []
    for path in paths:
        content = feed(xxhash.xxh3_128(), path).hexdigest()
        described.append({"path": str(path), "bytes": path.stat().st_size, "xxh3_128": content})
    return described


def read_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", parsed JSON) for each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno}); every line "
                    "must hold one complete JSON object"
                ) from None


def read_json_list(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, entry) of a JSON list, or of JSON Lines."""
    with open(path, "rb") as file:
        first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first != b"[":
        yield from read_lines(path)
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); the "
            "file must hold one JSON list, or one JSON object a line"
        ) from None
    for number, entry in enumerate(entries):
        yield f"{path}, entry {number}", entry
