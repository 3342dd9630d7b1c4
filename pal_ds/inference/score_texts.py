"""Scalar scores for texts in a JSONL file: one process, no DeepSpeed."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedModel

from pal_ds.data.records import Text, check_messages
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.progress import progress_bar
from pal_ds.remote_code.rows import pad_right


class Row(NamedTuple):
    """A line of the input: `text`, or `prompt` and `response`."""

    where: str
    record: Mapping[str, Any]
    text: str | None
    prompt: Text | None
    response: Text | None


@dataclass(frozen=True)
class Scorer:
    """A reward model and how its texts are rendered."""

    model: PreTrainedModel
    encoder: TextEncoder

    @property
    def reads_boundary(self) -> bool:
        """True if a score depends on where the response begins."""
        config = self.model.config
        separate = getattr(config, "encoding", "joint") == "separate"
        return separate or getattr(self.model, "reads_prompt", False)

    def tokenise(self, row: Row) -> tuple[list[int], int | None]:
        """Ids of a row, and where its response begins if the model must know.

        Raises:
            UserError: the chat template or the tokenizer cannot tell prompt and response apart.
        """
        text = row.text
        if text is None:
            assert row.response is not None
            rendered = self.encoder.render(row.prompt, row.response)
            if rendered is None:
                raise UserError(f"{row.where}: the chat template cannot render this conversation.")
            if self.reads_boundary:
                encoded = self.encoder.encode([rendered])[0]
                if encoded is None or row.prompt is None:
                    raise UserError(
                        f"{row.where}: no token starts where the response does, and this model "
                        "reads prompt and response apart. Give a prompt and a response."
                    )
                return [*encoded.prompt_ids, *encoded.response_ids], len(encoded.prompt_ids)
            text = rendered.text
        ids = self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, None

    def score_all(self, rows: list[Row], batch_texts: int = 16) -> list[float]:
        """One score per row, `batch_texts` rows in a forward."""
        batches = [rows[start : start + batch_texts] for start in range(0, len(rows), batch_texts)]
        return [score for batch in batches for score in self.score(batch)]

    def score(self, rows: list[Row]) -> list[float]:
        items = [self.tokenise(row) for row in rows]
        scores = [0.0] * len(rows)
        # Rows whose boundary was given and rows whose marker must be found go apart.
        for given in (True, False):
            chosen = [i for i, (_, begin) in enumerate(items) if (begin is not None) == given]
            if not chosen:
                continue
            ids, mask = pad_right([items[i][0] for i in chosen], 0, self.model.device)
            extra = {"prompt_lengths": [items[i][1] for i in chosen]} if given else {}
            try:
                with torch.no_grad():
                    logits = self.model(input_ids=ids, attention_mask=mask, **extra).logits
            except ValueError as error:
                raise UserError(f"{rows[chosen[0]].where} or near it: {error}") from None
            for i, value in zip(chosen, logits[:, 0].tolist(), strict=True):
                scores[i] = value
        return scores


def read_rows(path: Path) -> list[Row]:
    """The lines of a JSONL file, checked.

    Raises:
        UserError: the file is missing or empty, or a line is no such record; names file and line.
    """
    if not path.is_file():
        raise UserError(f"--input {path}: no such file.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--input {path}: not UTF-8 ({error}). Save the file as UTF-8.") from None
    rows = [_read_row(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"--input {path}: is empty; give one JSON object per line.")
    return rows


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Records in memory, each of `text`, or `prompt` and `response`, checked as lines of a file are.

    Raises:
        UserError: there is none, or one is no such record; counted from 0.
    """
    rows = [_checked(record, f"texts[{n}]") for n, record in enumerate(records)]
    if not rows:
        raise UserError(
            "texts: is empty; give a dict of prompt and response, or of text, for each."
        )
    return rows


def _read_row(line: str, where: str) -> Row:
    try:
        return _checked(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None


def _checked(record: object, where: str) -> Row:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a line must be a JSON object, not {type(record).__name__}.")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise UserError(f"{where}: 'text' must be a string that is not empty.")
        return Row(where, record, record["text"], None, None)
    for key in ("prompt", "response"):
        if key not in record:
            raise UserError(f"{where}: has no '{key}'. Give prompt and response, or text.")
    prompt, response = (_text(record[key], where, key) for key in ("prompt", "response"))
    return Row(where, record, None, prompt, response)


def _text(value: object, where: str, key: str) -> Text:
    if isinstance(value, list):
        return check_messages(value, where, key)
    if not isinstance(value, str) or (key == "response" and not value.strip()):
        raise UserError(f"{where}: '{key}' must be a string that is not empty, or chat messages.")
    return value


def write_scores(scorer: Scorer, rows: list[Row], stream: TextIO, batch_texts: int) -> None:
    """Every record with its "score" added, one per line, in the order of the input."""
    starts = range(0, len(rows), batch_texts)
    with progress_bar("scoring", len(starts), shown=True) as advance:
        for start in starts:
            batch = rows[start : start + batch_texts]
            for row, score in zip(batch, scorer.score(batch), strict=True):
                stream.write(json.dumps({**row.record, "score": score}, ensure_ascii=False) + "\n")
            advance(len(batch))
