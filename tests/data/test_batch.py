"""Batches against an independent reading of the tables: every distinct text once, windows, truncation, stand-ins."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pal_ds.data.collator import Collator
from pal_ds.data.features import FeatureStore
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("batch")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 60)))
    settings = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)


def text_of(data: PreparedData, response: int) -> list[int]:
    """Prompt and response ids, the prompt cut from the left; written without the collator."""
    tokens = data.info["tokens"]
    prompt = list(data.prompts[int(data.response_prompt[response])])
    answer = list(data.responses[response])
    prefix = len(tokens["prefix_ids"])
    room = tokens["max_length"] - len(answer)
    while len(prompt) > room:
        del prompt[prefix]
    return prompt + answer


def test_every_distinct_text_once(data: PreparedData) -> None:
    rows = np.array([3, 4, 3, 10, 11])
    batch = Collator(data)(rows, np.arange(5))
    table = data.comparisons[rows]
    distinct = sorted({int(r) for r in np.concatenate([table["a"], table["b"]])})
    assert batch.input_ids.shape[0] == len(distinct)
    for index in range(5):
        for side, column in enumerate(("a", "b")):
            row = int(batch.response_index[index, side])
            length = int(batch.attention_mask[row].sum())
            assert batch.input_ids[row, :length].tolist() == text_of(
                data, int(table[column][index])
            )
            # `last` is the end token.
            position = int(batch.response_positions[row, 0])
            assert position == length - 1
            assert int(batch.input_ids[row, position]) == data.info["tokens"]["end_ids"][0]


def test_truncation_takes_the_prompt_alone(data: PreparedData) -> None:
    longest = max(range(len(data.responses)), key=lambda r: len(data.responses[r]))
    cut = replace(data, info={**data.info, "tokens": {**data.info["tokens"], "max_length": 40}})
    head, tail = Collator(cut).sequence(longest)
    assert len(head) + len(tail) == 40
    assert list(tail) == list(data.responses[longest])
    assert list(head) == list(data.prompts[int(data.response_prompt[longest])])[-len(head) :]


def test_windows_start_where_answers_differ(data: PreparedData) -> None:
    rows = np.arange(20)
    batch = Collator(data, scored_positions="all")(rows, rows)
    for index, row in enumerate(data.comparisons[rows]):
        a, b = list(data.responses[int(row["a"])]), list(data.responses[int(row["b"])])
        start = next(t for t in range(max(len(a), len(b))) if a[t : t + 1] != b[t : t + 1])
        assert (int(batch.window_start[index]), int(batch.window_end[index])) == (
            start,
            max(len(a), len(b)),
        )
        for side, answer in enumerate((a, b)):
            positions = batch.response_positions[batch.response_index[index, side]]
            ids = batch.input_ids[batch.response_index[index, side]][positions].tolist()
            # Past its end the shorter answer keeps its last token.
            assert ids[: len(answer)] == answer
            assert set(ids[len(answer) :]) <= {answer[-1]}


def test_prompts_joint_and_separate(data: PreparedData) -> None:
    rows = np.arange(12)
    joint = Collator(data, with_prompt=True)(rows, rows)
    for index, row in enumerate(data.comparisons[rows]):
        slot = int(joint.prompt_index[index, 0])
        prompt = list(data.prompts[int(data.response_prompt[row["a"]])])
        length = int(joint.prompt_length[slot])
        assert joint.input_ids[joint.prompt_rows[slot], :length].tolist() == prompt
    separate = Collator(data, with_prompt=True, encoding="separate")(rows, rows)
    num_prompts = len(set(data.response_prompt[data.comparisons[rows]["a"]]))
    assert len(separate.prompt_rows) == num_prompts
    for index, row in enumerate(data.comparisons[rows]):
        slot = int(separate.prompt_index[index, 1])
        ids = separate.input_ids[separate.prompt_rows[slot], : int(separate.prompt_length[slot])]
        assert ids.tolist() == list(data.prompts[int(data.response_prompt[row["b"]])])


def test_an_empty_run_gets_a_weightless_stand_in(data: PreparedData) -> None:
    batch = Collator(data)(np.empty(0, np.int64), np.empty(0, np.int64))
    assert batch.weight.tolist() == [0.0]
    assert batch.position.tolist() == [-1]
    assert batch.input_ids.shape[0] == 2


def test_stored_states_are_gathered_by_row(data: PreparedData) -> None:
    lengths = data.responses.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    store = FeatureStore(torch.arange(int(offsets[-1]), dtype=torch.float32)[:, None], offsets)
    batch = Collator(data, scored_positions="all", response_store=store)(
        np.array([5]), np.array([0])
    )
    row = data.comparisons[5]
    for side, column in enumerate(("a", "b")):
        states = batch.response_states[batch.response_index[0, side], :, 0]
        first, length = offsets[row[column]], lengths[row[column]]
        assert states[:length].tolist() == list(range(first, first + length))
        assert set(states[length:].tolist()) <= {float(first + length - 1)}


def test_the_stand_in_is_a_row_at_hand(data: PreparedData) -> None:
    """A frozen store holds only the rows in work: any other row would have no states."""
    rows = np.array([7, 8])
    needed = np.unique([data.comparisons[rows]["a"], data.comparisons[rows]["b"]])
    lengths = np.zeros(len(data.responses), np.int64)
    lengths[needed] = 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    store = FeatureStore(torch.ones(len(needed), 4), offsets)
    nothing = np.empty(0, np.int64)
    batch = Collator(data, response_store=store)(nothing, nothing, stand_in=7)
    assert batch.response_states.shape[1:] == (1, 4)
    assert batch.weight.tolist() == [0.0]


def test_separate_prompts_alone_have_integer_positions(data: PreparedData) -> None:
    """What a frozen backbone encodes: prompts without a single response, at either kind of scored position."""
    for scored in ("last", "all"):
        collator = Collator(data, scored_positions=scored, with_prompt=True, encoding="separate")
        fields = collator.tokens(np.empty(0, np.int64), np.array([0, 1]))
        assert fields["response_positions"].dtype == torch.int64
        assert fields["prompt_length"].tolist() == [len(data.prompts[0]), len(data.prompts[1])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_length", [48, 40, 36])
def test_prompts_cut_at_their_end_keep_the_response_marker(
    data: PreparedData, max_length: int, packed: bool
) -> None:
    """What stands in front of the marker goes, token by token; marker, response and end token stay while they fit."""
    info = data.info["tokens"]
    marker, prefix = info["marker_ids"], info["prefix_ids"]
    tokens = {**info, "max_length": max_length, "truncation_side": "right"}
    cut = replace(data, info={**data.info, "tokens": tokens})
    collator = Collator(cut, with_prompt=True, packed=packed)
    num_cut = 0
    for response in range(len(data.responses)):
        answer = list(data.responses[response])
        if len(answer) + len(prefix) > max_length:
            continue
        prompt = list(data.prompts[int(data.response_prompt[response])])
        assert prompt[-len(marker) :] == marker
        while len(prompt) + len(answer) > max_length:
            num_cut += 1
            del prompt[
                len(prompt) - len(marker) - 1
                if len(prompt) > len(marker) + len(prefix)
                else len(prefix)
            ]
        head, tail = collator.sequence(response)
        assert head.tolist() == prompt and tail.tolist() == answer
        assert answer[-len(info["end_ids"]) :] == info["end_ids"]
    assert num_cut > 10


def test_truncation_side_is_kept_with_the_tables(tmp_path: Path) -> None:
    """Another side is another dataset; the default leaves tables of before as they were."""
    source = Jsonl(str(write_pairs(tmp_path / "pairs.jsonl", 8)))
    settings = {"max_length": 40, "vocab_size": 300, "dev_fraction": 0.0, "test_fraction": 0.0}
    left = DataConfig(path=str(tmp_path / "left"), source=source, **settings)
    right = replace(left, path=str(tmp_path / "right"), truncation_side="right")
    assert "truncation_side" not in prepare(left, quiet=True).info["tokens"]
    assert prepare(right, quiet=True).info["tokens"]["truncation_side"] == "right"
    with pytest.raises(UserError, match="truncation_side"):
        prepare(replace(right, truncation_side="left"), quiet=True)
