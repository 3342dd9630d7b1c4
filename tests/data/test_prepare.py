"""From records to tables and back: splits, drops, hashes, reuse, vectors."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pal_ds.data.bad_rows import BadRows
from pal_ds.data.build import build_tables
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.records import Record
from pal_ds.data.sources import Jsonl
from pal_ds.data.splits import SPLITS, SplitOptions
from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.remote_code.canonical import canonical_ids, find_prompt_length


def record(i: int, prompt: str | None = None, **fields) -> Record:
    prompt = f"What is {i}?" if prompt is None else prompt
    defaults = {"user_id": f"u{i % 7}", "label": -1, "responses": (f"It is {i}.", f"No idea {i}.")}
    return Record(prompt=prompt, **{**defaults, **fields})


def rows(num: int) -> list[dict]:
    return [
        {
            "user_id": f"u{i % 7}",
            "prompt": f"Q {i // 3}",
            "chosen": f"yes {i}",
            "rejected": f"no {i}",
        }
        for i in range(num)
    ]


def test_tables_hold_what_direct_tokenisation_gives(bpe, tmp_path):
    records = [record(i // 2) for i in range(40)]
    data = build_tables(records, tmp_path / "D", TextEncoder(bpe))
    assert len(data.comparisons) == 40 and len(data.responses) == 40 and len(data.prompts) == 20
    end, marker = data.info["tokens"]["end_ids"], data.info["tokens"]["marker_ids"]
    for item, row in zip(records, data.comparisons, strict=True):
        assert data.users[row["user"]] == item.user_id
        for side, response in zip("ab", item.responses, strict=True):
            prompt = data.prompts[data.response_prompt[row[side]]]
            got = np.concatenate([prompt, data.responses[row[side]]]).tolist()
            text = f"{item.prompt}\n\n### Response:\n{response}"
            assert got == canonical_ids(bpe(text)["input_ids"], [], end)
            assert find_prompt_length(got, marker) == len(prompt)
            assert data.response_num_chars[row[side]] == len(response)
    assert isinstance(data.responses.tokens, np.memmap)


def test_two_runs_give_the_same_hash_and_other_data_another(write_lines, tmp_path):
    source = Jsonl(write_lines(rows(60)))
    config = DataConfig(path=str(tmp_path / "A"), source=source, vocab_size=300)
    first = prepare(config, quiet=True)
    second = prepare(replace(config, path=str(tmp_path / "B")), quiet=True)
    other = prepare(replace(config, path=str(tmp_path / "C"), seed=1), quiet=True)
    assert first.hash == second.hash != other.hash


class Dicts(Jsonl):
    """A source of one's own that yields what a reader of JSON gives."""

    def records(self):
        yield {"user_id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}


class Careless(Dicts):
    """A source of one's own that meets a row it did not think of."""

    def records(self):
        yield record(0)
        yield record(1, responses=({}["left"], "b"))


def test_what_a_source_of_ones_own_raises_names_its_line(write_lines, tmp_path):
    config = DataConfig(path=str(tmp_path / "D"), source=Careless(write_lines(rows(3))))
    place = r"Careless\.records\(\) raised KeyError \('left'\) at .*test_prepare\.py:\d+, after 1 records"
    with pytest.raises(UserError, match=place):
        prepare(config, quiet=True)


def test_mistakes_of_a_source_of_ones_own_are_told(write_lines, tmp_path):
    config = DataConfig(path=str(tmp_path / "D"), source=Dicts(write_lines(rows(3))))
    with pytest.raises(UserError, match=r"Dicts.records\(\) yields dict; a source yields .*Record"):
        prepare(config, quiet=True)
    with pytest.raises(UserError, match=r"data.vocab_size is -1; it must be at least 1"):
        replace(config, vocab_size=-1)


def test_half_a_character_in_a_user_id_is_told(bpe, tmp_path):
    with pytest.raises(UserError, match=r"user id 'a\\ud800': .* half of a surrogate pair"):
        build_tables([record(1), record(2, user_id="a\ud800")], tmp_path / "D", TextEncoder(bpe))


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.randoms(use_true_random=False), st.integers(0, 3))
def test_order_of_records_does_not_move_a_prompt_or_user(bpe, tmp_path_factory, rng, seed):
    options = SplitOptions(dev_fraction=0.2, test_fraction=0.2, unseen_user_fraction=0.3, seed=seed)
    records = [record(i // 2, user_id=f"u{i % 9}") for i in range(80)]

    def assigned(items: list[Record]) -> dict:
        folder = tmp_path_factory.mktemp("order") / "D"
        data = build_tables(items, folder, TextEncoder(bpe), options)
        return {
            (item.prompt, item.user_id): int(row["split"])
            for item, row in zip(items, data.comparisons, strict=True)
        }

    shuffled = rng.sample(records, len(records))
    assert assigned(records) == assigned(shuffled)


def test_all_comparisons_of_a_prompt_fall_together_and_users_are_held_out_whole(bpe, tmp_path):
    options = SplitOptions(dev_fraction=0.2, test_fraction=0.3, unseen_user_fraction=0.3)
    records = [record(i // 4, user_id=f"u{i % 20}") for i in range(400)]
    data = build_tables(records, tmp_path / "D", TextEncoder(bpe), options)
    table = data.comparisons
    base = table["split"] % 3
    prompt = data.response_prompt[table["a"]]
    assert all(len(set(base[prompt == p].tolist())) == 1 for p in range(len(data.prompts)))
    assert ((table["split"] >= 3) == ~data.user_seen[table["user"]]).all()
    assert 0 < data.info["counts"]["unseen_users"] < 20
    assert sum(data.info["counts"]["splits"].values()) == 400
    assert sum(len(data.rows(name)) for name in SPLITS) == 400


def test_ordinal_field_and_seen(bpe, tmp_path):
    options = SplitOptions(split="ordinal", dev_fraction=0.2, test_fraction=0.1)
    data = build_tables([record(i) for i in range(10)], tmp_path / "o", TextEncoder(bpe), options)
    assert data.comparisons["split"].tolist() == [0] * 7 + [1] * 2 + [2]
    records = [
        record(0, split="test", seen=False, user_id="new"),
        record(1, split="dev", user_id="old", seen=True),
        record(2, split="train", user_id="new", seen=True),
    ]
    options = SplitOptions(split="field", unseen_user_fraction=1.0)
    data = build_tables(records, tmp_path / "f", TextEncoder(bpe), options)
    assert data.comparisons["split"].tolist() == [5, 1, 3]
    assert dict(zip(data.users, data.user_seen.tolist(), strict=True)) == {
        "new": False,
        "old": True,
    }
    with pytest.raises(UserError, match=r"split is None; under data\.split: field"):
        build_tables([record(0)], tmp_path / "g", TextEncoder(bpe), options)
    clash = [record(0, split="test"), record(0, split="dev")]
    with pytest.raises(UserError, match=r"record 2 .*in split 'dev' here and in 'test' before"):
        build_tables(clash, tmp_path / "g", TextEncoder(bpe), options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "o"]


def test_dropped_rows_are_counted(bpe, bert, tmp_path):
    good = [record(i) for i in range(3000)]
    bad = [
        record(9001, responses=("same", "same")),
        record(9002, responses=("long " * 300, "short")),
        record(9003, responses=("fine", "but\n\n### Response:\nagain")),
        record(9004, prompt="Who wrote\n\n### Response:\nthis?"),
    ]
    encoder = TextEncoder(bpe, max_length=64)
    source = SimpleNamespace(dropped={"tie": 3}, bad_rows=BadRows())
    data = build_tables(good + bad, tmp_path / "D", encoder, source=source)
    assert data.info["dropped"] == {
        "tie": 3,
        "identical": 1,
        "too_long": 1,
        "marker_in_response": 1,
        "marker_in_prompt": 1,
    }
    assert data.info["counts"]["comparisons"] == 3000
    assert data.info["tokens"]["marker_kept"] == pytest.approx(1 - 3 / 6007)
    cased = [record(1), record(2, responses=("Use Salt", "use salt"))]
    data = build_tables(cased, tmp_path / "B", TextEncoder(bert, separator=" [SEP] "))
    assert data.info["dropped"] == {"identical": 1}


def test_truncation_is_counted_not_applied(bpe, tmp_path):
    records = [record(0, prompt="word " * 100), record(1)]
    data = build_tables(records, tmp_path / "D", TextEncoder(bpe, max_length=40))
    assert data.info["truncated_prompts"] == 2
    assert data.prompts.lengths.max() > 100


def test_marker_that_too_few_keep_is_refused(bpe, tmp_path):
    records = [record(i, responses=(f"yes {i}", f"A\nB {i}")) for i in range(50)]
    with pytest.raises(UserError, match=r"data.separator '\\n' .*only 50 of 100 .*choose a sep"):
        build_tables(records, tmp_path / "D", TextEncoder(bpe, separator="\n"))
    assert not list(tmp_path.iterdir())
    kept = build_tables(
        records, tmp_path / "D", TextEncoder(bpe, separator="\n"), check_marker=False
    )
    assert len(kept.comparisons) == 50 and not kept.info["dropped"]


def test_separator_without_a_token_gives_no_marker(bert, tmp_path):
    data = build_tables(
        [record(i) for i in range(5)], tmp_path / "D", TextEncoder(bert, separator="\n")
    )
    assert data.info["tokens"]["marker_ids"] is None and len(data.comparisons) == 5


def test_marker_is_the_part_that_no_prompt_changes(tmp_path):
    from tokenizers import Regex, pre_tokenizers

    from pal_ds.data.tokenise import train_tokenizer

    # Like the tokenizers of Llama 3 and Qwen: punctuation takes the newlines after it.
    tokenizer = train_tokenizer(["What?\n\n### Response:\nyes"] * 9 + ["is it\n\n### b"] * 9, 400)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^\s\w]+[\r\n]*|\w+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    records = [record(i, prompt=f"Why {i}" + ("?" if i % 2 else "")) for i in range(40)]
    data = build_tables(records, tmp_path / "D", TextEncoder(tokenizer))
    assert len(data.comparisons) == 40
    assert tokenizer.decode(data.info["tokens"]["marker_ids"]).endswith("### Response:\n")


def test_chat_messages_through_the_template(chatml, tmp_path):
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "More"},
    ]
    records = [record(i) for i in range(10)] + [record(11, prompt=chat)]
    data = build_tables(records, tmp_path / "D", TextEncoder(chatml))
    tokens = data.info["tokens"]
    assert len(data.comparisons) == 11 and tokens["chat_template"] and tokens["separator"] is None
    for row in range(len(data.responses)):
        prompt = data.prompts[data.response_prompt[row]].tolist()
        whole = prompt + data.responses[row].tolist()
        found = find_prompt_length(whole, tokens["marker_ids"], tokens["user_marker_ids"])
        assert found == len(prompt)


def test_samples_are_of_the_held_out_splits(bpe, tmp_path):
    options = SplitOptions(dev_fraction=0.05, test_fraction=0.05)
    data = build_tables([record(i) for i in range(300)], tmp_path / "D", TextEncoder(bpe), options)
    samples = [json.loads(x) for x in (tmp_path / "D/samples.jsonl").read_text().splitlines()]
    held_out = np.concatenate([data.rows("dev"), data.rows("test")])
    texts = {f"What is {row}?" for row in held_out}
    assert samples and {sample["prompt"] for sample in samples} <= texts
    assert len(samples) == min(64, 2 * len(held_out))
    for sample in samples:
        ids = bpe(sample["text"])["input_ids"]
        assert find_prompt_length(ids, data.info["tokens"]["marker_ids"]) == sample["prompt_tokens"]


def test_vector_records(tmp_path):
    rng = random.Random(0)
    vectors = [tuple(rng.random() for _ in range(3)) for _ in range(9)]
    records = [
        Record(
            f"u{i}", 1, response_features=(vectors[i], vectors[i + 1]), probability=0.75, group="g"
        )
        for i in range(8)
    ]
    data = build_tables([*records, records[0]], tmp_path / "D", None)
    assert data.prompt_vectors is None and data.prompts is None
    assert data.info["vector_size"] == 3 and data.info["counts"]["prompts"] == 8
    a = data.response_vectors[data.comparisons["a"]]
    assert np.allclose(a, [vectors[i] for i in (*range(8), 0)])
    assert data.info["bayes_accuracy"] == {"train": 0.75}
    assert data.groups == ["g"] and data.user_group == ["g"] * 8
    prompts = [replace(item, prompt_features=vectors[8]) for item in records]
    data = build_tables(prompts, tmp_path / "P", None)
    assert data.prompt_vectors.shape == (1, 3) and len(data.prompt_hashes()) == 1
    with pytest.raises(UserError, match=r"record 2 .*: some records have prompt_features and"):
        build_tables([prompts[0], records[1]], tmp_path / "X", None)
    with pytest.raises(UserError, match="holds text, but there is no tokenizer"):
        build_tables([record(0)], tmp_path / "X", None)
    assert not (tmp_path / "X").exists()


def test_reuse_and_refusal_to_overwrite(write_lines, tmp_path):
    path = write_lines(rows(30))
    config = DataConfig(path=str(tmp_path / "D"), source=Jsonl(path), vocab_size=300)
    first = prepare(config, quiet=True)
    assert prepare(config, quiet=True).hash == first.hash
    assert prepare(DataConfig(path=str(tmp_path / "D")), quiet=True).hash == first.hash
    with pytest.raises(
        UserError, match=r"other settings \(data.max_length: 1024 then, 99 now\); name another"
    ):
        prepare(replace(config, max_length=99), quiet=True)
    write_lines(rows(31))
    with pytest.raises(UserError, match=r"data\.source\.data\.files"):
        prepare(config, quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(UserError, match=r"holds no dataset.json; it is not ours"):
        prepare(replace(config, path=str(tmp_path / "other")), quiet=True)
    (tmp_path / "empty").mkdir()
    assert len(prepare(replace(config, path=str(tmp_path / "empty")), quiet=True).comparisons) == 31


def test_a_tokenizer_is_trained_on_the_records_of_train_where_records_say_their_split(
    write_lines, tmp_path
):
    """All answers are to one prompt, which a hash would put into the test split as a whole."""
    lines = [
        {"prompt": "q", "chosen": f"{word} {i}", "rejected": f"no {word}", "split": split}
        for i in range(30)
        for word, split in (("zebra", "train"), ("quagga", "test"))
    ]
    source = Jsonl(write_lines(lines))
    config = DataConfig(path=str(tmp_path / "D"), source=source, vocab_size=600, split="record")
    prepare(replace(config, dev_fraction=0.0, test_fraction=1.0), quiet=True)
    vocabulary = (tmp_path / "D/tokenizer/tokenizer.json").read_text()
    assert "zebra" in vocabulary and "quagga" not in vocabulary


def test_nothing_half_written_stays(write_lines, tmp_path):
    path = write_lines([*rows(5), {"prompt": "x", "chosen": "y"}])
    with pytest.raises(UserError, match=r"data.jsonl:6: missing key 'rejected'"):
        prepare(DataConfig(path=str(tmp_path / "D"), source=Jsonl(path)), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_reader_names_what_is_missing(bpe, tmp_path):
    with pytest.raises(UserError, match=r"dataset.json: no such file.*run `prepare` first"):
        PreparedData.open(tmp_path / "none")
    build_tables([record(0)], tmp_path / "D", TextEncoder(bpe))
    with pytest.raises(UserError, match="no split is called 'val'"):
        PreparedData.open(tmp_path / "D").rows("val")
    (tmp_path / "D/response_tokens.npy").unlink()
    with pytest.raises(UserError, match=r"response_tokens.npy: missing, though"):
        PreparedData.open(tmp_path / "D")
    info = json.loads((tmp_path / "D/dataset.json").read_text())
    (tmp_path / "D/dataset.json").write_text(json.dumps({**info, "format_version": 9}))
    with pytest.raises(UserError, match="format_version is 9, this program reads 3"):
        PreparedData.open(tmp_path / "D")


def test_everything_dropped_and_empty_sources(bpe, tmp_path):
    with pytest.raises(UserError, match=r"every comparison was dropped \(identical 1\)"):
        build_tables([record(0, responses=("a", "a"))], tmp_path / "D", TextEncoder(bpe))
    with pytest.raises(UserError, match="yields no record"):
        build_tables([], tmp_path / "D", TextEncoder(bpe))
    with pytest.raises(UserError, match="a response is empty"):
        build_tables([record(0, responses=("a", " "))], tmp_path / "D", TextEncoder(bpe))


def test_config_parses_with_short_class_names(write_lines, tmp_path):
    import jsonargparse

    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DataConfig, "data")
    args = ["--data.path", str(tmp_path / "D"), "--data.source", "Jsonl"]
    parsed = parser.parse_args([*args, "--data.source.path", write_lines(rows(9))])
    config = parser.instantiate(parsed).data
    config = config if isinstance(config, DataConfig) else DataConfig(**vars(config))
    assert len(prepare(config, quiet=True).comparisons) == 9


def test_summary_is_printed(write_lines, tmp_path, capsys):
    config = DataConfig(path=str(tmp_path / "D"), source=Jsonl(write_lines(rows(9))))
    prepare(config)
    assert "seen users" in capsys.readouterr().out
    prepare(config)
    assert "reusing" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "data.jsonl").unlink()
    prepare(config)
    assert "not compared with the raw data" in capsys.readouterr().err.replace("\n", " ")


def test_prepared_data_opens_without_torch_or_transformers(write_lines, tmp_path):
    import subprocess
    import sys

    path = str(tmp_path / "D")
    prepare(DataConfig(path=path, source=Jsonl(write_lines(rows(9)))), quiet=True)
    code = (
        "import sys; from pal_ds.data.prepare import DataConfig, prepare; "
        f"prepare(DataConfig(path={path!r})); print({{'torch', 'transformers'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_controversial_pairs_are_marked_in_the_table(bpe, tmp_path):
    marks = (True, None, False)
    records = [record(i, controversial=mark) for i, mark in enumerate(marks)]
    data = build_tables(records, tmp_path / "D", TextEncoder(bpe))
    assert data.comparisons["controversial"].tolist() == [1, -1, 0]
