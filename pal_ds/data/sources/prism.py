"""PRISM: people from 75 countries rated the answers of several models in dialogues of many turns."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, final

from pal_ds.data.records import Message, Record
from pal_ds.data.sources.base import check_shares, stable_fraction
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource, text_of
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class Prism(HubSource):
    """In each turn the chosen answer against *each* rejected one; the dialogue so far is the prompt.

    Answers are plain texts and prompts chat messages, in which the chosen answers stand for the
    assistant. (LoRe's code puts the list of all rejected answers into one text, brackets and all,
    which tells it from the chosen one at a glance.)

    Use `data.split: field`: the records' own split is decided per dialogue, by its opening words,
    so that no turn is tested on whose continuation was trained on. `data.split: hash` would part
    the turns of a dialogue. Hold users out whole with `data.unseen_user_fraction`.

    Dropped and counted: `few_dialogues` (dialogues), `no_user_text`, `no_chosen`, `no_rejected`
    (turns; the dialogue ends at one without a chosen answer), `empty_response` (comparisons).

    Args:
        path: hub id, folder, or `conversations.jsonl`.
        min_dialogues: leave out users with fewer; LoRe asks for 6.
        dev_fraction: share of the dialogues for dev.
        test_fraction: and for test.
        seed: of the split.
    """

    licence = "CC BY 4.0 (people's texts), CC BY-NC 4.0 (models'; HannahRoseKirk/prism-alignment)"

    path: HubPath = "HannahRoseKirk/prism-alignment"
    min_dialogues: int = 1
    dev_fraction: float = 0.05
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares("prism", self.dev_fraction, self.test_fraction, of="dialogues")
        columns = ("conversation_id", "user_id", "conversation_history")
        self._rows = HubRows(self.path, ("train",), columns, name="conversations")

    def records(self) -> Iterator[Record]:
        """Dialogue by dialogue, turn by turn."""
        self.dropped.clear()
        yield from self.each_row(self._rows.with_splits(), self._enough)

    def _enough(self, where: str, split_and_row: tuple[str, dict[str, Any]]) -> Iterator[Record]:
        _, row = split_and_row
        if self._num_dialogues[row["user_id"]] < self.min_dialogues:
            self.dropped["few_dialogues"] += 1
            return iter(())
        return self._dialogue(where, row)

    @cached_property
    def _num_dialogues(self) -> Counter[str]:
        return Counter(row["user_id"] for _, _, row in self._rows)

    def _dialogue(self, where: str, row: dict[str, Any]) -> Iterator[Record]:
        where = f"{where} ({row['conversation_id']})"
        entries = sorted(row["conversation_history"] or (), key=lambda entry: entry["turn"])
        prompt: list[Message] = []
        split = None
        for _, turn in groupby(entries, key=lambda entry: entry["turn"]):
            said, chosen, rejected = _turn(where, list(turn))
            if not said:
                self.dropped["no_user_text"] += 1
                return
            split = split or self._split_of(said)
            prompt = [*prompt, {"role": "user", "content": said}]
            if chosen is None:
                self.dropped["no_chosen"] += 1
                return
            if not rejected:
                self.dropped["no_rejected"] += 1
            for answer in rejected:
                if not answer or not chosen:
                    self.dropped["empty_response"] += 1
                    continue
                yield Record(
                    user_id=str(row["user_id"]),
                    label=-1,
                    prompt=prompt,
                    responses=(chosen, answer),
                    split=split,
                )
            prompt = [*prompt, {"role": "assistant", "content": chosen}]

    def _split_of(self, opening: str) -> str:
        """By the opening words: dialogues that begin alike have a prompt in common."""
        place = stable_fraction("dialogue", self.seed, opening)
        if place < self.test_fraction:
            return "test"
        return "dev" if place < self.test_fraction + self.dev_fraction else "train"


def _turn(where: str, entries: list[dict[str, Any]]) -> tuple[str, str | None, list[str]]:
    """Read (the user's text, the chosen answer or None where there is none, the rejected ones)."""
    said, chosen, rejected = "", None, []
    for entry in entries:
        text = text_of(entry["content"], where, "conversation_history.content")
        if entry["role"] == "user":
            said = text
        elif entry["role"] != "model":
            raise UserError(f"{where}: role {entry['role']!r}; it must be user or model")
        elif entry["if_chosen"]:
            # Two answers of one model may be word for word the same, and then both are chosen.
            if chosen not in (None, text):
                raise UserError(f"{where}, turn {entry['turn']}: two different answers are chosen")
            chosen = text
        else:
            rejected.append(text)
    return said, chosen, rejected
