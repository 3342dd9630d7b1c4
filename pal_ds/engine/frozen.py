"""A frozen backbone encodes each distinct text once; training then reads the stored states through the same batch."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from pal_ds.data.batch import Batch, Collator, FeatureStore
from pal_ds.engine.dist import World
from pal_ds.progress import progress_bar


def encode_once(
    backbone: nn.Module, collator: Collator, batch_texts: int, world: World
) -> Collator:
    """A collator with the states of every response (and prompt, where one is read) of its data.

    `backbone(batch)` returns Features. Ranks take contiguous shares and run the same number of forwards, because
    under ZeRO-3 each forward gathers weights from all of them.
    """
    responses = np.arange(len(collator.data.responses.lengths))
    nothing = np.empty(0, np.int64)
    response_store, prompt_store = _encode(
        backbone, collator, responses, nothing, batch_texts, world
    )
    if collator.with_prompt and collator.encoding == "separate":
        prompts = np.arange(len(collator.data.prompts.lengths))
        _, prompt_store = _encode(backbone, collator, nothing, prompts, batch_texts, world)
    return replace(collator, response_store=response_store, prompt_store=prompt_store)


def _encode(
    backbone: nn.Module,
    collator: Collator,
    responses: np.ndarray,
    prompts: np.ndarray,
    batch_texts: int,
    world: World,
) -> tuple[FeatureStore | None, FeatureStore | None]:
    of_prompts = len(responses) == 0
    shares = np.array_split(prompts if of_prompts else responses, world.world_size)
    num_batches = -(-len(shares[0]) // batch_texts)
    response_states: list[Tensor] = []
    prompt_states: list[Tensor] = []
    label = "encoding prompts" if of_prompts else "encoding responses"
    with torch.no_grad(), progress_bar(label, num_batches, shown=world.is_rank_zero) as advance:
        for index in range(num_batches):
            rows = shares[world.rank][index * batch_texts : (index + 1) * batch_texts]
            num_rows = len(rows)
            # A share that ran out still takes part in the collectives, with a text whose states are dropped.
            rows = rows if num_rows else (prompts if of_prompts else responses)[:1]
            batch = _text_batch(collator, rows, of_prompts).to(world.device)
            states = backbone(batch)
            if num_rows and not of_prompts:
                lengths = np.minimum(
                    collator.data.responses.lengths[rows], states.response.shape[1]
                )
                response_states += _valid(states.response, torch.from_numpy(lengths))
            if num_rows and states.prompt is not None:
                prompt_states += _valid(states.prompt, states.prompt_length)
            advance(num_rows * world.world_size)
    return _gather_store(response_states, world), _gather_store(prompt_states, world)


def _text_batch(collator: Collator, rows: np.ndarray, of_prompts: bool) -> Batch:
    """A batch of texts without comparisons."""
    nothing = np.empty(0, np.int64)
    fields = collator.tokens(nothing if of_prompts else rows, rows if of_prompts else nothing)
    empty = torch.empty(0, dtype=torch.int64)
    blank: dict[str, Tensor | None] = dict.fromkeys(Batch._fields, empty)
    return Batch(**{**blank, "gumbel": None, "prompt_index": None, **fields})


def _valid(states: Tensor, lengths: Tensor) -> list[Tensor]:
    """Rows [n_i, H] of padded states [N, n, H], on the CPU."""
    return [row[:length].cpu() for row, length in zip(states, lengths.tolist(), strict=True)]


def _gather_store(states: list[Tensor], world: World) -> FeatureStore | None:
    """All ranks' states in rank order, on every rank; None where there are none."""
    parts: list[list[Tensor] | None] = [states]
    if world.world_size > 1:
        parts = [None] * world.world_size
        torch_dist.all_gather_object(parts, states)
    rows = [row for part in parts for row in part or []]
    if not rows:
        return None
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return FeatureStore(torch.cat(rows), offsets)
