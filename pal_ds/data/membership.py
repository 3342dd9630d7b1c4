"""Members of a dataset: users and prompts in order of appearance, and their splits."""

import json
from array import array

import numpy as np
import xxhash

from pal_ds.data.parse import SPLIT_FIELD_NAMES, nearest
from pal_ds.data.records import Record, Text
from pal_ds.data.splits import NO_SPLIT, SplitOptions, prompt_fraction, prompt_splits, seen_users
from pal_ds.errors import UserError


def content_digest(value: Text | tuple[float, ...] | None, where: str = "record") -> bytes:
    """128-bit hash of a text, of chat messages or of a vector."""
    if isinstance(value, str):
        data = b"text" + _utf8(value, where)
    elif value is None:
        data = b"none"
    elif len(value) and isinstance(value[0], dict):
        data = b"chat" + _utf8(json.dumps(value, ensure_ascii=False, sort_keys=True), where)
    else:
        data = b"vector" + np.asarray(value, np.float32).tobytes()
    return xxhash.xxh3_128_digest(data)


def compared(record: Record) -> tuple:
    """The two things a record compares: texts or vectors."""
    pair = record.responses if record.responses is not None else record.response_features
    assert pair is not None, "a record holds responses or response_features"
    return pair


def prompt_digest(record: Record, where: str = "record") -> bytes:
    """Hash what decides the split: the prompt, or where there is none the two responses in any order."""
    prompt = record.prompt if record.responses is not None else record.prompt_features
    if prompt is not None:
        return content_digest(prompt, where)
    both = sorted(content_digest(response, where) for response in compared(record))
    return xxhash.xxh3_128_digest(b"pair" + b"".join(both))


class Membership:
    """Rows of users and prompts; once every record was noted, their splits."""

    def __init__(self, options: SplitOptions) -> None:
        self.options = options
        self.users: dict[str, int] = {}
        self.prompts: dict[bytes, int] = {}
        self.prompt_field, self.prompt_fraction = array("b"), array("d")
        self._user_given = array("b")

    def add_prompt(self, record: Record, where: str = "record") -> tuple[int, bytes]:
        """(row, digest) of the record's prompt, under any split its records name."""
        key = prompt_digest(record, where)
        row = self.prompts.setdefault(key, len(self.prompts))
        code = NO_SPLIT
        if self.options.split == "field":
            if record.split not in SPLIT_FIELD_NAMES:
                close = nearest(str(record.split), SPLIT_FIELD_NAMES)
                raise UserError(
                    f"{where}: split is {record.split!r}{close}; under data.split: field every "
                    f"record names one of {', '.join(SPLIT_FIELD_NAMES)}. Or use data.split: hash"
                )
            code = SPLIT_FIELD_NAMES.index(record.split)
        if row == len(self.prompt_field):
            self.prompt_field.append(code)
            self.prompt_fraction.append(prompt_fraction(self.options.seed, key))
        elif self.prompt_field[row] != code:
            raise UserError(
                f"{where}: its prompt is in split '{record.split}' here and in "
                f"'{SPLIT_FIELD_NAMES[self.prompt_field[row]]}' before; all comparisons of a "
                "prompt belong to one split"
            )
        return row, key

    def add_user(self, record: Record) -> int:
        """Row of the record's user."""
        row = self.users.setdefault(record.user_id, len(self.users))
        if row == len(self._user_given):
            self._user_given.append(-1)
        if record.seen is not None and self._user_given[row] != 0:
            # One record that says "not seen" is enough: that user is held out whole.
            self._user_given[row] = int(record.seen)
        return row

    def prompt_splits(self) -> np.ndarray:
        """Code (train, dev, test) of every prompt."""
        return prompt_splits(
            self.options,
            np.frombuffer(self.prompt_fraction, np.float64),
            np.frombuffer(self.prompt_field, np.int8),
        )

    def seen(self) -> np.ndarray:
        """Bool per user: trained on, not held out."""
        given = np.frombuffer(self._user_given, np.int8)
        return seen_users(self.options, list(self.users), given)


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a text holds half of a surrogate pair ({error.reason}); mend its encoding"
        ) from None
