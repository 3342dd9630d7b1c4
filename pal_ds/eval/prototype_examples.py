"""Examples of what each prototype prefers: the evaluated comparisons on which it departs most from the others."""

from dataclasses import replace

import numpy as np
import torch

from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import load_tokenizer
from pal_ds.distributed.world import World
from pal_ds.eval.message_texts import TextsOfTokens
from pal_ds.eval.schema import PrototypeExample
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.readers import Reader, reader_of

NUM_EXAMPLES = 3
MOST_CHARS = 300
"""Characters of a text that an example shows: the end of a prompt, the beginning of a response."""


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of some rows, evenly among them."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return rows[places]


def examples_of_prototypes(
    restored: OpenRun, reader: Reader, rows: np.ndarray, world: World
) -> list[list[PrototypeExample]] | None:
    """Return for each prototype the comparisons that tell it from the others, the clearest first, on every rank.

    Each of the comparisons `rows` is scored for K users, the k-th of whom is all prototype k; it tells k from others
    by how far its margin m_k lies from the mean of all m. Where `reader` encodes texts in each forward, those of `rows`
    are encoded once more, ahead of it. None where there is nothing to tell: no rows, fewer than two prototypes, a head
    whose users are no mixtures, or vectors in place of texts.
    """
    data, num_prototypes = reader.collator.data, restored.users.num_prototypes
    if "logits" not in restored.model.head.needs or num_prototypes < 2 or data.prompts is None:
        return None
    if len(rows) == 0:
        return None
    if not reader.collator.stored:
        everyone = np.zeros(len(data.users), np.int64)
        reader = reader_of(restored, data, rows, everyone, world, encode_ahead=True)
    # The last row is whom nobody here is: the population.
    mixtures = torch.cat([torch.eye(num_prototypes), torch.zeros(1, num_prototypes)])
    margins = np.empty((len(rows), num_prototypes))
    for k in range(num_prototypes):
        only_k = np.full(len(data.users), k, np.int64)
        of_k = replace(reader, collator=replace(reader.collator, table_rows=only_k))
        margins[:, k] = of_k.forwards(world).margins(rows, mixtures)
    return world.from_rank_zero(lambda: _described(data, rows, margins))


def _described(
    data: PreparedData, rows: np.ndarray, margins: np.ndarray
) -> list[list[PrototypeExample]]:
    tokens = data.info["tokens"]
    assert data.prompts is not None and data.responses is not None and tokens is not None
    separator = (tokens["separator"] or "").strip()
    read = TextsOfTokens(load_tokenizer(str(data.tokenizer_path)), tokens)
    departure = np.nan_to_num(margins - margins.mean(1, keepdims=True))

    def text(ids: np.ndarray) -> str:
        return read.text(ids.tolist())

    examples: list[list[PrototypeExample]] = []
    for k in range(margins.shape[1]):
        clearest = np.argsort(-np.abs(departure[:, k]), kind="stable")[:NUM_EXAMPLES]
        of_k: list[PrototypeExample] = []
        for place in clearest:
            pair, margin = data.comparisons[rows[place]], float(margins[place, k])
            prompt_row = int(data.response_prompt[pair["a"]])
            # Against the others, not against zero: where all prefer one response, this one may prefer it less.
            likes, other = ("b", "a") if departure[place, k] > 0 else ("a", "b")
            prompt = text(data.prompts[prompt_row]).removesuffix(separator)
            of_k.append(
                {
                    "prompt": prompt.strip()[-MOST_CHARS:],
                    "likes_more": text(data.responses[int(pair[likes])])[:MOST_CHARS],
                    "than": text(data.responses[int(pair[other])])[:MOST_CHARS],
                    "margin": margin if likes == "b" else -margin,
                    "mean_margin": float(margins[place].mean()) * (1 if likes == "b" else -1),
                }
            )
        examples.append(of_k)
    return examples
