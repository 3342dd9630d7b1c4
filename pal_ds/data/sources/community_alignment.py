"""Community Alignment: annotators of five countries choose one of four answers, over up to four turns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from pal_ds.data.records import Message, Record
from pal_ds.data.sources.base import check_shares, stable_fraction
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource, id_of, text_of
from pal_ds.errors import UserError

TURNS = ("first", "second", "third", "fourth")
LETTERS = ("a", "b", "c", "d")
EMPTY = ("", "EMPTY STRING")
"""Texts that stand for nothing."""
END_TOKEN = "<|end_of_text|>"
"""End of an answer as some models left it, which tells their answers from others."""


def _columns() -> tuple[str, ...]:
    of_turn = ("prompt", *(f"response_{letter}" for letter in LETTERS), "preferred_response")
    turns = [f"{turn}_turn_{name}" for turn in TURNS for name in of_turn]
    return ("conversation_id", "annotator_id", "assigned_lang", *turns)


@final
@dataclass(eq=False)
class CommunityAlignment(HubSource):
    """In each turn the preferred answer against *each* other one; the conversation so far is the prompt.

    Reads a row per conversation of facebook/community-alignment-dataset: `annotator_id`, `assigned_lang`, and for each
    turn `first_turn_prompt`, `first_turn_response_a` to `_d` and `first_turn_preferred_response`, which names the
    preferred answer ("response_b", or its letter). Prompts are chat messages, in which the preferred answers of the
    turns before stand for the assistant; answers are plain texts. A turn without a prompt or a choice ends the
    conversation. Users are the annotators.

    This form is that of the dataset's published columns; it was not checked against the files of the hub.

    Use `data.split: field`: the split is decided by the opening words, so that no turn is tested on whose continuation
    was trained on, and all annotators of an opening that was given to many stand on one side. Hold users out whole with
    `data.unseen_user_fraction`.

    Dropped and counted: `other_language`, `no_annotator`, `no_prompt`, `no_preference` (conversations whose first turn
    lacks it), `no_preferred_answer` (its text is empty), `empty_response`, `same_response` (comparisons).

    Args:
        path: hub id, folder, or a file.
        language: keep conversations of this `assigned_lang` alone; null keeps all.
        num_turns: turns that are read of a conversation, 1 to 4.
        dev_fraction: share of the conversations for dev.
        test_fraction: and for test.
        seed: of the split.
    """

    licence = "CC BY 4.0 (facebook/community-alignment-dataset)"

    path: HubPath = "facebook/community-alignment-dataset"
    language: str | None = "en"
    num_turns: int = 4
    dev_fraction: float = 0.05
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(
            "community_alignment", self.dev_fraction, self.test_fraction, of="conversations"
        )
        if not 1 <= self.num_turns <= len(TURNS):
            raise UserError(
                f"community_alignment: num_turns is {self.num_turns}; it must be 1 to {len(TURNS)}"
            )
        self._rows = HubRows(self.path, ("train",), _columns())

    def records(self) -> Iterator[Record]:
        """Conversation by conversation, turn by turn."""
        self.dropped.clear()
        yield from self.each_row(self._rows.with_splits(), self._conversation)

    def _conversation(
        self, where: str, split_and_row: tuple[str, dict[str, Any]]
    ) -> Iterator[Record]:
        row = split_and_row[1]
        if self.language is not None and row["assigned_lang"] != self.language:
            self.dropped["other_language"] += 1
            return
        if row["annotator_id"] is None:
            self.dropped["no_annotator"] += 1
            return
        where = f"{where} ({row['conversation_id']})"
        user = id_of(row["annotator_id"], where, "annotator_id")
        prompt: list[Message] = []
        split = None
        for turn in TURNS[: self.num_turns]:
            question = _text(row, f"{turn}_turn_prompt", where)
            choice = _text(row, f"{turn}_turn_preferred_response", where)
            if not question or not choice:
                if not prompt:
                    self.dropped["no_preference" if question else "no_prompt"] += 1
                return
            answers = {
                letter: _text(row, f"{turn}_turn_response_{letter}", where) for letter in LETTERS
            }
            preferred = answers[_letter(choice, where, turn)]
            split = split or self._split_of(question)
            prompt = [*prompt, {"role": "user", "content": question}]
            if not preferred:
                self.dropped["no_preferred_answer"] += 1
                return
            for other in self._others(answers, _letter(choice, where, turn)):
                yield Record(
                    user_id=user,
                    label=-1,
                    prompt=prompt,
                    responses=(preferred, other),
                    split=split,
                )
            prompt = [*prompt, {"role": "assistant", "content": preferred}]

    def _others(self, answers: dict[str, str], preferred: str) -> Iterator[str]:
        """Answers that were not preferred; each distinct text once."""
        seen = {answers[preferred]}
        for letter, answer in answers.items():
            if letter == preferred:
                continue
            if not answer or answer in seen:
                self.dropped["same_response" if answer else "empty_response"] += 1
                continue
            seen.add(answer)
            yield answer

    def _split_of(self, opening: str) -> str:
        """Split of all conversations that begin with these words."""
        place = stable_fraction("conversation", self.seed, opening)
        if place < self.test_fraction:
            return "test"
        return "dev" if place < self.test_fraction + self.dev_fraction else "train"


def _text(row: dict[str, Any], key: str, where: str) -> str:
    """Read a text without its end token; empty for one that stands for nothing."""
    text = text_of(row[key], where, key).removesuffix(END_TOKEN).strip()
    return "" if text in EMPTY else text


def _letter(choice: str, where: str, turn: str) -> str:
    """Letter of the preferred answer. Raises UserError where the cell names none."""
    letter = choice.lower().removeprefix("response_")
    if letter not in LETTERS:
        raise UserError(
            f"{where}: {turn}_turn_preferred_response is {choice!r}; it must be one of "
            f"{', '.join(f'response_{letter}' for letter in LETTERS)}"
        )
    return letter
