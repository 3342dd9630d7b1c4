"""Stores in which the texts or vectors of a dataset collect while its records stream by."""

import logging
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
import xxhash

from pal_ds.data.kept_texts import SampleKeeper
from pal_ds.data.marker_words import Faults, refused, why_unmarked
from pal_ds.data.ragged import Ragged
from pal_ds.data.records import Text, Tools, render_plain
from pal_ds.data.response_markers import MIN_KEPT, common_marker, count_across, count_in_rows
from pal_ds.data.tokenise import Encoded, Rendered, TextEncoder
from pal_ds.errors import UserError

logger = logging.getLogger(__name__)
BATCH_TEXTS = 2048
REASONS = (
    "kept",
    "template",
    "boundary",
    "marker_missing",
    "marker_in_prompt",
    "marker_in_response",
    "too_long",
    "identical",
    "prompt_differs",
)
"""Why a comparison was dropped; the code of a reason is its place here.

template: the chat template rewrites what precedes the response. boundary: no token starts where the
response does. prompt_differs: the prompt's tokens depend on the response.
"""
CODE = {reason: code for code, reason in enumerate(REASONS)}


class _Pending(NamedTuple):
    prompt_row: int
    prompt: Text | None
    response: Text
    tools: Tools | None


class TokenStore:
    """Distinct (prompt, response) texts as token ids; each full text is tokenised once."""

    kind = "tokens"

    def __init__(self, encoder: TextEncoder, samples: SampleKeeper) -> None:
        self.encoder = encoder
        self.samples = samples
        self.prompt_tokens, self.prompt_offsets = array("i"), array("q", [0])
        self.response_tokens, self.response_offsets = array("i"), array("q", [0])
        self.response_prompt, self.num_chars = array("q"), array("i")
        self.status, self.variant, self.has_prompt = array("b"), array("i"), array("b")
        self.not_shown: Counter[str] = Counter()
        """Texts in which the template leaves something out, by its kind."""
        self.special: Counter[str] = Counter()
        """Texts whose contents hold a special token of the tokenizer, by the token."""
        self.refusal = ""
        """What the template said of the first conversation that it refused."""
        self._variants: dict[tuple[int, ...], int] = {}
        self._prompt_rows: dict[tuple[int, int], int] = {}
        self._pending: list[_Pending] = []

    def add(
        self,
        prompt_row: int,
        prompt: Text | None,
        response: Text,
        tools: Tools | None = None,
    ) -> None:
        """Queue a response; its row is the number of responses added before."""
        self._pending.append(_Pending(prompt_row, prompt, response, tools))
        if len(self._pending) >= BATCH_TEXTS:
            self.flush()

    def flush(self) -> None:
        rendered = [self._render(item) for item in self._pending]
        good = [item for item in rendered if item is not None]
        encoded = iter(self.encoder.encode(good) if good else [])
        for item, text in zip(self._pending, rendered, strict=True):
            result = None if text is None else next(encoded)
            if text is not None and result is not None:
                sample = {"prompt": item.prompt, "response": item.response, "text": text.text}
                sample |= {} if item.tools is None else {"tools": item.tools}
                sample["prompt_tokens"] = len(result.prompt_ids)
                self.samples.offer(len(self.status), item.prompt_row, sample)
            self._append(item, result, "template" if text is None else "boundary")
        self._pending.clear()

    def _render(self, item: _Pending) -> Rendered | None:
        prompt, response, tools = item.prompt, item.response, item.tools
        rendered = self.encoder.render(prompt, response, tools)
        if rendered is not None:
            self.not_shown.update(self.encoder.not_shown(prompt, response, tools, rendered))
        elif not self.refusal:
            self.refusal = self.encoder.refusal
        self.special.update(self.encoder.special_in(prompt, response))
        return rendered

    @property
    def faults(self) -> Faults:
        """Faults that were met while the texts were rendered."""
        return Faults(self.refusal, self.not_shown, self.special)

    def _append(self, item: _Pending, encoded: Encoded | None, failure: str) -> None:
        self.has_prompt.append(item.prompt is not None)
        self.num_chars.append(len(render_plain(item.response)))
        if encoded is None:
            encoded = Encoded([], [], ())
            self.status.append(CODE[failure])
        else:
            num_least = len(self.encoder.prefix_ids) + len(encoded.response_ids)
            self.status.append(CODE["too_long"] if num_least > self.encoder.max_length else 0)
        self.variant.append(self._variants.setdefault(encoded.marker_ids, len(self._variants)))
        self.response_prompt.append(self._prompt(item.prompt_row, encoded.prompt_ids))
        self.response_tokens.extend(encoded.response_ids)
        self.response_offsets.append(len(self.response_tokens))

    def _prompt(self, prompt_row: int, ids: list[int]) -> int:
        tokens = array("i", ids)
        key = (prompt_row, xxhash.xxh3_64_intdigest(tokens))
        row = self._prompt_rows.setdefault(key, len(self._prompt_rows))
        if row == len(self.prompt_offsets) - 1:
            self.prompt_tokens.extend(tokens)
            self.prompt_offsets.append(len(self.prompt_tokens))
        return row

    def finish(self, check_marker: bool) -> "TokenTables":
        """Everything as arrays, with the marker settled and every response's status."""
        self.flush()
        tables = TokenTables(
            prompts=Ragged(_view(self.prompt_tokens), _view(self.prompt_offsets)),
            responses=Ragged(_view(self.response_tokens), _view(self.response_offsets)),
            response_prompt=_view(self.response_prompt),
            num_chars=_view(self.num_chars),
            status=_view(self.status).copy(),
            marker_ids=None,
            user_marker_ids=None,
            marker_kept=None,
        )
        if not check_marker or not any(self.has_prompt):
            return tables
        variants, has_prompt = list(self._variants), _view(self.has_prompt).astype(bool)
        return self._settle_marker(tables, variants, _view(self.variant), has_prompt)

    def _settle_marker(
        self, tables: "TokenTables", variants: list, variant: np.ndarray, has_prompt: np.ndarray
    ) -> "TokenTables":
        """Find the marker, mark the rows that do not keep it, refuse one that too few keep."""
        unmarked = CODE["template"], CODE["boundary"]
        has_tokens = has_prompt & ~np.isin(tables.status, unmarked)
        counts = np.bincount(variant[has_tokens], minlength=len(variants))
        marker = common_marker(variants, counts.tolist())
        if marker is None:
            if self.encoder.uses_template and has_tokens.sum() < has_prompt.sum() * MIN_KEPT:
                self._refuse(0, int(has_prompt.sum()), tables.status[has_prompt], None)
            return tables
        missing = np.array([list(v[-len(marker) :]) != marker for v in variants])[variant]
        problem = np.where(has_tokens & missing, CODE["marker_missing"], 0)
        user_marker = self.encoder.user_marker_ids
        misplaced = _misplaced(tables, marker, user_marker)
        if user_marker and _share(misplaced == 0, has_tokens & ~missing) < MIN_KEPT:
            single = _misplaced(tables, marker, None)
            if _share(single == 0, has_tokens & ~missing) >= MIN_KEPT:
                user_marker, misplaced = None, single
        problem = np.where(has_tokens & (problem == 0), misplaced, problem)
        failed = np.isin(tables.status, unmarked) | (problem > 0)
        status = np.where((problem > 0) & has_tokens, problem, tables.status).astype(np.int8)
        num_kept, num_with_prompt = int((has_prompt & ~failed).sum()), int(has_prompt.sum())
        if num_kept < MIN_KEPT * num_with_prompt:
            num_rendered = int(has_tokens.sum())
            if not self.encoder.uses_template or num_rendered < MIN_KEPT * num_with_prompt:
                self._refuse(num_kept, num_with_prompt, status[has_prompt], marker)
            # The boundary is known where a text was rendered; only an exported model looks for the marker.
            logger.warning(
                "%d of %d conversations do not show by the chat template's assistant header where the response begins "
                "(%s): a head that reads the prompt cannot be trained on these data, others can",
                num_with_prompt - num_kept,
                num_with_prompt,
                why_unmarked(self.faults),
            )
            return tables._replace(marker_kept=num_kept / num_with_prompt)
        return tables._replace(
            status=status,
            marker_ids=marker,
            user_marker_ids=user_marker,
            marker_kept=num_kept / num_with_prompt,
        )

    def _refuse(
        self, num_kept: int, num_with_prompt: int, status: np.ndarray, marker: list[int] | None
    ) -> None:
        reasons = Counter(REASONS[code] for code in status.tolist() if code)
        raise refused(self.encoder, num_kept, reasons, num_with_prompt, marker, self.faults)


class TokenTables(NamedTuple):
    """Content of a finished TokenStore: a row per prompt and per response ever added."""

    prompts: Ragged
    responses: Ragged
    response_prompt: np.ndarray
    num_chars: np.ndarray
    status: np.ndarray
    marker_ids: list[int] | None
    user_marker_ids: list[int] | None
    marker_kept: float | None


def _misplaced(tables: TokenTables, marker: list[int], user_marker: list[int] | None) -> np.ndarray:
    """Per response, the code of a marker that `find_prompt_length` would trip over, else 0."""
    prompts, responses, row = tables.prompts, tables.responses, tables.response_prompt

    def after_prompt(ids: list[int], skip_end: bool) -> np.ndarray:
        left, right = (prompts.tokens, prompts.offsets), (responses.tokens, responses.offsets)
        return count_in_rows(*right, ids, skip_end) + count_across(left, right, row, ids)

    in_prompt = count_in_rows(prompts.tokens, prompts.offsets, marker)[row]
    expected, in_response = 1, after_prompt(marker, skip_end=True)
    if user_marker:
        expected = count_in_rows(prompts.tokens, prompts.offsets, user_marker)[row]
        in_response = in_response + after_prompt(user_marker, skip_end=False)
    codes = np.where(in_prompt != expected, CODE["marker_in_prompt"], 0)
    return np.where(in_response > 0, CODE["marker_in_response"], codes)


def _share(good: np.ndarray, of: np.ndarray) -> float:
    return float(good[of].mean()) if of.any() else 1.0


def _view(values: array) -> np.ndarray:
    return np.frombuffer(values, values.typecode) if len(values) else np.zeros(0, values.typecode)


class VectorStore:
    """Distinct response vectors and, where records have them, prompt vectors."""

    kind = "vectors"

    def __init__(self) -> None:
        self.size: int | None = None
        self.response_values, self.prompt_values = array("f"), array("f")
        self.response_prompt = array("q")
        self.num_prompts = 0
        self._has_prompts: bool | None = None

    def add(
        self,
        prompt_row: int,
        prompt: tuple[float, ...] | None,
        vector: tuple[float, ...],
        where: str = "record",
    ) -> None:
        """Append a response, and its prompt when that is new. Raises UserError, naming `where`, for another size."""
        has_prompt = prompt is not None
        if self.size is None:
            self.size, self._has_prompts = len(vector), has_prompt
        if has_prompt != self._has_prompts:
            raise UserError(
                f"{where}: some records have prompt_features and some do not; give them in every "
                "record or in none"
            )
        for name, values in (("response", vector), ("prompt", prompt)):
            if values is not None and len(values) != self.size:
                raise UserError(
                    f"{where}: a {name} vector of size {len(values)}, but the first has "
                    f"{self.size}; all vectors of a dataset must have one size"
                )
        if prompt_row == self.num_prompts:
            self.num_prompts += 1
            if prompt is not None:
                self.prompt_values.extend(prompt)
        self.response_values.extend(vector)
        self.response_prompt.append(prompt_row)

    def finish(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(response vectors [R, H], prompt vectors [P, H] or None, prompt of each response)."""
        size = self.size or 1
        responses = np.frombuffer(self.response_values, np.float32).reshape(-1, size)
        prompts = None
        if self._has_prompts:
            prompts = np.frombuffer(self.prompt_values, np.float32).reshape(-1, size)
        for name, values in (("response", responses), ("prompt", prompts)):
            if values is not None and not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise UserError(
                    f"{name} vector {row} holds a number that is not finite in float32; mend or "
                    "drop its records"
                )
        return responses, prompts, np.frombuffer(self.response_prompt, np.int64)
