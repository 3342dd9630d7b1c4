"""Polis conversations: participants agree and disagree with statements that others wrote."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files, stable_fraction
from pal_ds.data.sources.csv_rows import CsvRows
from pal_ds.errors import UserError
from pal_ds.io.files import at_home

VOTES, STATEMENTS = "participants-votes.csv", "comments.csv"
AGREE, DISAGREE, PASS = "1", "-1", "0"
SPLITS = ("test", "dev", "train")


@final
@dataclass(eq=False)
class Polis(Source):
    """A user prefers a statement agreed with to one disagreed with; the prompt is the name of the conversation.

    Reads folders of compdemocracy/openData as they are: participants-votes.csv, a row per participant and a column per
    statement (1 agree, -1 disagree, 0 pass), and comments.csv with the texts. Users are CONVERSATION/PARTICIPANT.

    Two protocols of what is held out, both with `data.split: record`; pairs of statements of two splits are left out:
        votes       a share of each participant's votes: the users' side, statements are known
        statements  a share of the statements, with all votes on them: the texts' side
    Passes are left out and counted, as statements without a text are.

    A statement is known by its text, or by its number: then it is a vector of zeros with a one at its own place, and
    a head learns of each statement from votes alone. That foretells votes on known statements better, as those who
    like one of two similar texts need not like the other.

    Args:
        path: folder of a conversation, or of several.
        conversations: names of those to read, of several; none named: all of them.
        protocol: votes or statements.
        dev_fraction: share of the votes, or of the statements, of the split `dev`.
        test_fraction: the same of `test`.
        pairs_per_participant: most comparisons of a participant in a split, drawn by (seed, participant, pair).
        known_by: text or number; by number nothing is known of a held-out statement.
        seed: of what is held out and drawn.
    """

    licence = "CC BY 4.0 (compdemocracy/openData)"

    path: str
    conversations: list[str] = field(default_factory=list)
    protocol: Literal["votes", "statements"] = "votes"
    dev_fraction: float = 0.1
    test_fraction: float = 0.2
    pairs_per_participant: int = 100
    known_by: Literal["text", "number"] = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in ("votes", "statements"):
            raise UserError(f"polis: protocol is '{self.protocol}'; it must be votes or statements")
        fractions = (self.dev_fraction, self.test_fraction)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise UserError(
                f"polis: dev_fraction and test_fraction are {fractions}; both are 0 or more, 1 together"
            )
        if self.known_by not in ("text", "number"):
            raise UserError(f"polis: known_by is '{self.known_by}'; it must be text or number")
        if self.known_by == "number" and self.protocol == "statements":
            raise UserError(
                "polis: known_by: number knows nothing of a statement without votes, and protocol: statements holds "
                "out all votes on a statement. Choose known_by: text, or protocol: votes."
            )
        if self.pairs_per_participant < 1:
            raise UserError(
                f"polis: pairs_per_participant is {self.pairs_per_participant}; it must be 1 or more"
            )

    def records(self) -> Iterator[Record]:
        """Conversation by conversation, participant by participant."""
        self.dropped.clear()
        yield from self.each_row(self._rows(), self._comparisons)

    def describe(self) -> dict:
        files = [folder / name for folder in self._folders for name in (VOTES, STATEMENTS)]
        keys = ("protocol", "dev_fraction", "test_fraction", "pairs_per_participant", "seed")
        options = {key: getattr(self, key) for key in keys}
        if self.known_by != "text":
            # Data of before say nothing of it.
            options["known_by"] = self.known_by
        return {"class": "Polis", "files": describe_files(check_files(files)), **options}

    @cached_property
    def _folders(self) -> list[Path]:
        path = at_home(self.path)
        folders = (
            [path]
            if (path / VOTES).is_file()
            else sorted(p.parent for p in path.glob(f"*/{VOTES}"))
        )
        if not folders:
            raise UserError(f"polis: neither {path} nor a folder in it holds {VOTES}")
        known = [folder.name for folder in folders]
        for name in self.conversations:
            if name not in known:
                raise UserError(
                    f"polis: there is no conversation '{name}'{nearest(name, known)} in {path}; there are "
                    f"{', '.join(known)}"
                )
        return [folder for folder in folders if folder.name in (self.conversations or known)]

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """(place, (conversation, row) or UserError) of each participant."""
        for conversation in self._conversations:
            (file,) = check_files(conversation.folder / VOTES)
            rows = CsvRows(file, ",")
            if "participant" not in rows.names:
                raise UserError(f"{file}: has no column 'participant'; it is no {VOTES} of Polis")
            for where, row in rows:
                yield where, row if isinstance(row, UserError) else (conversation, row)

    @property
    def _conversations(self) -> list["_Conversation"]:
        """Conversations to read; places of statements go on from one to the next."""
        conversations, texts = [], [_texts_of(folder / STATEMENTS) for folder in self._folders]
        size, first = sum(map(len, texts)), 0
        for folder, of_folder in zip(self._folders, texts, strict=True):
            conversations.append(_Conversation(folder, of_folder, first, size))
            first += len(of_folder)
        return conversations

    def _comparisons(
        self, where: str, voted: tuple["_Conversation", dict[str, str | None]]
    ) -> Iterator[Record]:
        conversation, row = voted
        user = f"{conversation.name}/{row['participant']}"
        sides = self._sides(where, conversation, user, row)
        for split, of_split in sides.items():
            pairs = [*product(of_split[AGREE], of_split[DISAGREE])]
            if len(pairs) > self.pairs_per_participant:
                pairs.sort(key=lambda pair: stable_fraction(self.seed, user, *pair))
                self.dropped["beyond_pairs_per_participant"] += (
                    len(pairs) - self.pairs_per_participant
                )
            for liked, other in pairs[: self.pairs_per_participant]:
                # In the order of their numbers: the place of a response says nothing.
                is_first = int(liked) < int(other)
                both = (liked, other) if is_first else (other, liked)
                yield Record(
                    user_id=user,
                    label=-1 if is_first else 1,
                    split=split,
                    **conversation.shown(both, self.known_by),
                )

    def _sides(
        self, where: str, conversation: "_Conversation", user: str, row: dict[str, str | None]
    ) -> dict[str, dict[str, list[str]]]:
        """Statements by split and vote. Raises UserError for a vote of another kind."""
        sides: dict[str, dict[str, list[str]]] = {
            split: {AGREE: [], DISAGREE: []} for split in SPLITS
        }
        for statement, vote in row.items():
            if not statement.isdigit() or vote is None:
                continue
            if vote not in (AGREE, DISAGREE, PASS):
                raise UserError(
                    f"{where}: the vote on statement {statement} is {vote!r}; it must be 1, -1 or 0"
                )
            if vote == PASS or statement not in conversation.texts:
                self.dropped["pass" if vote == PASS else "no_text"] += 1
                continue
            sides[self._split_of(conversation.name, user, statement)][vote].append(statement)
        return sides

    def _split_of(self, conversation: str, user: str, statement: str) -> str:
        whose = user if self.protocol == "votes" else conversation
        place = stable_fraction(self.seed, self.protocol, whose, statement)
        return SPLITS[
            (place >= self.test_fraction) + (place >= self.test_fraction + self.dev_fraction)
        ]


@dataclass(frozen=True)
class _Conversation:
    """A conversation's statements, and how records show them."""

    folder: Path
    texts: dict[str, str]
    """Text of each statement by its number."""
    first: int
    """Place of its first statement among those of all conversations."""
    size: int
    """Number of statements of all conversations."""

    @property
    def name(self) -> str:
        return self.folder.name

    def shown(self, statements: tuple[str, str], known_by: Literal["text", "number"]) -> dict:
        """Fields of a record of two statements: prompt and responses, as texts or as vectors."""
        if known_by == "text":
            prompt = " ".join(self.name.replace(".", " ").replace("-", " ").split())
            return {"prompt": prompt, "responses": tuple(self.texts[each] for each in statements)}
        places = (self._place[each] for each in statements)
        vectors = tuple(self._ones(place, place + 1) for place in places)
        prompt = self._ones(self.first, self.first + len(self.texts))
        return {"prompt_features": prompt, "response_features": vectors}

    @cached_property
    def _place(self) -> dict[str, int]:
        in_order = sorted(self.texts, key=lambda number: (len(number), number))
        return {number: self.first + place for place, number in enumerate(in_order)}

    def _ones(self, begin: int, end: int) -> tuple[float, ...]:
        """1 from `begin` up to `end`, and 0 elsewhere."""
        return (0.0,) * begin + (1.0,) * (end - begin) + (0.0,) * (self.size - end)


def _texts_of(path: Path) -> dict[str, str]:
    """Text of each statement by its number."""
    (file,) = check_files(path)
    rows = CsvRows(file, ",")
    if missing := {"comment-id", "comment-body"} - {*rows.names}:
        raise UserError(f"{file}: has no column '{min(missing)}'; it is no {STATEMENTS} of Polis")
    texts = {}
    for _, row in rows:
        if isinstance(row, UserError):
            raise row
        number, text = row["comment-id"], (row["comment-body"] or "").strip()
        if number is not None and text:
            texts[number] = text
    return texts
