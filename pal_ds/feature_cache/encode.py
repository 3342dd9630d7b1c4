"""A frozen backbone encodes each distinct text once; training then reads the stored states through the same batch.

A text's states do not depend on who shares its forward: the width follows from the text's own length, no batch mixes
rows with and without padding (transformers drops a mask that masks nothing, and another kernel runs), and on a GPU,
where the number of rows may choose the kernel, every forward has the same number. So ranks, splits and restarts may
divide the texts as they like.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.distributed.preemption import StopRequested
from pal_ds.distributed.world import World
from pal_ds.feature_cache.folders import CacheFolder
from pal_ds.feature_cache.keepers import CacheKeeper, Keeper, MemoryKeeper
from pal_ds.feature_cache.shards import address_of, as_addresses
from pal_ds.heads.base import Features
from pal_ds.progress import progress_bar

WIDTH_STEP = 32
"""Rows of a forward are padded to a multiple of so many tokens."""

Load = Callable[[], nn.Module]


def encode_once(
    load: Load,
    collator: Collator,
    comparisons: np.ndarray,
    batch_texts: int,
    world: World,
    caches: dict[str, CacheFolder] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Collator:
    """A collator with the states of every response (and prompt, where one is read) of these comparisons.

    Args:
        load: gives what makes Features of a batch; called once, and not at all where `caches` hold every state.
        comparisons: rows of the comparisons table.
        caches: folders for the states of "responses" and "prompts"; None keeps them in memory, on every rank.
        between: called before each forward, on all ranks; may raise StopRequested on all of them.

    Ranks run the same number of forwards, because under ZeRO-3 each forward gathers weights from all of them.

    Raises:
        StorageError: a shard cannot be written or read; on every rank. What was written before stays.
    """
    data = collator.data
    table = data.comparisons[comparisons]
    responses = np.unique(np.concatenate([table["a"], table["b"]]))
    keepers: dict[str, Keeper] = {
        name: MemoryKeeper(world) if caches is None else CacheKeeper(caches[name], world)
        for name in ("responses", "prompts")[: 2 if collator.with_prompt else 1]
    }
    encoding = _Encoding(
        load=functools.cache(load),
        collator=collator,
        batch_texts=batch_texts,
        world=world,
        with_addresses=caches is not None,
        between=between,
    )
    num_prompts = len(collator.responses)
    if collator.with_prompt and collator.encoding == "separate":
        _encode(encoding, responses, {"responses": keepers["responses"]}, of_prompts=False)
        prompts = np.unique(data.response_prompt[responses])
        _encode(encoding, prompts, {"prompts": keepers["prompts"]}, of_prompts=True)
        num_prompts = len(collator.prompts)
    else:
        # One pass gives both, and a truncated prompt differs between responses.
        _encode(encoding, responses, keepers, of_prompts=False)
    return replace(
        collator,
        response_store=keepers["responses"].store(len(collator.responses)),
        prompt_store=keepers["prompts"].store(num_prompts) if "prompts" in keepers else None,
    )


@dataclass(frozen=True)
class _Encoding:
    """Settings with which all texts of one call of `encode_once` are encoded."""

    load: Load
    collator: Collator
    batch_texts: int
    world: World
    with_addresses: bool
    between: Callable[[], None]


def _encode(
    encoding: _Encoding, texts: np.ndarray, keepers: dict[str, Keeper], *, of_prompts: bool
) -> None:
    """Hands the keepers the states of the texts (sorted row numbers) that they lack."""
    label = "encoding prompts" if of_prompts else "encoding responses"
    collator, world, batch_texts = encoding.collator, encoding.world, encoding.batch_texts
    addresses = None
    if encoding.with_addresses:
        addresses = _addresses(collator, texts, of_prompts, world)
    lacking = [keeper.begin(texts, addresses) for keeper in keepers.values()]
    batches = fixed_batches(
        collator, functools.reduce(np.union1d, lacking), of_prompts, batch_texts
    )
    num_rounds = -(-len(batches) // world.world_size)
    # On every rank alike, as the keepers agree on what is lacking.
    backbone = encoding.load() if batches else None
    try:
        with (
            torch.no_grad(),
            progress_bar(label, num_rounds, shown=world.is_rank_zero and num_rounds > 0) as advance,
        ):
            for first in range(0, len(batches), world.world_size):
                phase.enter(label)
                encoding.between()
                # A rank without a batch still takes part in the collectives, with states that are dropped.
                mine = first + world.rank
                rows, width = (
                    batches[mine] if mine < len(batches) else (batches[0][0][:1], batches[0][1])
                )
                assert backbone is not None
                # On a CPU a row's bits are the same in any number of rows, and each would cost its full time.
                num_rows = batch_texts if world.device.type == "cuda" else len(rows)
                batch = _text_batch(collator, rows, width, num_rows, of_prompts)
                states = backbone(batch.to(world.device))
                if mine < len(batches):
                    _hand_over(collator, keepers, rows, states)
                for keeper in keepers.values():
                    keeper.settle()
                round_ = batches[first : first + world.world_size]
                advance(sum(len(rows) for rows, _ in round_))
    except StopRequested:
        for keeper in keepers.values():
            keeper.flush()
        raise
    for keeper in keepers.values():
        keeper.finish()


def fixed_batches(
    collator: Collator, rows: np.ndarray, of_prompts: bool, batch_texts: int
) -> list[tuple[np.ndarray, int]]:
    """(rows, width in tokens) of each forward, wide ones first; rows of a batch all have padding, or none has."""
    data = collator.data
    max_length, prefix = data.info["tokens"]["max_length"], data.info["tokens"]["prefix_ids"]
    if of_prompts:
        lengths = collator.prompts.lengths_of(rows)
    elif collator.encoding == "separate":
        lengths = len(prefix) + collator.responses.lengths_of(rows)
    else:
        prompts = collator.prompts.lengths_of(data.response_prompt[rows])
        lengths = prompts + collator.responses.lengths_of(rows)
    lengths = np.minimum(lengths, max_length)
    widths = np.minimum((lengths // WIDTH_STEP + 1) * WIDTH_STEP, max_length)
    kinds = 2 * widths + (lengths == widths)
    batches: list[tuple[np.ndarray, int]] = []
    for kind in np.unique(kinds)[::-1]:
        same = rows[kinds == kind]
        cuts = range(batch_texts, len(same), batch_texts)
        batches += [(part, int(kind) // 2) for part in np.split(same, cuts)]
    return batches


def _addresses(collator: Collator, rows: np.ndarray, of_prompts: bool, world: World) -> np.ndarray:
    """By what each text is found in a cache, uint64 [n, 2]; each rank hashes its share."""
    phase.enter("hash the texts")
    nothing = np.empty(0, np.int64)
    share = []
    for row in rows[world.rank :: world.world_size].tolist():
        parts = (collator.prompt_sequence(row), nothing) if of_prompts else collator.sequence(row)
        share.append(address_of(*parts))
        phase.progress()
    addresses = np.empty((len(rows), 2), np.uint64)
    for rank, joined in enumerate(world.gather(b"".join(share))):
        addresses[rank :: world.world_size] = as_addresses(joined)
    return addresses


def _text_batch(
    collator: Collator, rows: np.ndarray, width: int, num_rows: int, of_prompts: bool
) -> Batch:
    """A batch of texts without comparisons, [num_rows, width] tokens; its last rows repeat the first."""
    nothing = np.empty(0, np.int64)
    rows = np.concatenate([rows, np.repeat(rows[:1], num_rows - len(rows))])
    fields = collator.tokens(nothing if of_prompts else rows, rows if of_prompts else nothing)
    ids, mask = fields["input_ids"], fields["attention_mask"]
    assert ids is not None and mask is not None
    missing = (0, width - ids.shape[1])
    fields["input_ids"] = nn.functional.pad(ids, missing, value=collator.pad_token_id)
    fields["attention_mask"] = nn.functional.pad(mask, missing)
    blank: dict[str, Any] = dict.fromkeys(Batch._fields, torch.empty(0, dtype=torch.int64))
    return Batch(**{**blank, **Batch._field_defaults, "prompt_index": None, **fields})


def _hand_over(
    collator: Collator, keepers: dict[str, Keeper], rows: np.ndarray, states: Features
) -> None:
    """Gives the keepers the states of `rows`, which the last rows of the batch may repeat, without their padding."""
    for name, keeper in keepers.items():
        if name == "responses":
            padded = states.response
            lengths = np.minimum(collator.responses.lengths_of(rows), padded.shape[1])
        else:
            assert states.prompt is not None and states.prompt_length is not None
            padded, lengths = states.prompt, states.prompt_length[: len(rows)]
        padded = padded[: len(rows)].cpu()
        for row, own, length in zip(rows.tolist(), padded, lengths.tolist(), strict=True):
            # A copy: a view would hold on to the padding.
            keeper.take(row, own[:length].clone())
