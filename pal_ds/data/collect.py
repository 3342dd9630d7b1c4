"""Records -> columns: every record is checked, its texts or vectors stored once by content."""

from array import array

import numpy as np
import xxhash

from pal_ds.data.bad_rows import BadRows
from pal_ds.data.kept_texts import SampleKeeper
from pal_ds.data.record_checks import fault_of
from pal_ds.data.records import Record, is_empty
from pal_ds.data.splits import (
    NO_SPLIT,
    Membership,
    SplitOptions,
    check_text,
    compared,
    content_digest,
)
from pal_ds.data.stores import TokenStore, VectorStore
from pal_ds.data.tables import COMPARISON_DTYPE, SOFT_COMPARISON_DTYPE
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError


class Collector:
    """Takes records one by one; `comparisons`, `members` and the store then hold everything."""

    def __init__(
        self,
        encoder: TextEncoder | None,
        options: SplitOptions,
        bad_rows: BadRows | None = None,
    ) -> None:
        self.encoder = encoder
        self.bad_rows = bad_rows or BadRows()
        self.members = Membership(options)
        self.store: TokenStore | VectorStore | None = None
        self.groups: dict[str, int] = {}
        self.num_records = self._num_seen = self._num_stored = 0
        self._responses: dict[bytes, int] = {}
        self._last_bad: str | None = None
        names = ("user", "a", "b", "label", "group", "controversial", "soft", "split", "prompt")
        self._columns: dict[str, array] = {name: array("q") for name in names}
        self._columns |= {name: array("f") for name in ("margin", "probability")}

    def add(self, record: Record) -> None:
        """Take a record; one that is bad by itself is left out, and counts among the bad rows."""
        self._num_seen += 1
        where = record.where or f"record {self._num_seen} (user '{record.user_id}')"
        if fault := fault_of(record):
            error = UserError(f"{where}: {fault}; mend or leave out the record")
            self._add_bad(record, where, error)
            return
        if self.store is None:
            self.store = self._open_store(record, where)
        try:
            self._check(record, where)
        except UserError as error:
            self._add_bad(record, where, error)
            return
        self.bad_rows.num_good += record.where is None
        self.num_records += 1
        group = -1
        if record.group is not None:
            group = self.groups.setdefault(record.group, len(self.groups))
        user = self.members.add_user(record, group)
        prompt, key = self.members.add_prompt(record, where)
        first, second = (self._add_response(key, prompt, record, i, where) for i in (0, 1))
        controversial = -1 if record.controversial is None else int(record.controversial)
        probability = np.nan if record.probability is None else record.probability
        of_record = self.members.options.split == "record"
        split = self.members.named_split(record, where) if of_record else NO_SPLIT
        values = (
            user,
            first,
            second,
            record.label,
            group,
            controversial,
            record.soft,
            split,
            prompt,
        )
        values += (record.margin, probability)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def _add_bad(self, record: Record, where: str, error: UserError) -> None:
        """Count the row of a bad record, once, however many comparisons of it are bad (those of a list)."""
        if record.where is None or record.where != self._last_bad:
            # The source has counted its row among the good ones.
            self.bad_rows.num_good -= record.where is not None
            self.bad_rows.add(where, error)
        self._last_bad = record.where

    def comparisons(self) -> tuple[np.ndarray, np.ndarray]:
        """(table, in SOFT_COMPARISON_DTYPE where a label is soft; prompt of each comparison).

        Its `split` is the one that the record names, or NO_SPLIT.
        """
        columns = {name: np.frombuffer(c, c.typecode) for name, c in self._columns.items()}
        prompts = columns.pop("prompt")
        dtype = SOFT_COMPARISON_DTYPE if columns["soft"].any() else COMPARISON_DTYPE
        if dtype is COMPARISON_DTYPE:
            del columns["soft"]
        table = np.zeros(self.num_records, dtype)
        for name, column in columns.items():
            table[name] = column
        return table, prompts

    def _open_store(self, record: Record, where: str) -> TokenStore | VectorStore:
        if record.response_features is not None:
            return VectorStore()
        if self.encoder is None:
            raise UserError(
                f"{where}: holds text, but there is no tokenizer: this run was made from vectors. "
                "Give records with response_features"
            )
        return TokenStore(self.encoder, SampleKeeper(self.members))

    def _check(self, record: Record, where: str) -> None:
        is_text = record.response_features is None
        if is_text != isinstance(self.store, TokenStore):
            raise UserError(
                f"{where}: some records hold text, some vectors; a dataset holds one of them"
            )
        if self.members.options.split in ("field", "record"):
            self.members.named_split(record, where)
        if is_text and any(map(is_empty, compared(record))):
            raise UserError(
                f"{where}: a response is empty; every response needs text. Remove or mend the row"
            )
        if record.where is None:
            # Readers of files look for this themselves.
            check_text(record.user_id, f"{where}: user id {record.user_id!r}")
            for value in (record.prompt, record.tools, *compared(record)) if is_text else ():
                content_digest(value, where)

    def _add_response(
        self, prompt_key: bytes, prompt: int, record: Record, index: int, where: str
    ) -> int:
        response = compared(record)[index]
        key = xxhash.xxh3_128_digest(prompt_key + content_digest(response, where))
        row = self._responses.setdefault(key, len(self._responses))
        if row == self._num_stored:
            self._num_stored += 1
            if isinstance(self.store, TokenStore):
                self.store.add(prompt, record.prompt, response, record.tools)
            elif self.store is not None:
                self.store.add(prompt, record.prompt_features, response, where)
        return row
