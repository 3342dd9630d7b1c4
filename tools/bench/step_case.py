"""The case that all contestants of `bench_step.py` train on: one tiny backbone on disk, the same tokens and pairs.

Token ids are random. Id 1 pads and occurs nowhere else, id 2 ends each response: for such ids the PAL reference,
which takes 1 for the pad id of every model, and TRL's last-token search are right.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.ragged import Ragged
from pal_ds.data.splits import SPLITS
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData

PAD, END, NUM_SPECIAL = 1, 2, 3
MAX_LENGTH = 512
"""Of the reference's rows, which are all padded to it."""


class Unavailable(Exception):  # noqa: N818  (a contestant that stays away is no error)
    """Why a contestant cannot take part."""


class Contestant(ABC):
    """A trainer that makes whole updates on `Case.timed`, and can tell what it computes on `Case.parity`."""

    num_padded_tokens: int
    """Positions that the backbone computes in one step, pads included."""

    @abstractmethod
    def loss_and_gradients(self) -> dict[str, Tensor]:
        """`loss` and the gradient of every weight on the parity pairs, under pal_ds's names; weights stay."""

    @abstractmethod
    def step(self) -> None:
        """One update on the timed pairs: tensors from ids, forward, backward, optimizer."""


@dataclass(frozen=True)
class Pairs:
    """Comparisons as token ids; each has a prompt and a user of its own."""

    prompts: list[np.ndarray]
    responses: list[tuple[np.ndarray, np.ndarray]]
    """Each ends in END."""
    labels: np.ndarray
    """-1 where the first response is preferred, +1 where the second."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_real_tokens(self) -> int:
        """Both sequences of each pair, the prompt counted with each response."""
        return self.num_unique_tokens + sum(map(len, self.prompts))

    @property
    def num_unique_tokens(self) -> int:
        """Every prompt and every response once."""
        responses = (len(part) for pair in self.responses for part in pair)
        return sum(map(len, self.prompts)) + sum(responses)

    def chosen_and_rejected(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Whole sequences, prompt first."""
        chosen, rejected = [], []
        for prompt, pair, label in zip(self.prompts, self.responses, self.labels, strict=True):
            better, worse = pair if label == -1 else pair[::-1]
            chosen.append(np.concatenate([prompt, better]))
            rejected.append(np.concatenate([prompt, worse]))
        return chosen, rejected


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    family: str
    backbone: Path
    hidden_size: int
    vocab_size: int
    timed: Pairs
    parity: Pairs
    """Responses of a pair are equally long, where the reference's windows hold no pads (see README.md)."""
    scratch: Path


def make_pairs(
    num_pairs: int,
    prompt_length: int,
    response_length: int,
    vocab_size: int,
    seed: int,
    *,
    spread: float,
    equal: bool = False,
) -> Pairs:
    """Random pairs whose lengths lie within `spread` of the given ones; `equal`: both responses of a pair alike."""
    generator = np.random.default_rng(seed)

    def length_near(wanted: int) -> int:
        return max(
            2, round(wanted * generator.uniform(1 - spread, 1 + spread) if spread else wanted)
        )

    def ids(length: int) -> np.ndarray:
        return generator.integers(NUM_SPECIAL, vocab_size, length)

    prompts, responses = [], []
    for _ in range(num_pairs):
        prompts.append(ids(length_near(prompt_length)))
        first = length_near(response_length)
        second = first if equal else length_near(response_length)
        first, second = (np.append(ids(n - 1), END) for n in (first, second))
        responses.append((first, second))
    return Pairs(prompts, responses, 2 * generator.integers(0, 2, num_pairs) - 1)


def make_case(
    family: str,
    num_pairs: int,
    lengths: tuple[int, int],
    scratch: Path,
    *,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
) -> Case:
    """A case with `num_pairs` timed pairs and at most 4 for parity; its backbone is written to `scratch` once.

    `lengths` are tokens of a prompt and of a response.
    """
    folder = scratch / f"{family}_{hidden_size}_{num_layers}_{vocab_size}"
    if not folder.is_dir():
        architecture = architecture_of(family, hidden_size, num_layers)
        materialise_architecture(BackboneConfig(architecture=architecture), vocab_size, 0, folder)
    return Case(
        family,
        folder,
        hidden_size,
        vocab_size,
        make_pairs(num_pairs, *lengths, vocab_size, seed=1, spread=0.1),
        make_pairs(min(num_pairs, 4), *lengths, vocab_size, seed=2, spread=0.1, equal=True),
        scratch,
    )


def architecture_of(family: str, hidden_size: int, num_layers: int) -> dict[str, object]:
    """A small OPT or Llama without dropout: two trainers would draw it differently."""
    common = {
        "model_type": family,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(hidden_size // 64, 1),
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    if family == "opt":
        rates = dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), 0.0)
        sizes = {"ffn_dim": 4 * hidden_size, "word_embed_proj_dim": hidden_size}
        return {**common, **rates, **sizes}
    return {
        **common,
        "intermediate_size": 8 * hidden_size // 3 // 16 * 16,
        "num_key_value_heads": max(hidden_size // 64, 1),
    }


def prepared(case: Case) -> PreparedData:
    """The pairs as prepared tables in memory: the timed ones are the train split, those for parity the dev split."""
    prompts = case.timed.prompts + case.parity.prompts
    pairs = case.timed.responses + case.parity.responses
    table = np.zeros(len(prompts), COMPARISON_DTYPE)
    table["user"] = np.arange(len(prompts))
    table["a"], table["b"] = table["user"] * 2, table["user"] * 2 + 1
    table["label"] = np.concatenate([case.timed.labels, case.parity.labels])
    table["group"], table["probability"] = -1, np.nan
    table["split"] = SPLITS.index("train")
    table["split"][len(case.timed) :] = SPLITS.index("dev")
    tokens = {
        "prefix_ids": [],
        "end_ids": [END],
        "max_length": MAX_LENGTH,
        "marker_ids": [NUM_SPECIAL],
        "separator": "",
        "vocab_size": case.vocab_size,
        "pad_token_id": PAD,
    }
    return PreparedData(
        case.scratch,
        cast(
            Any, {"kind": "tokens", "tokens": tokens, "hash": "0" * 32, "groups": [], "counts": {}}
        ),
        table,
        np.repeat(np.arange(len(prompts)), 2),
        [f"u{user}" for user in range(len(prompts))],
        np.ones(len(prompts), bool),
        [None] * len(prompts),
        _ragged(prompts),
        _ragged([response for pair in pairs for response in pair]),
    )


def _ragged(rows: list[np.ndarray]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Ragged(np.concatenate(rows), offsets)
