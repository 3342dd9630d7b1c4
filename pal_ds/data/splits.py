"""Split of each comparison: decided per prompt, with users that are held out whole."""

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from pal_ds.data.parse import SPLIT_FIELD_NAMES, nearest
from pal_ds.data.record_checks import fault_of
from pal_ds.data.records import Record, Text, shown
from pal_ds.errors import UserError

SPLITS = ("train", "dev", "test", "unseen_train", "unseen_dev", "unseen_test")
"""Names in the order of their codes on disk."""
NUM_BASE_SPLITS = 3
NO_SPLIT = -1


@dataclass(frozen=True)
class SplitOptions:
    """Options of the split of prompts and users; the defaults put everything in train."""

    split: Literal["hash", "ordinal", "field", "record"] = "hash"
    dev_fraction: float = 0.0
    test_fraction: float = 0.0
    unseen_user_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("hash", "ordinal", "field", "record"):
            raise UserError(f"split is '{self.split}'; it must be hash, ordinal, field or record")
        for key in ("dev_fraction", "test_fraction", "unseen_user_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key} is {getattr(self, key)}; it must lie between 0 and 1")
        if self.dev_fraction + self.test_fraction > 1:
            raise UserError(
                f"dev_fraction {self.dev_fraction} + test_fraction {self.test_fraction} is more "
                "than 1; their sum is the share of prompts that is not trained on"
            )


def keyed_fraction(seed: int, key: bytes) -> float:
    """Place a prompt or user in [0, 1) by a hash: the lowest prompts go to test, the next to dev."""
    return xxhash.xxh3_64_intdigest(key, seed=seed & (2**64 - 1)) / 2**64


def prompt_splits(options: SplitOptions, fractions: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Decide the split of each distinct prompt, in order of first appearance.

    Args:
        options: how to split.
        fractions: place of each prompt in [0, 1), see `keyed_fraction`; fp64 [P].
        fields: split code that the records themselves give; int [P], read for `split: field` alone.

    Returns:
        place of each prompt's split in `SPLITS`: train 0, dev 1 or test 2; int8 [P].

    >>> options = SplitOptions(dev_fraction=0.2, test_fraction=0.1)
    >>> prompt_splits(options, np.array([0.05, 0.25, 0.8]), np.zeros(3)).tolist()
    [2, 1, 0]
    """
    if options.split == "field":
        return fields.astype(np.int8)
    num_prompts = len(fractions)
    if options.split == "ordinal":
        train_end = round(num_prompts * (1 - options.dev_fraction - options.test_fraction))
        dev_end = round(num_prompts * (1 - options.test_fraction))
        order = np.arange(num_prompts)
        return (order >= train_end).astype(np.int8) + (order >= dev_end)
    codes = np.zeros(num_prompts, np.int8)
    codes[fractions < options.test_fraction + options.dev_fraction] = SPLITS.index("dev")
    codes[fractions < options.test_fraction] = SPLITS.index("test")
    return codes


def content_digest(value: Text | tuple[float, ...] | None, where: str = "record") -> bytes:
    """128-bit hash of a text, of chat messages (what templates show of them), of tools or of a vector."""
    if isinstance(value, str):
        data = b"text" + check_text(value, where)
    elif value is None:
        data = b"none"
    elif len(value) and isinstance(value[0], dict):
        # Of messages what a template can show; the schemas of tools have no role, and count whole.
        said = [
            shown(part) if isinstance(part, dict) and "role" in part else part for part in value
        ]
        data = b"chat" + check_text(json.dumps(said, ensure_ascii=False, sort_keys=True), where)
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
    if prompt is not None and record.tools:
        # The same question with other tools is another prompt.
        both = content_digest(prompt, where) + content_digest(record.tools, where)
        return xxhash.xxh3_128_digest(b"tools" + both)
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
        self.user_group, self._user_given = array("i"), array("b")

    def add_prompt(self, record: Record, where: str = "record") -> tuple[int, bytes]:
        """(row, digest) of the record's prompt, under any split its records name."""
        key = prompt_digest(record, where)
        row = self.prompts.setdefault(key, len(self.prompts))
        code = self.named_split(record, where) if self.options.split == "field" else NO_SPLIT
        if row == len(self.prompt_field):
            self.prompt_field.append(code)
            self.prompt_fraction.append(keyed_fraction(self.options.seed, key))
        elif self.prompt_field[row] != code:
            raise UserError(
                f"{where}: its prompt is in split '{record.split}' here and in "
                f"'{SPLIT_FIELD_NAMES[self.prompt_field[row]]}' before; all comparisons of a "
                "prompt belong to one split. Where answers are held out and not prompts: data.split: record"
            )
        return row, key

    def has_split(self, record: Record) -> bool:
        """Return False for a record without a split: a bad row, or one that should name it; `Collector` counts them."""
        if fault_of(record):
            return False
        names_none = self.options.split not in ("field", "record")
        return names_none or record.split in SPLIT_FIELD_NAMES

    def trained_on(self) -> Callable[[Record], bool]:
        """Once every record was noted: say of a record whether it is of the train split, and of a seen user."""
        codes, seen = self.prompt_splits(), dict(zip(self.users, self.seen(), strict=True))

        def is_trained_on(record: Record) -> bool:
            if self.options.split == "record":
                is_train = record.split == SPLITS[0]
            else:
                is_train = codes[self.prompts[prompt_digest(record)]] == 0
            return bool(is_train and seen[record.user_id])

        return is_trained_on

    def named_split(self, record: Record, where: str) -> int:
        """Code of the split that a record names. Raises UserError where it names none."""
        if record.split not in SPLIT_FIELD_NAMES:
            close = nearest(str(record.split), SPLIT_FIELD_NAMES)
            raise UserError(
                f"{where}: split is {record.split!r}{close}; under data.split: {self.options.split} every "
                f"record names one of {', '.join(SPLIT_FIELD_NAMES)}. Or use data.split: hash"
            )
        return SPLIT_FIELD_NAMES.index(record.split)

    def add_user(self, record: Record, group: int = -1) -> int:
        """Row of the record's user, whose group is the first that is given."""
        row = self.users.setdefault(record.user_id, len(self.users))
        if row == len(self._user_given):
            check_text(record.user_id, f"user id {record.user_id!r}")
            self._user_given.append(-1)
            self.user_group.append(-1)
        if self.user_group[row] < 0:
            self.user_group[row] = group
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
        """Bool per user: trained on, not held out; where no record says, a hash of the id decides."""
        given = np.frombuffer(self._user_given, np.int8)
        seen = given != 0
        if self.options.unseen_user_fraction:
            for user_id, row in self.users.items():
                if given[row] < 0:
                    key = b"user\x1f" + user_id.encode("utf-8", "surrogatepass")
                    fraction = keyed_fraction(self.options.seed, key)
                    seen[row] = fraction >= self.options.unseen_user_fraction
        return seen


def check_text(text: str, where: str) -> bytes:
    """The text in UTF-8; a UserError for one that holds half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a text holds half of a surrogate pair ({error.reason}); mend its encoding"
        ) from None
