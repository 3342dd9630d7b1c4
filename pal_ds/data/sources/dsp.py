"""Domain-specific preference (DSP): five writers answer each query, each prefers its own answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import (
    Source,
    check_files,
    describe_files,
    json_list_or_errors,
    stable_fraction,
)
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class Dsp(Source):
    """One user per domain; user u prefers u's own answer to each of the others.

    Every unordered pair is judged both ways by two users, so one ranking for all is right half of
    the time. Which answer comes first is settled by a hash, so position tells nothing. The
    published file has an empty answer: its comparisons are dropped and counted (`empty_response`).

    Args:
        path: the raw JSON list of {"query", "responses": {domain: text}}.
        users: the domains whose preferences are yielded, against the answers of all; null for all.
        new_users: those of them who are held out whole, as users whom a trained run meets for the first time. Their
            answers stay, as answers that all others reject.
    """

    licence = "CC BY-NC 4.0 (Linear95/DSP)"

    path: str
    users: list[str] | None = None
    new_users: list[str] | None = None

    def records(self) -> Iterator[Record]:
        """Queries x domains x (domains - 1) comparisons, query by query."""
        self.dropped.clear()
        yield from self.each_row(json_list_or_errors(check_files(self.path)[0]), self._pairs)

    def _pairs(self, where: str, item: object) -> Iterator[Record]:
        query, responses = self._check(where, item)
        for key, users in (("users", self.users), ("new_users", self.new_users)):
            for user in users or ():
                if user not in responses:
                    raise UserError(
                        f"{where}: has no response of '{user}'{nearest(user, responses)}, who is "
                        f"among `{key}`; there are {', '.join(responses)}"
                    )
        for user, other in permutations(responses, 2):
            own, text = responses[user], responses[other]
            if user not in (self.users or responses):
                continue
            if not own.strip() or not text.strip():
                self.dropped["empty_response"] += 1
                continue
            own_first = stable_fraction(query, user, other) < 0.5
            yield Record(
                user_id=user,
                label=-1 if own_first else 1,
                prompt=query,
                responses=(own, text) if own_first else (text, own),
                group=user,
                seen=False if user in (self.new_users or ()) else None,
            )

    def describe(self) -> dict:
        return {"class": "Dsp", "files": describe_files(check_files(self.path))}

    @staticmethod
    def _check(where: str, item: object) -> tuple[str, dict[str, str]]:
        for key, kind in (("query", str), ("responses", dict)):
            if not isinstance(item, dict) or not isinstance(item.get(key), kind):
                raise UserError(
                    f"{where}: '{key}' is missing or is no {'text' if kind is str else 'object'}; "
                    'an entry is {"query": text, "responses": {domain: text}}'
                )
        for domain, text in item["responses"].items():
            if not isinstance(text, str):
                raise UserError(f"{where}: the response of '{domain}' is {text!r}; it must be text")
        return item["query"], item["responses"]
