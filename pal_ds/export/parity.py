"""The exported folder against the trainer: the same texts, two paths, the largest difference."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from pal_ds.data.collator import Collator
from pal_ds.data.ragged import Ragged
from pal_ds.data.sources.base import read_lines
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData
from pal_ds.data.tokenise import Encoded, TextEncoder
from pal_ds.errors import UserError
from pal_ds.export.tokenizer import open_tokenizer
from pal_ds.heads.base import UserState
from pal_ds.inference.load_run import OpenRun
from pal_ds.losses import decision_margin
from pal_ds.model import RewardModel
from pal_ds.modeling.lengths import num_positions
from pal_ds.remote_code.canonical_rows import CanonicalRows
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification
from pal_ds.remote_code.rows import pad_right

BATCH_TEXTS = 8
PROBE_LENGTHS = 6, 60, 240
NUM_TEXTS = 16
"""Number of samples: enough to tell a wrong export from a right one, few enough for a large model on a CPU."""


def read_samples(opened: OpenRun) -> tuple[list[str], list[Encoded]]:
    """Return (texts, how the trainer divides them into ids) of DATA/samples.jsonl.

    Raises:
        UserError: the file is gone, or its texts no longer give the ids they gave.
    """
    file = opened.data.path / "samples.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: missing; an export is checked on these texts. Prepare again.")
    samples = [sample for _, sample in read_lines(file)]
    if "prompt" in opened.parts.head.needs:
        samples = [sample for sample in samples if sample["prompt"] is not None]
    samples = samples[:: -(-len(samples) // NUM_TEXTS)] if samples else samples
    encoder = TextEncoder.from_info(opened.data.info["tokens"], opened.data.tokenizer_path)
    rendered = [
        encoder.render(sample["prompt"], sample["response"], sample.get("tools"))
        for sample in samples
    ]
    if not samples or None in rendered:
        raise UserError(f"{file}: holds no text that the export can be checked on. Prepare again.")
    whole = [item for item in rendered if item is not None]
    encoded = encoder.encode(whole)
    pairs = zip(encoded, samples, strict=True)
    if any(e is None or len(e.prompt_ids) != s["prompt_tokens"] for e, s in pairs):
        raise UserError(
            f"{opened.data.tokenizer_path}: gives other ids than when the data were prepared; the "
            "folder was changed. Prepare again."
        )
    return [item.text for item in whole], [e for e in encoded if e is not None]


def trainer_scores(
    model: RewardModel, collator: Collator, encoded: list[Encoded], mixture: list[float] | None
) -> np.ndarray:
    """Return the fp64 score [n] of each text by the very path of training: tables, collator, model."""
    collator = Collator(
        _as_data(collator.data, encoded),
        scored_positions=collator.scored_positions,
        encoding=collator.encoding,
        with_prompt=collator.with_prompt,
        pad_token_id=collator.pad_token_id,
    )
    weights = None if mixture is None else torch.tensor([mixture])
    scores = []
    with torch.no_grad():
        for rows in _batches(len(encoded)):
            batch = collator(rows, np.arange(len(rows)))
            user = UserState(None, None, None if weights is None else weights.expand(len(rows), -1))
            reward = model(batch, user).reward[:, 0]
            scores.append(decision_margin(reward, batch.window_end))
    return torch.cat(scores).double().numpy()


def exported_scores(model: torch.nn.Module, folder: Path, texts: list[str]) -> np.ndarray:
    """Return fp64 scores [2, n]: texts padded right with special tokens, and padded left without them.

    A stock class reads positions from the row's start, so it is fed right-padded rows both times.
    """
    tokenizer = open_tokenizer(folder)
    ours = isinstance(model, (PalForSequenceClassification, CanonicalRows))
    ways = []
    for side, special in (("right", True), ("left" if ours else "right", False)):
        scores = [torch.empty(0)]
        for rows in _batches(len(texts)):
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                padding_side=side,
                add_special_tokens=special,
                return_token_type_ids=False,
                return_tensors="pt",
                verbose=False,
            )
            with torch.no_grad():
                scores.append(model(**batch).logits[:, 0].float())
        ways.append(torch.cat(scores).double().numpy())
    return np.stack(ways)


class Probe(TypedDict):
    """Scores that another version of transformers is held to, as `check_probe` reads them."""

    transformers: str
    exact: bool
    ids: list[list[int]]
    prompt_lengths: list[int] | None
    scores: list[float]
    mixture: list[float] | None


def probe_of(model: PreTrainedModel, *, exact: bool) -> Probe:
    """Return rows of PROBE_LENGTHS of drawn tokens, no text of the data, and the scores of a checked model."""
    config = model.config
    form = getattr(config, "canonical", None) or vars(config)
    prefix, end, vocabulary = (
        form["prefix_ids"],
        form["end_ids"],
        config.get_text_config().vocab_size,
    )
    draws = np.random.default_rng(0)
    limits = filter(None, (form["max_tokens"], num_positions(config.get_text_config())))
    room = min(limits, default=max(PROBE_LENGTHS)) - len(prefix) - len(end)
    sizes = [length for length in PROBE_LENGTHS if length <= room] or [room]
    rows = [[*prefix, *draws.integers(vocabulary, size=length).tolist(), *end] for length in sizes]
    ours = isinstance(model, PalForSequenceClassification)
    lengths = [len(prefix) + length // 2 for length in sizes] if ours else None
    ids, mask = pad_right(rows, config.get_text_config().pad_token_id, model.device)
    with torch.no_grad():
        scores = (
            model(ids, mask, **({"prompt_lengths": lengths} if ours else {})).logits[:, 0].tolist()
        )
    return {
        "transformers": transformers.__version__,
        "exact": exact,
        "ids": rows,
        "prompt_lengths": lengths,
        "scores": scores,
        "mixture": getattr(config, "mixture", None),
    }


def _batches(total: int) -> Iterator[np.ndarray]:
    for start in range(0, total, BATCH_TEXTS):
        yield np.arange(start, min(start + BATCH_TEXTS, total))


def _as_data(data: PreparedData, encoded: list[Encoded]) -> PreparedData:
    """Make tables in memory: text i is response i after prompt i, compared with itself in row i."""
    comparisons = np.zeros(len(encoded), COMPARISON_DTYPE)
    comparisons["a"] = comparisons["b"] = np.arange(len(encoded))
    return replace(
        data,
        comparisons=comparisons,
        response_prompt=np.arange(len(encoded)),
        prompts=_ragged([e.prompt_ids for e in encoded]),
        responses=_ragged([e.response_ids for e in encoded]),
    )


def _ragged(rows: list[list[int]]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.concatenate([np.asarray(row, np.int32) for row in rows]), offsets)
