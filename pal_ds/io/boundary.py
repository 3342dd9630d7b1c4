"""The boundary at which a file is read: whatever its reader raises becomes one message with file, reason and remedy."""

import contextlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from pal_ds.errors import UserError, storage_error
from pal_ds.io.text_files import parse_json

_PANIC = "PanicException"
"""What libraries in Rust raise where they did not expect to fail; no Exception by its class."""
_LONGEST_REASON = 300


@contextlib.contextmanager
def reading(path: Path | str, kind: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong in the block into a UserError that names the file; UserErrors pass.

    A damaged file fails in the libraries that read it, each in a way of its own (numpy, Arrow, safetensors, JSON,
    pickle), or later, in ours, where a key or a shape is not what it should be.

    Args:
        path: file or folder that the block reads, and does not write.
        kind: what it should be, as in "user table".
        remedy: a sentence that says what to do.

    Raises:
        StorageError: the file may be sound and lies where it cannot be read.
        UserError: anything else.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        shown = storage_error(error, path)
        if shown is None:
            shown = UserError(
                f"{path}: cannot be read ({reason_of(error)}): no {kind}, or a damaged one. {remedy}"
            )
        raise shown from error


def reason_of(error: BaseException) -> str:
    """Return what an exception says in one line, with its class where that alone says nothing.

    >>> reason_of(KeyError("tokens")), reason_of(ValueError("bad magic number\\nin line 3"))
    ("KeyError: 'tokens'", 'bad magic number')
    """
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST_REASON]
    return text if " " in text else f"{type(error).__name__}: {text}"


def read_object(path: Path, kind: str, remedy: str, form: object) -> object:
    """Return the object that a JSON file holds, once it has the form of a TypedDict.

    Raises:
        UserError: as `reading` does, with the same arguments.
    """
    with reading(path, kind, remedy):
        content = parse_json(path.read_text(encoding="utf-8"), str(path), f". {remedy}")
        check_form(content, form)
        return content


def check_form(
    value: object, form: object, name: str = "it", optional: Collection[str] = ()
) -> None:
    """Raise ValueError where a value of JSON is not of the type `form`, which TypedDicts describe; keys may be more.

    Keys of a TypedDict that are `optional` may be missing, as in files of an earlier version.

    >>> check_form({"a": [1, 2.5], "b": None}, dict[str, list[float] | None])
    >>> check_form({"a": [1, "x"]}, dict[str, list[float]])
    Traceback (most recent call last):
    ValueError: it.a[1] is 'x', no float
    """
    origin, parts = get_origin(form), get_args(form)
    if is_typeddict(form):
        _check_type(value, dict, name)
        assert isinstance(value, dict)
        hints: dict[str, object] = get_type_hints(form)
        for key in sorted(hints.keys() & value.keys()):
            check_form(value[key], hints[key], f"{name}.{key}", optional)
        required: Collection[str] = form.__required_keys__  # pyright: ignore[reportAttributeAccessIssue]
        if missing := sorted(set(required) - value.keys() - set(optional)):
            raise ValueError(f"{name} has no {missing[0]!r}")
    elif origin is dict:
        _check_type(value, dict, name)
        for key, part in value.items() if isinstance(value, dict) else ():
            check_form(part, parts[1], f"{name}.{key}", optional)
    elif origin is list:
        _check_type(value, list, name)
        for place, part in enumerate(value) if isinstance(value, list) else ():
            check_form(part, parts[0], f"{name}[{place}]", optional)
    elif origin is Literal:
        if value not in parts:
            raise ValueError(f"{name} is {value!r:.60}, none of {', '.join(map(str, parts))}")
    elif origin in (Union, UnionType):
        if not (value is None and NoneType in parts):
            check_form(value, next(part for part in parts if part is not NoneType), name, optional)
    elif form is not Any and isinstance(form, type):
        _check_type(value, form, name)


def _check_type(value: object, expected: type, name: str) -> None:
    """A whole number is a float, too, of those that a float can be; true is no number."""
    is_right = isinstance(value, expected)
    if expected is float and isinstance(value, int):
        is_right = abs(value) <= sys.float_info.max
    if not is_right or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{name} is {value!r:.60}, no {expected.__name__}")
