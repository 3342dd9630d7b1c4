"""Notes on messages (`id`, `timestamp`) that no template shows: they part no prompts and no conversations."""

import copy

from pal_ds.data.build import build_tables
from pal_ds.data.parse import parse_record
from pal_ds.data.records import Record
from pal_ds.data.splits import SplitOptions, content_digest
from pal_ds.data.tokenise import TextEncoder


def noted(number: int, role: str, content: str) -> dict:
    return {"role": role, "content": content, "id": f"m-{number}", "timestamp": 17 * number}


def test_one_question_is_one_prompt_in_one_split(chatml, tmp_path):
    records = [
        parse_record(
            {
                "user_id": f"u{i}",
                "prompt": [noted(i, "user", f"Tea {i % 10}?")],
                "chosen": [noted(i, "assistant", "yes")],
                "rejected": [noted(i, "assistant", "no")],
            },
            f"x:{i}",
        )
        for i in range(60)
    ]
    options = SplitOptions(dev_fraction=0.3, test_fraction=0.3)
    data = build_tables(records, tmp_path / "D", TextEncoder(copy.deepcopy(chatml)), options)
    assert data.info["counts"]["prompts"] == 10 and data.info["counts"]["responses"] == 20
    prompts = data.response_prompt[data.comparisons["a"]]
    for prompt in range(10):
        assert len(set(data.comparisons["split"][prompts == prompt])) == 1


def test_conversations_whose_notes_differ_share_their_prompt():
    whole = [[noted(10 * k + i, *said) for i, said in enumerate(TURNS)] for k in (0, 1)]
    row = {"chosen": [*whole[0], noted(5, "assistant", "yes")]}
    row["rejected"] = [*whole[1], noted(6, "assistant", "no")]
    record = parse_record(row, "x")
    assert record.prompt == whole[0]
    again = parse_record({**row, "prompt": whole[1]}, "x")
    assert again.prompt == whole[0]


TURNS = (("user", "Tea?"), ("assistant", "Which?"), ("user", "Green."))


def test_what_a_template_shows_parts_messages():
    """And messages without notes, and schemas of tools, have the digests that they always had."""
    plain = [{"role": "user", "content": "Tea?"}]
    assert content_digest(plain).hex() == "2f1c70a54e6d8771c3b2d6b5df2e6166"
    assert content_digest([{**plain[0], "id": 3}]) == content_digest(plain)
    for key, value in (("name", "Ann"), ("tool_call_id", "c1"), ("reasoning_content", "hm")):
        assert content_digest([{**plain[0], key: value}]) != content_digest(plain)
    tools = [{"type": "function", "function": {"name": "order"}}]
    assert content_digest(tools).hex() == "b69d9a80d473a0e86dabf105a9d7cb79"
    assert Record("u", -1, prompt=plain, responses=("a", "b")).prompt == plain
