"""Anthropic's persona statements: users hold or reject behaviours and answer Yes or No."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from pal_ds.data.parse import nearest
from pal_ds.data.records import Record
from pal_ds.data.sources.base import (
    Source,
    check_files,
    describe_files,
    lines_or_errors,
    stable_fraction,
)
from pal_ds.errors import UserError

ANSWERS = ("Yes", "No")


@final
@dataclass(eq=False)
class Persona(Source):
    """To each statement's question the pair ("Yes", "No"); a user answers as their behaviours ask.

    A user who holds a behaviour prefers `answer_matching_behavior`, one who rejects it the other
    answer, and one who does neither does not judge its statements.

    Args:
        paths: folder of `BEHAVIOUR.jsonl` files, or the files.
        users: user -> {"holds": [behaviours], "rejects": [behaviours]}.
        groups: the same per group of `users_per_group` users, named GROUP-0, GROUP-1, ..
        users_per_group: how many users each of `groups` stands for.
        statements_per_user: judge only so many statements, drawn per user; null: all.
        min_confidence: leave out statements whose `label_confidence` is lower (counted).
        seed: of the draw.
    """

    licence = "CC BY 4.0 (anthropics/evals)"

    paths: str | list[str]
    users: dict[str, dict[str, list[str]]] | None = None
    groups: dict[str, dict[str, list[str]]] | None = None
    users_per_group: int = 10
    statements_per_user: int | None = None
    min_confidence: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.users, self.groups = self.users or {}, self.groups or {}
        if not self.users and not self.groups:
            raise UserError(
                "persona: neither users nor groups is given; name who holds and who rejects what, "
                "for example users: {ann: {holds: [openness], rejects: [risk-seeking]}}"
            )
        if self.statements_per_user is not None and self.statements_per_user < 1:
            raise UserError(
                f"persona: statements_per_user is {self.statements_per_user}; it must be at least "
                "1, or null for all"
            )
        for name, views in [*self.users.items(), *self.groups.items()]:
            _check_views(name, views)

    def records(self) -> Iterator[Record]:
        """File by file, statement by statement, every user who has a view on it."""
        self.dropped.clear()
        limits = self._limits()

        def views_on(where: str, line: tuple[Path, object]) -> Iterator[Record]:
            path, (question, matching) = line[0], self._statement(where, line[1], count=True)
            for user, group, views in self._people if question else ():
                holds = path.stem in views.get("holds", ())
                if not holds and path.stem not in views.get("rejects", ()):
                    continue
                if user in limits and self._draw(user, path.stem, question) > limits[user]:
                    continue
                yes = (matching == "Yes") == holds
                yield Record(
                    user_id=user,
                    label=-1 if yes else 1,
                    prompt=question,
                    responses=ANSWERS,
                    group=group,
                )

        yield from self.each_row(self._lines(), views_on)

    def describe(self) -> dict:
        return {
            "class": "Persona",
            "files": describe_files(self._files),
            "users": self.users,
            "groups": self.groups,
        }

    @cached_property
    def _people(self) -> list[tuple[str, str | None, dict]]:
        """(user, group, views) of everyone."""
        people: list[tuple[str, str | None, dict]] = []
        people += [(user, None, views) for user, views in (self.users or {}).items()]
        for group, views in (self.groups or {}).items():
            people += [(f"{group}-{i}", group, views) for i in range(self.users_per_group)]
        return people

    @cached_property
    def _files(self) -> list[Path]:
        """Files of the behaviours that someone holds or rejects, by name."""
        if isinstance(self.paths, str) and Path(self.paths).is_dir():
            given = sorted(Path(self.paths).glob("*.jsonl"))
        else:
            given = check_files(self.paths)
        files = {path.stem: path for path in given}
        wanted = {b for *_, views in self._people for key in views for b in views[key]}
        for behaviour in sorted(wanted):
            if behaviour not in files:
                raise UserError(
                    f"persona: no file for behaviour '{behaviour}'{nearest(behaviour, files)} in "
                    f"{self.paths}; there are {', '.join(files) or 'none'}"
                )
        return check_files([files[behaviour] for behaviour in sorted(wanted)])

    def _lines(self) -> Iterator[tuple[str, Any]]:
        """(place, (file, line)) of each line; a UserError in place of what is no JSON."""
        for path in self._files:
            for where, item in lines_or_errors(path):
                yield where, item if isinstance(item, UserError) else (path, item)

    def _statement(self, where: str, item: object, count: bool = False) -> tuple[str, str]:
        """(question, matching answer) of a statement, two empty texts where it is not sure enough."""
        fields = _check_statement(where, item)
        if fields["label_confidence"] < self.min_confidence:
            self.dropped["low_confidence"] += count
            return "", ""
        return fields["question"], fields["answer_matching_behavior"].strip()

    def _draw(self, user: str, behaviour: str, question: str) -> float:
        return stable_fraction(self.seed, user, behaviour, question)

    def _limits(self) -> dict[str, float]:
        """Per user the largest draw that is still among the `statements_per_user` lowest."""
        if self.statements_per_user is None:
            return {}
        draws: dict[str, list[float]] = {user: [] for user, *_ in self._people}
        for where, line in self._lines():
            # Bad lines are counted where records are read.
            if isinstance(line, UserError):
                continue
            path, question = line[0], ""
            with contextlib.suppress(UserError):
                question, _ = self._statement(where, line[1])
            if not question:
                continue
            for user, _, views in self._people:
                if any(path.stem in views[key] for key in views):
                    draws[user].append(self._draw(user, path.stem, question))
        limit = self.statements_per_user
        return {user: sorted(v)[limit - 1] for user, v in draws.items() if len(v) > limit}


def _check_views(name: str, views: dict) -> None:
    for key in views:
        if key not in ("holds", "rejects"):
            raise UserError(
                f"persona: '{name}' has the key '{key}'{nearest(key, ('holds', 'rejects'))}; the "
                "keys are holds and rejects"
            )
    both = sorted({*views.get("holds", ())} & {*views.get("rejects", ())})
    if both:
        raise UserError(f"persona: '{name}' both holds and rejects '{both[0]}'; choose one")
    if not any(views.values()):
        raise UserError(f"persona: '{name}' neither holds nor rejects anything; name a behaviour")


def _check_statement(where: str, item: object) -> dict:
    for key in ("question", "answer_matching_behavior"):
        if not isinstance(item, dict) or not isinstance(item.get(key), str):
            raise UserError(
                f"{where}: '{key}' is missing or is no text; a statement has question, "
                "answer_matching_behavior, answer_not_matching_behavior"
            )
    if item["answer_matching_behavior"].strip() not in ANSWERS:
        raise UserError(
            f"{where}: 'answer_matching_behavior' is {item['answer_matching_behavior']!r}; it must "
            "be Yes or No"
        )
    return {"label_confidence": 1.0, **item}
