"""Real text end to end: chat messages, a scored dialogue file, truncation and planted persona groups."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from pal_ds.cli.main import main
from pal_ds.data.build import build_tables
from pal_ds.data.collator import Collator
from pal_ds.data.records import Record
from pal_ds.data.sources import Dsp, Persona
from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import TextEncoder
from tests.spawn import ROOT, run_command
from tests.tiny import LLAMA, TOPICS

PERSONA_RECIPE = ROOT / "pal_ds" / "recipes" / "persona_groups.yaml"


def train_two_updates(recipe: Path, run: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl that hold a loss."""
    run_command("train", f"--config={recipe}", f"--run_dir={run}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def write_recipe(path: Path, data: dict) -> Path:
    recipe = {
        "data": data,
        "backbone": {"architecture": LLAMA},
        "head": {"class_path": "PalB", "init_args": {"num_prototypes": 2}},
        "train": {
            "ds_config": "tests/ds/zero0.json",
            "batch_pairs": 16,
            "micro_batch_pairs": 8,
            "stop_after": 2,
            "log_every": 1,
        },
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def conversation(index: int, answer: str) -> list[dict[str, str]]:
    """Two turns; the last answer is what is judged."""
    topic = TOPICS[index % len(TOPICS)]
    turns = [f"Hello {index}", "Hi, what about?", f"Tell me about {topic}.", answer]
    roles = ["user", "assistant"] * 2
    return [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]


def test_chat_messages_from_parquet_to_scores(tmp_path, chatml, monkeypatch, capsys):
    """Mapped columns, an implicit prompt, the tokenizer's template: prepare, train, score."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "annotator": f"u{i % 3}",
            "better": conversation(i, f"It is good, {i}."),
            "worse": conversation(i, f"No idea {i}"),
            "note": "not ours",
        }
        for i in range(60)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "talk.parquet")
    chatml.save_pretrained(tmp_path / "tokenizer")
    columns = {"user_id": "annotator", "chosen": "better", "rejected": "worse"}
    source = {"path": str(tmp_path / "talk.parquet"), "columns": columns}
    data = {
        "path": str(tmp_path / "data"),
        "source": {"class_path": "HuggingFace", "init_args": source},
        "tokenizer": str(tmp_path / "tokenizer"),
        "max_length": 200,
        "dev_fraction": 0.1,
        "test_fraction": 0.0,
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    main(["prepare", f"--config={recipe}"])
    tables = PreparedData.open(tmp_path / "data")
    assert tables.info["counts"]["comparisons"] == 60
    assert tables.info["counts"]["users"] == 3
    assert tables.info["counts"]["prompts"] == 60
    assert not tables.info["dropped"]
    assert tables.info["tokens"]["chat_template"]
    first = tables.comparisons[0]
    text = chatml.apply_chat_template(rows[0]["better"], tokenize=False)
    prompt = tables.prompts[tables.response_prompt[first["a"]]]
    got = chatml.decode([*prompt, *tables.responses[first["a"]]])
    assert got.rstrip("</s>\n") == text.rstrip("</s>\n")

    assert [row["step"] for row in train_two_updates(recipe, tmp_path / "run")] == [1, 2]
    texts = tmp_path / "texts.jsonl"
    talk = rows[0]["better"]
    texts.write_text(json.dumps({"prompt": talk[:-1], "response": talk[-1:]}) + "\n")
    capsys.readouterr()
    main(["score", f"--run_dir={tmp_path / 'run'}", f"--input={texts}", "--user=u1"])
    assert np.isfinite(json.loads(capsys.readouterr().out)["score"])


def test_scored_dialogues_are_truncated_and_trained_on(shared_data, tmp_path):
    """helpful.test.json at 128 tokens: batches equal an independent tokenisation of the raw file."""
    raw = shared_data / "dsp/helpful.test.json"
    data = {
        "path": str(tmp_path / "data"),
        "source": {"class_path": "TextScore", "init_args": {"path": str(raw)}},
        "vocab_size": 1000,
        "max_length": 128,
        "dev_fraction": 0.0,
        "test_fraction": 0.1,
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    assert len(train_two_updates(recipe, tmp_path / "run")) == 2
    tables = PreparedData.open(tmp_path / "data")
    assert tables.info["dropped"]["empty_response"] == 4
    assert tables.info["dropped"]["prompt_differs"] == 9
    expected, too_long = sequences_of(raw, tables.tokenizer_path, 128)
    assert tables.info["dropped"]["too_long"] == too_long
    assert len(tables.comparisons) == len(expected) == 2339 - too_long
    assert sum(whole > 128 for pair in expected for _, whole in pair) > 1000

    rows = np.arange(len(tables.comparisons))
    collator = Collator(tables, pad_token_id=tables.info["tokens"]["pad_token_id"])
    for begin in range(0, len(rows), 256):
        some = rows[begin : begin + 256]
        batch = collator(some, np.arange(len(some)))
        lengths = batch.attention_mask.sum(1)
        for row, index in zip(some, batch.response_index, strict=True):
            got = [batch.input_ids[i, : lengths[i]].tolist() for i in index]
            assert got == [ids for ids, _ in expected[row]]


def sequences_of(raw: Path, tokenizer_path: Path, max_length: int) -> tuple[list, int]:
    """Per kept pair ((ids, length before truncation), ..) from the raw JSON, and the number of pairs too long."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    kept, too_long = [], 0
    for entry in json.loads(raw.read_text()):
        (first, second), scores = entry["text"], entry["score"]
        halves = [text.rsplit("\n\nAssistant:", 1) for text in (first, second)]
        prompts, answers = zip(*[(a.strip(), b.strip()) for a, b in halves], strict=True)
        if scores[0] == scores[1] or len(set(prompts)) > 1 or not all(answers):
            continue
        pair, fits = [], True
        for answer in answers:
            head = f"{prompts[0]}\n\n### Response:\n"
            whole = [*tokenizer(head + answer)["input_ids"], tokenizer.eos_token_id]
            num_answer = len(whole) - len(tokenizer(head)["input_ids"])
            fits = fits and num_answer <= max_length
            # The prompt loses its beginning; what is left always ends in the whole answer.
            pair.append((whole[-max_length:], len(whole)))
        if fits:
            kept.append(pair)
        else:
            too_long += 1
    return kept, too_long


@pytest.mark.parametrize("kind", ["bpe", "llama_like", "bert", "chatml"])
def test_truncation_keeps_prefix_and_answer(kind, request, tmp_path):
    """Whatever the tokenizer: special tokens in front stay, the prompt is cut from the left, answers never."""
    tokenizer = request.getfixturevalue(kind)
    long = " ".join(f"bread {i} and salt" for i in range(60))
    answers = [
        ("Use warm water.", "No idea."),
        ("It depends on the flour.", "salt " * 12),
        ("Short.", "salt " * 48),
    ]
    records = [Record("u", -1, f"{long} {i}?", pair) for i, pair in enumerate(answers)]
    separator = " [SEP] " if kind == "bert" else "\n\n### Response:\n"
    encoder = TextEncoder(tokenizer, max_length=48, separator=separator)
    tables = build_tables(records, tmp_path / "D", encoder, check_marker=False)
    assert tables.info["dropped"] == {"too_long": 1}
    assert len(tables.comparisons) == 2
    assert tables.info["truncated_prompts"] == len(tables.responses)
    batch = Collator(tables)(np.arange(len(tables.comparisons)), np.zeros(1, np.int64))
    prefix = tables.info["tokens"]["prefix_ids"]
    for record, row in zip(records[:2], batch.response_index, strict=True):
        for answer, index in zip(record.responses, row, strict=True):
            whole = encoder.render(record.prompt, answer).text
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            got = batch.input_ids[index][batch.attention_mask[index].bool()].tolist()
            assert len(got) == 48
            assert got[: len(prefix)] == prefix
            end = tables.info["tokens"]["end_ids"]
            # ChatML writes a line feed behind the end of a turn, which is no part of it.
            for variant in tables.info["tokens"].get("end_variants", []):
                ids = [*ids[: -len(variant)], *end] if ids[-len(variant) :] == variant else ids
            body = ids if ids[-len(end) :] == end else [*ids, *end]
            assert got[len(prefix) :] == body[len(prefix) - 48 :]
            assert squeezed(answer) in squeezed(tokenizer.decode(got))


def squeezed(text: str) -> str:
    """Small letters without blank space or its byte-level sign: what every tokenizer here keeps."""
    return "".join(text.lower().replace("ġ", "").split())


def test_dsp_drops_are_those_of_the_raw_file(shared_data):
    """The counts of test_public_sources, derived once more from the JSON alone."""
    raw = shared_data / "dsp/domain_specific_preference.json"
    empty = identical = total = 0
    for entry in json.loads(raw.read_text()):
        texts = list(entry["responses"].values())
        for i, own in enumerate(texts):
            for other in texts[:i] + texts[i + 1 :]:
                total += 1
                if not own.strip() or not other.strip():
                    empty += 1
                elif own == other:
                    identical += 1
    assert (total, empty, identical) == (10_000, 8, 164)
    assert sum(1 for _ in Dsp(str(raw)).records()) == total - empty


def test_planted_groups_are_a_coin_toss_for_one_taste(shared_data):
    """The recipe's groups answer each question two and two, so a homogeneous model is right half of the time."""
    init = yaml.safe_load(PERSONA_RECIPE.read_text())["data"]["source"]["init_args"]
    init |= {
        "paths": str(shared_data / "persona"),
        "users_per_group": 1,
        "statements_per_user": None,
    }
    records = list(Persona(**init).records())
    assert len(records) == 4 * 4000
    views = defaultdict(list)
    for record in records:
        views[record.user_id].append(record.label)
    labels = np.array([views[user] for user in sorted(views)])
    assert labels.shape == (4, 4000)
    assert len({record.prompt for record in records}) == 3996
    assert (labels.sum(0) == 0).all()
    # Any two groups differ on half of the behaviours or on all of them.
    shares = [(labels[i] != labels[j]).mean() for i in range(4) for j in range(i)]
    assert sorted(shares) == [0.5] * 4 + [1.0] * 2
