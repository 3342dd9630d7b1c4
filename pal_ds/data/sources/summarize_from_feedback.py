"""OpenAI's TL;DR comparisons with PAL's users: top workers who like summaries long, or short."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import stable_fraction
from pal_ds.data.sources.hub_source import (
    PARQUET_EXPORT,
    HubPath,
    HubRows,
    HubSource,
    PromptSplits,
    text_of,
)
from pal_ds.errors import UserError

SPLITS = ("train", "validation")


class _Comparison(NamedTuple):
    split: str
    worker: str
    post: str
    summaries: tuple[str, str]
    choice: int


@final
@dataclass(eq=False)
class SummarizeFromFeedback(HubSource):
    """One user per worker; a comparison asks which of two summaries of a post is better.

    `preference: length` is the variant of P-RLHF and PAL: what a worker chose is replaced by a
    planted taste. Of the `num_workers` who answered most often in the train split, those at the
    ranks in `minority` prefer the shorter summary, the others the longer one; so any two users of
    different groups disagree on every pair. `preference: choice` keeps what the workers chose.

    Workers who are not among these but have `unseen_min_comparisons` in the validation split are
    new users (seen: false), held out whole: `few_shot` and `adapt` fit them to pairs of
    unseen_train and test on unseen_test. All others are dropped.

    The records' own split: the hub's validation posts are test, a tenth of its train posts dev. It
    gives new users their pairs of the train split to be fitted to; `data.split: hash` divides the
    posts of both. Lengths are in characters. PAL lists the new users of its minority by id; here
    a hash draws `unseen_minority_fraction` of them.

    Dropped and counted: `policy` (both summaries must be by supervised policies, as in PAL, unless
    `policies: all`), `no_post` (news articles), `no_worker`, `empty_response`, `equal_length`,
    `other_worker`, `prompt_in_two_splits`.

    Args:
        path: hub id, folder, file, or {train: file, validation: file} of config `comparisons`.
        preference: length or choice.
        policies: supervised or all.
        num_workers: how many seen users.
        minority: their ranks, 0 being who answered most.
        unseen_min_comparisons: what makes a new user; null for none.
        unseen_minority_fraction: share of the new users who prefer the shorter summary.
        seed: of the draw of new users' tastes and of the dev posts.
    """

    licence = "see openai/summarize_from_feedback; posts are by Reddit users"

    path: HubPath = "openai/summarize_from_feedback"
    preference: Literal["length", "choice"] = "length"
    policies: Literal["supervised", "all"] = "supervised"
    num_workers: int = 10
    minority: tuple[int, ...] = (3, 4, 5)
    unseen_min_comparisons: int | None = 100
    unseen_minority_fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        self.minority = tuple(self.minority)
        if self.num_workers < 1 or not all(0 <= rank < self.num_workers for rank in self.minority):
            raise UserError(
                f"summarize_from_feedback: num_workers is {self.num_workers} and minority "
                f"{list(self.minority)}; the ranks of a minority lie between 0 and num_workers - 1"
            )
        self._rows = HubRows(
            self.path,
            SPLITS,
            ("info", "summaries", "choice", "worker"),
            data_dir="comparisons",
            revision=PARQUET_EXPORT,
        )

    def records(self) -> Iterator[Record]:
        """Comparisons of seen and new users, in the order of the dataset."""
        groups, unseen = self._groups, self._unseen
        self.dropped.clear()
        posts = PromptSplits()

        def comparison(where: str, row: tuple[str, dict[str, Any]]) -> Iterator[Record]:
            reason, item = self._check(where, *row)
            if item is None:
                self.dropped[reason] += 1
            elif item.worker not in groups:
                self.dropped["other_worker"] += 1
            elif not posts.admits(item.post, item.split):
                self.dropped["prompt_in_two_splits"] += 1
            else:
                yield self._record(item, groups[item.worker], item.worker not in unseen)

        yield from self.each_row(self._rows.with_splits(), comparison)

    def describe(self) -> dict:
        return {**super().describe(), "groups": self._groups, "unseen": sorted(self._unseen)}

    def _record(self, item: _Comparison, group: str, seen: bool) -> Record:
        split = "test"
        if item.split == "train":
            is_dev = stable_fraction("dev", self.seed, item.post) < 0.1
            split = "dev" if is_dev else "train"
        by_length = self.preference == "length"
        first, second = map(len, item.summaries)
        prefers_first = (first > second) == (group == "longer") if by_length else item.choice == 0
        return Record(
            user_id=item.worker,
            label=-1 if prefers_first else 1,
            prompt=item.post,
            responses=item.summaries,
            group=group if by_length else None,
            split=split,
            seen=seen,
            controversial=True if by_length else None,
        )

    def _check(self, where: str, split: str, row: dict[str, Any]) -> tuple[str, _Comparison | None]:
        info, summaries = row["info"] or {}, row["summaries"]
        if not isinstance(summaries, list) or len(summaries) != 2:
            raise UserError(f"{where}: 'summaries' must be two of {{text, policy, note}}")
        if row["choice"] not in (0, 1):
            raise UserError(f"{where}: 'choice' is {row['choice']!r}; it must be 0 or 1")
        policies = [text_of(summary.get("policy"), where, "policy") for summary in summaries]
        if self.policies == "supervised" and not all(
            "sup" in p and "ppo" not in p for p in policies
        ):
            return "policy", None
        post, worker = text_of(info.get("post"), where, "post"), row["worker"]
        first, second = (text_of(summary.get("text"), where, "text") for summary in summaries)
        if not post:
            return "no_post", None
        if not worker:
            return "no_worker", None
        if not first or not second:
            return "empty_response", None
        if self.preference == "length" and len(first) == len(second):
            return "equal_length", None
        return "", _Comparison(split, str(worker), post, (first, second), row["choice"])

    @cached_property
    def _counts(self) -> dict[str, Counter[str]]:
        """Comparisons that can be used: split -> worker -> how many."""
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for where, split, row in self._rows:
            # Bad rows are counted where records are read.
            with contextlib.suppress(UserError):
                _, item = self._check(where, split, row)
                if item is not None:
                    counts[item.split][item.worker] += 1
        return counts

    @cached_property
    def _seen(self) -> list[str]:
        """Seen workers by rank; who answered equally often stands by id."""
        counts = self._counts["train"]
        return sorted(counts, key=lambda worker: (-counts[worker], worker))[: self.num_workers]

    @cached_property
    def _unseen(self) -> set[str]:
        least = self.unseen_min_comparisons
        if least is None:
            return set()
        counts = self._counts["validation"]
        return {worker for worker in counts if counts[worker] >= least} - {*self._seen}

    @cached_property
    def _groups(self) -> dict[str, str]:
        """longer or shorter for every user, seen and new."""
        ranked = enumerate(self._seen)
        groups = {w: "shorter" if rank in self.minority else "longer" for rank, w in ranked}
        for worker in sorted(self._unseen):
            draw = stable_fraction("taste", self.seed, worker)
            groups[worker] = "shorter" if draw < self.unseen_minority_fraction else "longer"
        return groups
