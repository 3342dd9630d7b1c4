"""A frozen backbone encodes each distinct text once; training then reads the stored states through the same batch."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from pal_ds import phase
from pal_ds.data.batch import Batch, Collator, FeatureStore
from pal_ds.engine.dist import World
from pal_ds.progress import progress_bar


def encode_once(
    backbone: nn.Module, collator: Collator, comparisons: np.ndarray, batch_texts: int, world: World
) -> Collator:
    """A collator with the states of every response (and prompt, where one is read) of these comparisons.

    `backbone(batch)` returns Features. Ranks take contiguous shares and run the same number of forwards, because
    under ZeRO-3 each forward gathers weights from all of them.
    """
    data = collator.data
    table = data.comparisons[comparisons]
    responses = np.unique(np.concatenate([table["a"], table["b"]]))
    states, prompt_states = _encode(backbone, collator, responses, False, batch_texts, world)
    num_responses = len(collator.responses)
    prompt_store = _store(prompt_states, responses, num_responses)
    if collator.with_prompt and collator.encoding == "separate":
        prompts = np.unique(data.response_prompt[responses])
        _, prompt_states = _encode(backbone, collator, prompts, True, batch_texts, world)
        prompt_store = _store(prompt_states, prompts, len(collator.prompts))
    return replace(
        collator, response_store=_store(states, responses, num_responses), prompt_store=prompt_store
    )


def _encode(
    backbone: nn.Module,
    collator: Collator,
    texts: np.ndarray,
    of_prompts: bool,
    batch_texts: int,
    world: World,
) -> tuple[list[Tensor], list[Tensor]]:
    """(response states, prompt states) [n_i, H] of every text (sorted row numbers), in order, on every rank."""
    # By length, so that a batch pads little; dealt out in turn, so that ranks get equal work.
    table = collator.prompts if of_prompts else collator.responses
    by_length = texts[np.argsort(-table.lengths_of(texts), kind="stable")]
    shares = [by_length[rank :: world.world_size] for rank in range(world.world_size)]
    num_batches = -(-len(shares[0]) // batch_texts)
    response_states: list[Tensor] = []
    prompt_states: list[Tensor] = []
    label = "encoding prompts" if of_prompts else "encoding responses"
    with torch.no_grad(), progress_bar(label, num_batches, shown=world.is_rank_zero) as advance:
        for index in range(num_batches):
            phase.enter(label)
            rows = shares[world.rank][index * batch_texts : (index + 1) * batch_texts]
            num_rows = len(rows)
            # A share that ran out still takes part in the collectives, with a text whose states are dropped.
            rows = rows if num_rows else texts[:1]
            states = backbone(_text_batch(collator, rows, of_prompts).to(world.device))
            if num_rows and not of_prompts:
                lengths = np.minimum(collator.responses.lengths_of(rows), states.response.shape[1])
                response_states += _valid(states.response, torch.from_numpy(lengths))
            if num_rows and states.prompt is not None:
                prompt_states += _valid(states.prompt, states.prompt_length)
            advance(num_rows * world.world_size)
    place = np.empty(len(texts), np.int64)
    place[np.searchsorted(texts, np.concatenate(shares))] = np.arange(len(texts))
    return _gathered(response_states, place, world), _gathered(prompt_states, place, world)


def _text_batch(collator: Collator, rows: np.ndarray, of_prompts: bool) -> Batch:
    """A batch of texts without comparisons."""
    nothing = np.empty(0, np.int64)
    fields = collator.tokens(nothing if of_prompts else rows, rows if of_prompts else nothing)
    empty = torch.empty(0, dtype=torch.int64)
    blank: dict[str, Tensor | None] = dict.fromkeys(Batch._fields, empty)
    return Batch(**{**blank, **dict.fromkeys(("gumbel", "prompt_index", "packing")), **fields})


def _valid(states: Tensor, lengths: Tensor) -> list[Tensor]:
    """Rows [n_i, H] of padded states [N, n, H], on the CPU."""
    return [row[:length].cpu() for row, length in zip(states, lengths.tolist(), strict=True)]


def _gathered(states: list[Tensor], place: np.ndarray, world: World) -> list[Tensor]:
    """All ranks' states on every rank; the state of text i lies at `place[i]` of the shares in rank order."""
    parts: list[list[Tensor]] = [states]
    if world.world_size > 1:
        parts = [[] for _ in range(world.world_size)]
        torch_dist.all_gather_object(parts, states)
    rows = [row for part in parts for row in part]
    return [rows[index] for index in place] if rows else []


def _store(states: list[Tensor], texts: np.ndarray, num_texts: int) -> FeatureStore | None:
    """Ragged storage by table row; rows of texts that were not asked for are empty. None without states."""
    if not states:
        return None
    lengths = np.zeros(num_texts, np.int64)
    lengths[texts] = [len(state) for state in states]
    return FeatureStore(torch.cat(states), np.concatenate([[0], np.cumsum(lengths)]))
