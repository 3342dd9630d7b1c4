"""Records -> columns: every record is checked, its texts or vectors stored once by content."""

from array import array

import numpy as np
import xxhash

from pal_ds.data.chat import is_empty
from pal_ds.data.membership import Membership, content_digest
from pal_ds.data.records import Record
from pal_ds.data.samples import SampleKeeper
from pal_ds.data.splits import SplitOptions
from pal_ds.data.stores import TokenStore
from pal_ds.data.tables import COMPARISON_DTYPE
from pal_ds.data.tokenise import TextEncoder
from pal_ds.data.vectors import VectorStore
from pal_ds.errors import UserError


class Collector:
    """Takes records one by one; `comparisons`, `members` and the store then hold everything."""

    def __init__(self, encoder: TextEncoder | None, options: SplitOptions) -> None:
        self.encoder = encoder
        self.members = Membership(options)
        self.store: TokenStore | VectorStore | None = None
        self.samples: SampleKeeper | None = None
        self.groups: dict[str, int] = {}
        self.user_group = array("i")
        self.num_records = self._num_stored = 0
        self._responses: dict[bytes, int] = {}
        self._ints = {name: array("q") for name in ("user", "a", "b", "label", "group", "prompt")}
        self._floats = {name: array("f") for name in ("margin", "probability")}

    def add(self, record: Record) -> None:
        """Check one record and append it."""
        self.num_records += 1
        where = f"record {self.num_records} (user '{record.user_id}')"
        if self.store is None:
            self._open_store(record, where)
        self._check(record, where)
        group = -1
        if record.group is not None:
            group = self.groups.setdefault(record.group, len(self.groups))
        user = self._add_user(record, group)
        prompt, key = self.members.add_prompt(record, where)
        first, second = (self._add_response(key, prompt, record, i, where) for i in (0, 1))
        values = (user, first, second, record.label, group, prompt)
        for column, value in zip(self._ints.values(), values, strict=True):
            column.append(value)
        self._floats["margin"].append(record.margin)
        known = record.probability is not None
        self._floats["probability"].append(record.probability if known else np.nan)

    def comparisons(self) -> tuple[np.ndarray, np.ndarray]:
        """(table in COMPARISON_DTYPE, all in train so far; row of each comparison's prompt)."""
        table = np.zeros(self.num_records, COMPARISON_DTYPE)
        for name, column in [*self._ints.items(), *self._floats.items()]:
            if name != "prompt":
                table[name] = np.frombuffer(column, column.typecode)
        return table, np.frombuffer(self._ints["prompt"], np.int64)

    def _open_store(self, record: Record, where: str) -> None:
        if record.response_features is not None:
            self.store = VectorStore()
            return
        if self.encoder is None:
            raise UserError(
                f"{where}: holds text, but there is no tokenizer: this run was made from vectors. "
                "Give records with response_features"
            )
        members = self.members
        self.samples = SampleKeeper(
            lambda row: members.prompt_fraction[row], lambda row: members.prompt_field[row] > 0
        )
        self.store = TokenStore(self.encoder, self.samples)

    def _check(self, record: Record, where: str) -> None:
        is_text = record.response_features is None
        if is_text != (self.store.kind == "tokens"):
            raise UserError(
                f"{where}: some records hold text and some vectors; a dataset holds one or the other"
            )
        if record.label not in (-1, 1):
            raise UserError(f"{where}: label is {record.label!r}; it must be -1 or 1")
        if is_text and any(is_empty(response) for response in record.responses):
            raise UserError(
                f"{where}: a response is empty; every response needs text. Remove the row or mend it"
            )

    def _add_user(self, record: Record, group: int) -> int:
        row = self.members.add_user(record)
        if row == len(self.user_group):
            self.user_group.append(group)
        if self.user_group[row] < 0:
            self.user_group[row] = group
        return row

    def _add_response(
        self, prompt_key: bytes, prompt: int, record: Record, index: int, where: str
    ) -> int:
        responses = record.responses if record.responses is not None else record.response_features
        key = xxhash.xxh3_128_digest(prompt_key + content_digest(responses[index], where))
        row = self._responses.setdefault(key, len(self._responses))
        if row == self._num_stored:
            self._num_stored += 1
            self.store.add(prompt, record, index)
        return row
