"""Lines and JSON values of files that people bring, compressed or not; every fault of theirs is told in one message."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pal_ds.errors import UserError

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
}
"""What a compressed file begins with; its name may end as it likes."""
_NO_TEXT = {
    b"PAR1": "is a Parquet file; read it with the source HuggingFace, under a name that ends in .parquet",
    b"ARROW1": "is an Arrow file; write it as Parquet or JSON Lines",
    b"PK\x03\x04": "is a ZIP archive (or a workbook of a spreadsheet); unpack it, or save it as CSV",
    b"\x93NUMPY": "is a numpy array; write its rows as JSON Lines",
    # Before UTF-16, whose mark is the beginning of this one.
    codecs.BOM_UTF32_LE: "is UTF-32; save the file as UTF-8",
    codecs.BOM_UTF32_BE: "is UTF-32; save the file as UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16; save the file as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; save the file as UTF-8",
}
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
MOST_NESTED = 200
"""Lists and objects in one another that a JSON value may have; far more would exhaust Python's stack."""


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, those of its content where it is compressed (gzip, zstd, bz2, xz).

    Raises:
        UserError: it holds no text: Parquet, an archive, another encoding than UTF-8.
    """
    with open(path, "rb") as raw:
        # A pipe cannot be wound back.
        start = raw.peek(8)[:8]
        for magic, fault in _NO_TEXT.items():
            if start.startswith(magic):
                raise UserError(f"{path}: {fault}")
        kind = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
        if kind is None:
            yield raw
            return
        opener: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zstd": _open_zstd}[
            kind
        ]
        with opener(raw) as stream:
            yield stream


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa

    compressed: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(compressed, 1 << 20)


def byte_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, which end at a line feed and nowhere else, without a byte-order mark at its start.

    Raises:
        UserError: it holds no text, or its compressed content is damaged.
    """
    with open_bytes(path) as stream:
        lines = iter(stream)
        number = 0
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except _DAMAGED as error:
                raise UserError(
                    f"{path}: cannot be read after line {number} ({error}); the file is damaged or was cut off"
                ) from None
            number += 1
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def as_text(line: bytes, where: str) -> str:
    """A line as text. Raises UserError where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error}), perhaps Windows-1252 or Latin-1; save the file as UTF-8"
        ) from None


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends. Raises UserError with file and line."""
    for number, line in enumerate(byte_lines(path), start=1):
        yield as_text(line, f"{path}:{number}").removesuffix("\n").removesuffix("\r")


def parse_json(text: str, where: str, rule: str = "") -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is none, names a key twice in one object, holds half of a surrogate pair or a number that is too
            long, or is nested too deeply. `rule` ends the message of what is no JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.rstrip("\n") else where
        raise UserError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}){rule}"
        ) from None
    except RecursionError:
        raise UserError(
            f"{where}: lists or objects in one another deeper than {MOST_NESTED}; no record needs that"
        ) from None
    except _RepeatedKeyError as error:
        raise UserError(
            f"{where}: the key {error.args[0]!r} stands twice in one object; keep one of them"
        ) from None
    except ValueError as error:
        # Python refuses to read an integer of more than 4,300 digits.
        raise UserError(f"{where}: a number that cannot be read ({error}); mend it") from None
    # UTF-8 holds no half of a pair: only an escape can bring one.
    if _HALF.search(text) or text.count("[") + text.count("{") > MOST_NESTED:
        refuse_halves(value, where)
    return value


class _RepeatedKeyError(ValueError):
    """A key stands twice in an object: the first value would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return value


def refuse_halves(value: object, where: str, depth: int = 0) -> None:
    """Raise UserError for a JSON value that holds half of a surrogate pair, or is nested too deeply."""
    if depth > MOST_NESTED:
        raise UserError(
            f"{where}: lists or objects in one another deeper than {MOST_NESTED}; no record needs that"
        )
    if isinstance(value, str):
        if not _is_whole(value):
            raise UserError(
                f"{where}: a text holds half of a surrogate pair (half an emoji, as a cut text has): "
                f"{value[:40]!r}; mend its encoding"
            )
    elif isinstance(value, dict):
        for key, part in value.items():
            refuse_halves(key, where, depth + 1)
            refuse_halves(part, where, depth + 1)
    elif isinstance(value, list):
        for part in value:
            refuse_halves(part, where, depth + 1)


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def refuse_non_finite(value: object, where: str, key: str = "") -> None:
    """Raise UserError for a number that JSON cannot write: NaN, an infinity, or one beyond the largest float."""
    if isinstance(value, float) and not math.isfinite(value):
        named = f"'{key}' holds" if key else "holds"
        raise UserError(f"{where}: {named} {value!r}, which no JSON number is; mend or remove it")
    parts = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        parts = ((key, part) for part in value)
    for name, part in parts:
        refuse_non_finite(part, where, str(name))
