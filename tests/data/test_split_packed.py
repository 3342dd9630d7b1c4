"""Packed micro-batches of an update: every comparison once, bounds kept, prompts together, ranks even."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal_ds.data.collator import Collator
from pal_ds.data.packing import SMALL_LENGTH, pack_joint
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.split_packed import COPIES_PER_TOKEN, PairTexts, pair_texts, split_by_cost
from pal_ds.data.tables import PreparedData
from tests.tiny import write_pairs

CASES = [("joint", False), ("joint", True), ("separate", False), ("separate", True)]


def random_texts(seed: int, num_pairs: int, num_prompts: int, *, joint: bool = True) -> PairTexts:
    """Pairs of few prompts and responses, so that texts repeat; lengths are functions of the rows."""
    generator = np.random.default_rng(seed)
    prompt = generator.integers(num_prompts, size=num_pairs)
    response = prompt[:, None] * 4 + np.sort(generator.integers(4, size=(num_pairs, 2)), axis=1)
    kept = np.repeat(5 + prompt[:, None] % 37, 2, axis=1) - (response % 4 == 3)
    return PairTexts(prompt, response, kept, 1 + response % 23, joint)


def distinct_tokens(texts: PairTexts, positions: np.ndarray) -> int:
    """Counted with sets, independently of the code."""
    prompts, responses = set(), set()
    for position in positions:
        for side in (0, 1):
            prompts.add((texts.prompt[position], texts.prompt_tokens[position, side]))
            responses.add((texts.response[position, side], texts.response_tokens[position, side]))
    return int(sum(length for _, length in (*prompts, *responses)))


def copied_tokens(texts: PairTexts, positions: np.ndarray) -> int:
    """In tokens' worth, counted likewise: each distinct response copies what stands before it."""
    before = {
        int(texts.response[position, side]): int(texts.prompt_tokens[position, side])
        for position in positions
        for side in (0, 1)
    }
    return sum(kept // COPIES_PER_TOKEN for kept in before.values()) if texts.joint else 0


@settings(deadline=None, max_examples=300)
@given(
    joint=st.booleans(),
    seed=st.integers(0, 10**6),
    num_pairs=st.integers(1, 70),
    num_prompts=st.integers(1, 40),
    world_size=st.integers(1, 5),
    most_pairs=st.integers(1, 20),
    most_tokens=st.none() | st.integers(1, 400),
)
def test_every_comparison_once_within_the_bounds(
    joint: bool,
    seed: int,
    num_pairs: int,
    num_prompts: int,
    world_size: int,
    most_pairs: int,
    most_tokens: int | None,
) -> None:
    texts = random_texts(seed, num_pairs, num_prompts, joint=joint)
    steps = split_by_cost(texts, world_size, most_pairs, most_tokens)
    assert all(len(step) == world_size for step in steps)
    runs = [run for step in steps for run in step]
    assert sorted(np.concatenate(runs).tolist()) == list(range(num_pairs))
    for run in runs:
        assert len(run) <= most_pairs
        assert run.tolist() == sorted(run.tolist())
        if most_tokens is not None and len(run) > 1:
            assert distinct_tokens(texts, run) + copied_tokens(texts, run) <= most_tokens


def test_a_budget_counts_what_many_responses_copy_of_their_prompt() -> None:
    """512 short responses to one long prompt: its keys outnumber all tokens by far."""
    prompt, response = np.zeros(256, np.int64), np.arange(512).reshape(256, 2)
    kept, tokens = np.full((256, 2), 1000), np.full((256, 2), 4)
    apart = PairTexts(prompt, response, kept, tokens, joint=False)
    assert len(split_by_cost(apart, 1, 256, 4096)) == 1
    budget, steps = 4096, split_by_cost(apart._replace(joint=True), 1, 256, 4096)
    # 1,000 tokens of the prompt, and 4 + 83 for each of at most 35 responses.
    assert max(len(step[0]) for step in steps) == (budget - 1000) // (2 * (4 + 1000 // 12))
    assert sorted(np.concatenate([step[0] for step in steps]).tolist()) == list(range(256))


def test_a_prompt_stays_in_one_run() -> None:
    texts = random_texts(0, 40, 12)
    (step,) = split_by_cost(texts, 2, 40, None)
    prompts = [set(texts.prompt[run].tolist()) for run in step]
    assert all(prompts) and not prompts[0] & prompts[1]


def test_no_step_is_empty_where_every_pair_exceeds_the_budget() -> None:
    texts = random_texts(2, 8, 30)
    steps = split_by_cost(texts, 2, 4, 1)
    assert [[len(run) for run in step] for step in steps] == [[1, 1]] * 4


def test_ranks_share_tokens_evenly() -> None:
    generator = np.random.default_rng(1)
    prompt = np.arange(64)
    tokens = generator.integers(1, 500, size=(64, 1)).repeat(2, axis=1)
    texts = PairTexts(prompt, np.arange(128).reshape(64, 2), tokens, tokens // 4 + 1, joint=False)
    (step,) = split_by_cost(texts, 4, 64, None)
    loads = [distinct_tokens(texts, run) for run in step]
    assert max(loads) <= 1.01 * min(loads)


def test_one_prompt_for_everyone_is_shared_out() -> None:
    texts = PairTexts(
        np.zeros(16, np.int64),
        np.arange(32).reshape(16, 2),
        np.full((16, 2), 9),
        np.full((16, 2), 3),
        joint=True,
    )
    (step,) = split_by_cost(texts, 4, 16, None)
    assert [len(run) for run in step] == [4, 4, 4, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("split_packed")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 60)))
    options = {"max_length": 48, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **options), quiet=True)


@pytest.mark.parametrize(("encoding", "with_prompt"), CASES)
def test_costs_are_the_tokens_of_the_batch(
    data: PreparedData, encoding: Literal["joint", "separate"], with_prompt: bool
) -> None:
    """With prompts that are truncated by response."""
    collator = Collator(data, packed=True, encoding=encoding, with_prompt=with_prompt)
    rows = np.arange(len(data.comparisons))
    texts = pair_texts(collator, rows)
    by_response = (texts.prompt_tokens[:, 0] != texts.prompt_tokens[:, 1]).any()
    assert by_response == (encoding == "joint")
    for run in split_by_cost(texts, 1, 7, 400):
        batch = collator(rows[run[0]], run[0])
        assert batch.input_ids is not None
        assert batch.input_ids.shape[1] == distinct_tokens(texts, run[0])


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), num_prompts=st.integers(1, 12), longest=st.integers(1, 900))
def test_blocks_of_like_length_hold_little_padding(
    seed: int, num_prompts: int, longest: int
) -> None:
    generator = np.random.default_rng(seed)
    prompts = generator.integers(num_prompts, size=20)
    by_prompt = [np.ones(n, np.int64) for n in generator.integers(longest, size=num_prompts)]
    tails = [np.ones(n, np.int64) for n in generator.integers(1, longest + 1, size=20)]
    packing = pack_joint([by_prompt[prompt] for prompt in prompts], prompts, tails).packing
    length = packing.sequence_start.diff().numpy()
    keys = length.copy()
    keys[packing.num_prompts :] += packing.num_before.numpy()
    members = [group.sequences.numpy() for group in packing.groups]
    assert sorted(np.concatenate(members).tolist()) == np.flatnonzero(length).tolist()
    for group, rows in zip(packing.groups, members, strict=True):
        for longest_one, sizes in ((group.longest, length[rows]), (group.longest_keys, keys[rows])):
            assert longest_one == sizes.max()
            assert (sizes >= min(longest_one / 1.5, longest_one - SMALL_LENGTH)).all()
