"""hf, dsp, text_score and persona: small made-up files, then exact counts on the published ones."""

import json
from collections import Counter

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import SOURCES, Dsp, HuggingFace, Persona, TextScore
from pal_ds.errors import UserError


def prepared(source, tmp_path, **options):
    options = {"vocab_size": 400, "max_length": 8192, **options}
    config = DataConfig(path=str(tmp_path / "DATA"), source=source, **options)
    return prepare(config, quiet=True)


def test_registry_names():
    assert {"jsonl", "hf", "dsp", "text_score", "persona"} <= set(SOURCES)


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_hf_local_files_with_columns(tmp_path, kind):
    import datasets

    table = datasets.Dataset.from_dict(
        {"instruction": ["q", "r"], "chosen": ["a", "b"], "worse": ["c", "d"], "other": [1, 2]}
    )
    path = str(tmp_path / f"pairs.{kind}")
    getattr(table, f"to_{kind}")(path)
    source = HuggingFace(path, columns={"prompt": "instruction", "rejected": "worse"})
    records = list(source.records())
    assert [record.prompt for record in records] == ["q", "r"]
    assert records[1].responses == ("b", "d") and source.num_records() == 2
    assert source.describe()["rows"] == 2 and source.describe()["files"][0]["path"] == path


def test_hf_message_lists_share_an_implicit_prompt(tmp_path, chatml):
    import datasets

    def talk(answer):
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": talk(f"good {i}"), "rejected": talk(f"bad {i}")} for i in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    chatml.save_pretrained(tmp_path / "tokenizer")
    source = HuggingFace("parquet", data_files=str(tmp_path / "chat.parquet"))
    data = prepared(source, tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert len(data.comparisons) == 5 and len(data.prompts) == 1
    text = chatml.decode(data.prompts[0])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_hf_messages_for_people(tmp_path):
    import datasets

    path = str(tmp_path / "x.csv")
    datasets.Dataset.from_dict({"better": ["a"], "worse": [None]}).to_csv(path)
    with pytest.raises(UserError, match=r"columns: unknown key 'choosen' \(did you mean 'chosen'"):
        HuggingFace(path, columns={"choosen": "better"})
    with pytest.raises(UserError, match=r"no column 'bettr' .*did you mean 'better'"):
        list(HuggingFace(path, columns={"chosen": "bettr"}).records())
    with pytest.raises(UserError, match="none of its columns"):
        list(HuggingFace(path).records())
    with pytest.raises(UserError, match=r"x\.csv:2: missing key 'rejected'"):
        list(HuggingFace(path, columns={"chosen": "better", "rejected": "worse"}).records())
    with pytest.raises(UserError, match="no such file"):
        list(HuggingFace(str(tmp_path / "y.csv")).records())
    with pytest.raises(UserError, match="datasets cannot open split 'train'"):
        list(HuggingFace("parquet", data_files=str(tmp_path / "none.parquet")).records())


def test_dsp_every_pair_is_judged_both_ways(tmp_path):
    path = tmp_path / "dsp.json"
    writers = {name: f"{name} answers" for name in ("a", "b", "c")}
    path.write_text(json.dumps([{"query": "q", "responses": {**writers, "empty": " "}}]))
    source = Dsp(str(path))
    records = list(source.records())
    assert len(records) == 6 and source.dropped == {"empty_response": 6}
    for record in records:
        preferred = record.responses[0 if record.label == -1 else 1]
        assert preferred == f"{record.user_id} answers"
    assert list(source.records()) == records and source.dropped == {"empty_response": 6}
    chosen = list(Dsp(str(path), users=["b", "c"]).records())
    assert chosen == [record for record in records if record.user_id in ("b", "c")]
    with pytest.raises(UserError, match="entry 0: has no response of 'd'"):
        list(Dsp(str(path), users=["a", "d"]).records())
    path.write_text(json.dumps([{"query": "q", "responses": []}]))
    with pytest.raises(UserError, match="entry 0: 'responses' is missing or is no object"):
        list(source.records())
    path.write_text("[\n{]")
    with pytest.raises(UserError, match=r"dsp.json:2: not valid JSON"):
        list(source.records())


def test_text_score_pairs_ties_and_cuts(write_lines):
    def text(response, prompt="hi"):
        return f"\n\nHuman: {prompt}\n\nAssistant: a\n\nHuman: more\n\nAssistant: {response}"

    rows = [
        {"text": [text("x"), text("y"), text("z")], "score": [1, 2, 1]},
        {"text": [text("x"), text("y", "ho"), "no marker"], "score": [1, 2, 3]},
        {"text": [text("x"), text(" ")], "score": [1, 2]},
    ]
    source = TextScore(write_lines(rows), user_id="w")
    first, second = source.records()
    assert first.prompt == "Human: hi\n\nAssistant: a\n\nHuman: more"
    assert (first.responses, first.label, first.user_id) == (("x", "y"), 1, "w")
    assert (second.responses, second.label) == (("y", "z"), -1)
    assert source.dropped == {
        "tie": 1,
        "prompt_differs": 1,
        "no_response_marker": 2,
        "empty_response": 1,
    }
    whole = TextScore(write_lines(rows[:1]), response_marker=None)
    assert next(whole.records()).prompt is None


def test_texts_without_the_marker_are_told(write_lines):
    """All 656 pairs of a file were once dropped, and the message was "no record"."""
    rows = [{"text": [f"q{i} AI: a", f"q{i} AI: b"], "score": [1, 2]} for i in range(3)]
    with pytest.raises(UserError, match=r"none of 3 pairs has the response_marker .* or null"):
        list(TextScore(write_lines(rows)).records())
    assert len(list(TextScore(write_lines(rows), response_marker=" AI:").records())) == 3


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": ["a"], "score": [1]}, "1 texts and 1 scores"),
        ({"text": ["a", "b"], "score": [1]}, "2 texts and 1 scores"),
        ({"text": "a", "score": [1]}, "is missing or is no list"),
        ({"text": ["a", 1], "score": [1, 2]}, "that is no text"),
        ('{"text": ["a", "b"], "score": [1, NaN]}', "that is no number"),
    ],
)
def test_text_score_messages(write_lines, row, text):
    with pytest.raises(UserError, match=rf"data.jsonl:1: .*{text}"):
        list(TextScore(write_lines([row])).records())


@pytest.fixture
def persona_folder(write_lines, tmp_path):
    for name, matching in (("calm", " Yes"), ("bold", " No")):
        rows = [
            {
                "question": f"{name} {i}?",
                "label_confidence": 0.5 + i / 20,
                "answer_matching_behavior": matching,
            }
            for i in range(10)
        ]
        write_lines(rows, f"{name}.jsonl")
    return str(tmp_path)


def test_persona_users_answer_as_they_are(persona_folder):
    users = {"ann": {"holds": ["calm"], "rejects": ["bold"]}, "bob": {"rejects": ["calm"]}}
    records = list(Persona(persona_folder, users=users).records())
    assert Counter(record.user_id for record in records) == {"ann": 20, "bob": 10}
    assert all(record.responses == ("Yes", "No") for record in records)
    assert {r.label for r in records if r.user_id == "ann"} == {-1}
    assert {r.label for r in records if r.user_id == "bob"} == {1}


def test_persona_groups_draws_and_confidence(persona_folder):
    groups = {"g": {"holds": ["calm"]}, "h": {"rejects": ["calm"], "holds": ["bold"]}}
    source = Persona(
        persona_folder,
        groups=groups,
        users_per_group=3,
        statements_per_user=4,
        min_confidence=0.6,
    )
    records = list(source.records())
    counts = Counter((record.user_id, record.group) for record in records)
    assert counts == {(f"{g}-{i}", g): 4 for g in "gh" for i in range(3)}
    assert source.dropped == {"low_confidence": 4}
    assert list(source.records()) == records
    drawn = {user: {r.prompt for r in records if r.user_id == user} for user in ("g-0", "g-1")}
    assert drawn["g-0"] != drawn["g-1"]


def test_persona_messages(persona_folder):
    for options, text in (
        ({}, "neither users nor groups is given"),
        ({"users": {"a": {"holds": ["x"], "rejects": ["x"]}}}, "both holds and rejects 'x'"),
        ({"users": {"a": {"hold": ["x"]}}}, "the key 'hold' .*did you mean 'holds'"),
        ({"users": {"a": {}}}, "neither holds nor rejects anything"),
        ({"users": {"a": {"holds": ["clam"]}}}, "behaviour 'clam' .*did you mean 'calm'"),
    ):
        with pytest.raises(UserError, match=text):
            list(Persona(persona_folder, **options).records())


def test_dsp_exact_counts(shared_data, tmp_path):
    source = Dsp(str(shared_data / "dsp/domain_specific_preference.json"))
    data = prepared(source, tmp_path, split="ordinal", dev_fraction=0.2, test_fraction=0.0)
    # 500 x 5 x 4 = 10,000; one answer is empty, 24 queries have answers in common.
    assert data.info["dropped"] == {"empty_response": 8, "identical": 164}
    counts = data.info["counts"]
    assert counts["comparisons"] == 9828 and counts["users"] == 5
    assert (counts["splits"]["train"], counts["splits"]["dev"]) == (7878, 1950)
    assert (counts["prompts"], counts["responses"]) == (497, 2449)
    assert data.info["licence"].startswith("CC BY-NC")
    assert abs(float((data.comparisons["label"] == 1).mean()) - 0.5) < 0.02


def test_text_score_exact_counts(shared_data, tmp_path):
    data = prepared(TextScore(str(shared_data / "dsp/helpful.test.json")), tmp_path)
    # 2,352 pairs without ties; in nine the conversations part before the last answer.
    assert data.info["dropped"] == {"empty_response": 4, "prompt_differs": 9}
    assert data.info["counts"]["comparisons"] == 2339
    assert data.info["tokens"]["marker_kept"] == 1.0
    assert data.users == ["population"]


def test_persona_exact_counts(shared_data, tmp_path):
    folder = shared_data / "persona"
    behaviours = sorted(path.stem for path in folder.glob("*.jsonl"))
    assert len(behaviours) == 26
    everything = Persona(str(folder), users={"all": {"holds": behaviours}})
    records = list(everything.records())
    assert len(records) == 26000 and len({record.prompt for record in records}) == 25878
    users = {
        "a": {"holds": ["openness"], "rejects": ["risk-seeking"]},
        "b": {"holds": ["risk-seeking"], "rejects": ["openness"]},
    }
    data = prepared(Persona(str(folder), users=users), tmp_path)
    assert data.info["counts"]["comparisons"] == 4000 and not data.info["dropped"]
    assert data.info["counts"]["prompts"] == 2000
