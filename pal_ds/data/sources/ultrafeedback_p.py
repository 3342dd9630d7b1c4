"""UF-P: UltraFeedback's four ratings of each completion as four users who look at one aspect each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import stable_fraction
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource, text_of
from pal_ds.errors import UserError

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


class _Completion(NamedTuple):
    response: str
    ratings: dict[str, float] | None


@final
@dataclass(eq=False)
class UltraFeedbackP(HubSource):
    """User u prefers, of two completions to an instruction, the one rated higher on aspect u.

    UF-P-2 has the users helpfulness and honesty, UF-P-4 all four. A pair is controversial where
    two of the *selected* users' ratings rank it in opposite ways; a tie never makes it so. VPL's
    published sets judge that over all four users and count coin flips for ties.

    Dropped and counted, in comparisons: `tie`, `no_rating` (one of the users' ratings is N/A),
    `empty_response`, `not_controversial`; and `empty_prompt` in rows.

    Args:
        path: hub id, folder or file.
        users: the aspects that are users.
        ties: what a user says of equal ratings: `drop` leaves the comparison out, `random` flips a
            coin that is keyed by seed, user and pair (VPL's way).
        controversial_only: keep the pairs on which users disagree.
        pairs_per_prompt: so many pairs of completions, drawn per prompt; null: all of them. VPL's
            sets have one.
        seed: of draws and coins.
    """

    licence = "MIT (openbmb/UltraFeedback)"

    path: HubPath = "openbmb/UltraFeedback"
    users: tuple[str, ...] = ("helpfulness", "honesty")
    ties: Literal["drop", "random"] = "drop"
    controversial_only: bool = False
    pairs_per_prompt: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.users = tuple(self.users)
        for user in self.users:
            if user not in ASPECTS:
                raise UserError(
                    f"ultrafeedback_p: no user '{user}'{nearest(user, ASPECTS)}; the aspects that "
                    f"were rated are {', '.join(ASPECTS)}"
                )
        if not self.users or len({*self.users}) != len(self.users):
            raise UserError("ultrafeedback_p: users must name one aspect or more, each once")
        if self.pairs_per_prompt is not None and self.pairs_per_prompt < 1:
            raise UserError(
                f"ultrafeedback_p: pairs_per_prompt is {self.pairs_per_prompt}; it must be 1 or "
                "more, or null for all"
            )
        self._rows = HubRows(self.path, ("train",), ("instruction", "completions"))

    def records(self) -> Iterator[Record]:
        """Row by row, pair by pair, every user."""
        self.dropped.clear()
        yield from self.each_row(self._rows.with_splits(), self._preferences)

    def _preferences(
        self, where: str, split_and_row: tuple[str, dict[str, Any]]
    ) -> Iterator[Record]:
        _, row = split_and_row
        prompt = text_of(row["instruction"], where, "instruction")
        if not prompt:
            self.dropped["empty_prompt"] += 1
            return
        completions = [self._check(where, item) for item in row["completions"] or ()]
        for i, j in self._pairs(prompt, len(completions)):
            yield from self._preference_of(prompt, (i, j), completions[i], completions[j])

    def _pairs(self, prompt: str, num_completions: int) -> list[tuple[int, int]]:
        pairs = list(combinations(range(num_completions), 2))
        if self.pairs_per_prompt is None:
            return pairs
        drawn = sorted(pairs, key=lambda pair: stable_fraction("pair", self.seed, prompt, *pair))
        return sorted(drawn[: self.pairs_per_prompt])

    def _preference_of(
        self, prompt: str, pair: tuple[int, int], first: _Completion, second: _Completion
    ) -> Iterator[Record]:
        if first.ratings is None or second.ratings is None:
            self.dropped["no_rating"] += len(self.users)
            return
        if not first.response or not second.response:
            self.dropped["empty_response"] += len(self.users)
            return
        lead = {user: first.ratings[user] - second.ratings[user] for user in self.users}
        controversial = max(lead.values()) > 0 > min(lead.values())
        for user in self.users:
            if self.controversial_only and not controversial:
                self.dropped["not_controversial"] += 1
            elif lead[user] == 0 and self.ties == "drop":
                self.dropped["tie"] += 1
            else:
                coin = stable_fraction("tie", self.seed, user, prompt, *pair) < 0.5
                prefers_first = coin if lead[user] == 0 else lead[user] > 0
                yield Record(
                    user_id=user,
                    label=-1 if prefers_first else 1,
                    prompt=prompt,
                    responses=(first.response, second.response),
                    group=user,
                    controversial=controversial,
                )

    def _check(self, where: str, item: dict[str, Any]) -> _Completion:
        response = text_of(item.get("response"), where, "completions.response")
        ratings = {}
        for user in self.users:
            rating = ((item.get("annotations") or {}).get(user) or {}).get("Rating")
            if rating is None or rating == "N/A":
                return _Completion(response, None)
            try:
                ratings[user] = float(rating)
            except (TypeError, ValueError):
                raise UserError(
                    f"{where}: the rating of {user} is {rating!r}; it must be a number or N/A"
                ) from None
        return _Completion(response, ratings)
