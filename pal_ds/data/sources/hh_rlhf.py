"""Anthropic's helpful and harmless comparisons: two transcripts that share all but the last answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.data.sources.hub_source import HubRows, PromptSplits, text_of
from pal_ds.data.sources.text_score import cut_transcript
from pal_ds.errors import UserError
from pal_ds.users.ids import POPULATION_USER

SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
SPLITS = ("train", "test")
MARKER = "\n\nAssistant:"


@final
@dataclass(eq=False)
class HhRlhf(Source):
    """The chosen answer before the rejected one; what precedes the last "Assistant:" is the prompt.

    `group` is helpful or harmless, after the subset. `users: objective` makes these two the users
    (VPL's reading); `population` has one user, for a general reward model (DSP's).

    The records' own split is the hub's train and test. Dropped and counted: `no_response_marker`,
    `prompt_differs` (the conversations part earlier), `empty_response`, `prompt_in_two_splits`.

    Args:
        path: hub id, or a folder with a folder per subset.
        subsets: which of helpful-base, helpful-online, helpful-rejection-sampled, harmless-base.
        users: population or objective.
    """

    licence = "MIT (Anthropic/hh-rlhf)"

    path: str = "Anthropic/hh-rlhf"
    subsets: tuple[str, ...] = ("helpful-base", "harmless-base")
    users: Literal["population", "objective"] = "population"

    def __post_init__(self) -> None:
        self.subsets = tuple(self.subsets)
        for subset in self.subsets:
            if subset not in SUBSETS:
                raise UserError(
                    f"hh_rlhf: no subset '{subset}'{nearest(subset, SUBSETS)}; there are "
                    f"{', '.join(SUBSETS)}"
                )
        if Path(self.path).is_file():
            raise UserError(
                f"hh_rlhf: path {self.path} is a file; give the folder that holds {self.subsets}"
            )
        self._rows = {
            subset: HubRows(self.path, SPLITS, ("chosen", "rejected"), data_dir=subset)
            for subset in self.subsets
        }

    def records(self) -> Iterator[Record]:
        """Subset by subset, the train split before the test split."""
        self.dropped.clear()
        prompts = PromptSplits()
        rows = (
            (where, row if isinstance(row, UserError) else (subset.partition("-")[0], *row))
            for subset, rows in self._rows.items()
            for where, row in rows.with_splits()
        )
        yield from self.each_row(rows, partial(self._pair, prompts))

    def _pair(
        self, prompts: PromptSplits, where: str, labelled: tuple[str, str, dict[str, Any]]
    ) -> Iterator[Record]:
        objective, split, row = labelled
        chosen, rejected = (
            cut_transcript(text_of(row[key], where, key), MARKER) for key in ("chosen", "rejected")
        )
        if chosen is None or rejected is None:
            self.dropped["no_response_marker"] += 1
        elif chosen[0] != rejected[0]:
            self.dropped["prompt_differs"] += 1
        elif not chosen[1] or not rejected[1]:
            self.dropped["empty_response"] += 1
        elif not prompts.admits(chosen[0], split):
            self.dropped["prompt_in_two_splits"] += 1
        else:
            yield Record(
                user_id=objective if self.users == "objective" else POPULATION_USER,
                label=-1,
                prompt=chosen[0],
                responses=(chosen[1], rejected[1]),
                group=objective,
                split=split,
            )

    def describe(self) -> dict:
        read = {subset: rows.describe() for subset, rows in self._rows.items()}
        return {"class": "HhRlhf", "subsets": read}

    def num_records(self) -> int:
        return sum(map(len, self._rows.values()))
