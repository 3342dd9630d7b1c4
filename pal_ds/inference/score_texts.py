"""Scalar scores for texts in a JSONL file: one process, no DeepSpeed."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedModel

from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.inference.text_rows import Row
from pal_ds.progress import progress_bar
from pal_ds.remote_code.rows import pad_right

logger = logging.getLogger(__name__)

_TOO_LONG = "responses longer than max_length, which no training has: their score is null"
_CUT_PROMPT = "prompts were cut to max_length, as in training"
_CUT_TEXT = (
    "texts were cut to max_length from the left; give prompt and response to see which part is cut"
)


Covariance = list[list[float]]
"""Of a user's point, [K][K]."""


class Score(NamedTuple):
    """A text's score, and how sure it is."""

    score: float
    std: float | None = None
    """Standard deviation of the reward under the user's posterior, in the score's units; None where not wanted."""


@dataclass(frozen=True)
class Scorer:
    """A reward model and how its texts are rendered."""

    model: PreTrainedModel
    encoder: TextEncoder
    points_of: Callable[[Sequence[str]], list[list[float]]] | None = None
    """Mixture of each of the users, or groups, that lines name; None where one score is for everyone."""
    line_key: str = "user_id"
    """What a line says of its user: `user_id`, or `group` for a head that asks for it."""
    is_for_one: bool = False
    """True where the caller named one user, mixture or group for all lines."""
    needs_names: bool = False
    """True where a table of users was given, which only lines that name users can refer to."""
    covariance_of: Callable[[str | None], Covariance] | None = None
    """Covariance of the point of a user whom lines name, or of the one user of all (None); given where scores come with
    a standard deviation."""
    pessimism: float = 0.0
    """Standard deviations that are taken off each reward."""
    counts: Counter[str] = field(default_factory=Counter)
    """Texts that did not fit, by what was done."""

    @property
    def reads_boundary(self) -> bool:
        """True if a score depends on where the response begins."""
        config = self.model.config
        separate = getattr(config, "encoding", "joint") == "separate"
        return separate or getattr(self.model, "reads_prompt", False)

    def tokenise(self, row: Row) -> tuple[list[int], int | None] | None:
        """Ids of a row, and where its response begins if the model must know; None if its response is too long.

        Raises:
            UserError: the chat template or the tokenizer cannot tell prompt and response apart.
        """
        limit = self.encoder.max_length
        if row.text is not None:
            ids = self._ids(row.text)
            self.counts[_CUT_TEXT] += len(ids) > limit
            return ids, None
        assert row.response is not None
        rendered = self.encoder.render(row.prompt, row.response, row.tools)
        if rendered is None:
            said = f" ({self.encoder.refusal})" if self.encoder.refusal else ""
            raise UserError(
                f"{row.where}: the chat template cannot render this conversation{said}."
            )
        ids = self._ids(rendered.text)
        if not self.reads_boundary and len(ids) <= limit:
            return ids, None
        encoded = self.encoder.encode([rendered])[0]
        if encoded is None or row.prompt is None:
            if self.reads_boundary:
                raise UserError(
                    f"{row.where}: no token starts where the response does, and this model "
                    "reads prompt and response apart. Give a prompt and a response."
                )
            self.counts[_CUT_TEXT] += 1
            return ids, None
        num_response = len(self.encoder.prefix_ids) + len(encoded.response_ids)
        if num_response > limit:
            # The rule of `prepare`: a response is never cut.
            self.counts[_TOO_LONG] += 1
            return None
        self.counts[_CUT_PROMPT] += len(encoded.prompt_ids) + len(encoded.response_ids) > limit
        if not self.reads_boundary:
            return ids, None
        return [*encoded.prompt_ids, *encoded.response_ids], len(encoded.prompt_ids)

    def _ids(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def score_all(self, rows: list[Row], batch_texts: int = 16) -> list[float | None]:
        """One score per row, `batch_texts` rows in a forward; None where a response is too long."""
        return [None if s is None else s.score for s in self.score_all_with_std(rows, batch_texts)]

    def score_all_with_std(self, rows: list[Row], batch_texts: int = 16) -> list[Score | None]:
        """`score_all`, with the standard deviation of each where `covariance_of` is given."""
        points = self.points(rows)
        scores: list[Score | None] = []
        for start in range(0, len(rows), batch_texts):
            stop = start + batch_texts
            scores += self.score_with_std(rows[start:stop], points[start:stop])
        self.warn()
        return scores

    def points(self, rows: list[Row]) -> list[list[float] | None]:
        """The mixture of each row's user; None for the one that the model has.

        Raises:
            UserError: a user or group that is unknown.
        """
        names = [getattr(row, self.line_key) for row in rows]
        self._check_other_names(rows)
        # The first row of each name: later entries of a dict win.
        first = dict(zip(reversed(names), reversed(rows), strict=True))
        first.pop(None, None)
        if not first and self.needs_names:
            raise UserError(
                "--users names a table of users: give --user too, or lines with user_id."
            )
        if not first or self.points_of is None:
            return [None] * len(rows)
        if self.is_for_one:
            logger.warning(
                "%s and other lines name a %s, and all are scored for the one that was asked for",
                next(row.where for row, name in zip(rows, names, strict=True) if name is not None),
                self.line_key,
            )
            return [None] * len(rows)
        known = [str(name) for name in first]
        try:
            points = dict(zip(known, self.points_of(known), strict=True))
        except UserError:
            for name in reversed(known):
                try:
                    self.points_of([name])
                except UserError as error:
                    raise UserError(f"{first[name].where}: {error}") from None
            raise
        return [None if name is None else points[name] for name in names]

    def _check_other_names(self, rows: list[Row]) -> None:
        """Raise UserError for a line that says its user where groups are read alone, or the other way round.

        A line that says both, and lines for a model that has one reward for everyone, are scored, with a word.
        """
        other = "group" if self.line_key == "user_id" else "user_id"
        unread = [row for row in rows if getattr(row, other) is not None]
        if self.points_of is None:
            unread = [row for row in rows if row.user_id is not None or row.group is not None]
        elif wrong := [row for row in unread if getattr(row, self.line_key) is None]:
            raise UserError(
                f"{wrong[0].where}: names a {other}, and this model reads the {self.line_key} of a line alone. Give "
                f"that, or take the {other} out."
            )
        if unread:
            said = f"each line is scored for its {self.line_key}"
            said = "this model has one reward for everyone" if self.points_of is None else said
            logger.warning(
                "%s and %d other lines name a %s, which changes nothing: %s",
                unread[0].where,
                len(unread) - 1,
                other if getattr(unread[0], other) is not None else self.line_key,
                said,
            )

    def score(
        self, rows: list[Row], points: Sequence[list[float] | None] | None = None
    ) -> list[float | None]:
        """One score per row in as few forwards as there are kinds of rows; `points` as `points` gives them.

        Raises:
            UserError: a row that the model cannot read, or whose score is not finite.
        """
        return [
            None if score is None else score.score for score in self.score_with_std(rows, points)
        ]

    def score_with_std(
        self, rows: list[Row], points: Sequence[list[float] | None] | None = None
    ) -> list[Score | None]:
        """`score`, with the standard deviation of each where `covariance_of` is given."""
        items = [self.tokenise(row) for row in rows]
        points = points or [None] * len(rows)
        scores: list[Score | None] = [None] * len(rows)
        kinds: dict[tuple[bool, tuple[float, ...] | None, str | None], list[int]] = {}
        for i, (item, point) in enumerate(zip(items, points, strict=True)):
            if item is not None:
                # Rows whose boundary was given and rows whose marker must be found go apart, as users do.
                own = None if point is None or self.covariance_of is None else self._name(rows[i])
                kind = item[1] is not None, None if point is None else tuple(point), own
                kinds.setdefault(kind, []).append(i)
        config = self.model.config
        before = {name: getattr(config, name, None) for name in ("mixture", "posterior")}
        try:
            for (given, point, name), chosen in kinds.items():
                if point is not None:
                    config.mixture = list(point)
                if self.covariance_of is not None:
                    covariance = self.covariance_of(name)
                    config.posterior = {"mixture": config.mixture, "covariance": covariance}
                for i, score in zip(chosen, self._forward(rows, items, chosen, given), strict=True):
                    scores[i] = score
                if point is not None:
                    config.mixture = before["mixture"]
        finally:
            for key, value in before.items():
                if value is not None:
                    setattr(config, key, value)
        return scores

    def _name(self, row: Row) -> str:
        return str(getattr(row, self.line_key))

    def _forward(
        self, rows: list[Row], items: Sequence[Any], chosen: list[int], given: bool
    ) -> list[Score]:
        ids, mask = pad_right([items[i][0] for i in chosen], 0, self.model.device)
        extra: dict[str, object] = {}
        if given:
            extra["prompt_lengths"] = [items[i][1] for i in chosen]
        if self.covariance_of is not None:
            extra["return_std"] = True
        try:
            with torch.no_grad():
                output = self.model(input_ids=ids, attention_mask=mask, **extra)
        except ValueError as error:
            raise UserError(f"{rows[chosen[0]].where} or near it: {error}") from None
        values = output.logits[:, 0].tolist()
        stds = output.std[:, 0].tolist() if self.covariance_of is not None else [None] * len(values)
        for i, value in zip(chosen, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{rows[i].where}: its score is {value}, no finite number; the model's weights are damaged, or "
                    "too large for its dtype."
                )
        return [
            Score(value - self.pessimism * (std or 0.0), std)
            for value, std in zip(values, stds, strict=True)
        ]

    def warn(self) -> None:
        """Tell of texts that did not fit."""
        for what, count in self.counts.items():
            if count:
                logger.warning("%d %s (max_length %d)", count, what, self.encoder.max_length)


def write_scores(scorer: Scorer, rows: list[Row], stream: TextIO, batch_texts: int) -> None:
    """Every record with its "score" added, one per line, in the order of the input; null where none can be given."""
    starts = range(0, len(rows), batch_texts)
    points = scorer.points(rows)
    with progress_bar("scoring", len(starts), shown=True) as advance:
        for start in starts:
            batch = rows[start : start + batch_texts]
            scores = scorer.score_with_std(batch, points[start : start + batch_texts])
            for row, score in zip(batch, scores, strict=True):
                line = {**row.record, "score": None if score is None else score.score}
                if scorer.covariance_of is not None:
                    line["reward_std"] = None if score is None else score.std
                stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            advance(len(batch))
    scorer.warn()
