"""Exported folders score raw text as the trainer did, in a process without pal_ds and DeepSpeed.

Heads x tunings x decoder and encoder x one user, a mixture, the population; batched and single,
left and right padding, special tokens on and off, pad == eos.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.errors import UserError
from pal_ds.export import ExportOptions, export
from pal_ds.export.tokenizer import write_canonical_tokenizer
from pal_ds.heads.base import UserState
from pal_ds.inference.load_run import restore
from pal_ds.reward_models import load_pal_rm_a, load_pal_rm_b, load_reward_model
from pal_ds.runs.run_dir import RunDirectory
from tests.export.cases import CASES, MIXTURE, Case, audience_of, texts_of_rows
from tools import consolidate

BOUND = 1e-5
NUM_ROWS = 7
SHORT = slice(2, 12)
"""The first and seventh prompts are cut to fit, which a stock class cannot do."""
READER = Path(__file__).with_name("reader.py")
EVERY_WAY = [
    {"side": side, "special": special, **size}
    for side in ("right", "left")
    for special in (True, False)
    for size in ({}, {"batch": 1}, {"batch": 5})
]
BY_NAME = {case.name: case for case in CASES}


def trainer_rewards(run: RunDirectory, audience: dict[str, Any]) -> np.ndarray:
    """[rows, 2] rewards of the first rows of pairs.jsonl, by tables, collator and model."""
    restored = restore(run)
    head, users = restored.model.head, restored.users
    assert restored.data.info["dropped"] == {}, "row i must be line i of the file"
    batch = restored.parts.collator(np.arange(NUM_ROWS), np.arange(NUM_ROWS))
    if "logits" not in head.needs:
        user = UserState()
    elif "user" in audience:
        user = UserState(users.logits[users.rows([audience["user"]])].expand(NUM_ROWS, -1))
    else:
        mixture = torch.tensor(audience.get("mixture", users.mixtures().mean(0).tolist()))
        user = UserState(None, None, mixture.expand(NUM_ROWS, -1))
    with torch.no_grad():
        return restored.model(batch, user).reward[:, :, 0].double().numpy()


def raw_texts(case: Case) -> list[str]:
    """Both full texts of the first rows: prompt, separator, response."""
    separator = " [SEP] " if case.backbone == "bert" else "\n\n### Response:\n"
    rows = texts_of_rows()[:NUM_ROWS]
    return [f"{prompt}{separator}{text}" for prompt, texts in rows for text in texts]


def read_as_stranger(
    jobs: list[dict[str, Any]], folder: Path, python: str = sys.executable
) -> list[dict[str, Any]]:
    """What `reader.py` got, in a process without pal_ds."""
    jobs_file, results_file, home = folder / "jobs.json", folder / "results.json", folder / "home"
    home.mkdir()
    jobs_file.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-I", str(READER), str(jobs_file), str(results_file)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results_file.read_text())


@pytest.fixture(scope="session")
def strangers(runs: Path, exported: dict) -> dict[tuple[str, str], dict[str, Any]]:
    """What a process with transformers alone got; one process reads all folders."""
    jobs, keys = [], []

    def add(case: Case, kind: str, **changes: Any) -> None:
        job = {"folder": str(exported[case.name][0]), "texts": raw_texts(case)}
        jobs.append({**job, "trust": True, "mixture": None, "ways": EVERY_WAY, **changes})
        keys.append((case.name, kind))

    for case in CASES:
        add(case, "own")
        if case.is_stock:
            # A model that counts positions from the row's start cannot read left padding.
            right = [way for way in EVERY_WAY if way["side"] == "right"]
            ways = right if case.backbone == "gpt2" else EVERY_WAY
            texts = raw_texts(case)[SHORT]
            add(case, "stock", trust=False, ways=ways, texts=texts, pipeline=True)
        elif case.head != "bt":
            add(case, "other", mixture=[0.0, 1.0, 0.0], ways=EVERY_WAY[:1])
    return dict(zip(keys, read_as_stranger(jobs, runs), strict=True))


def assert_close(result: dict[str, Any], expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    # `pipeline` gives rewards, not what a sigmoid makes of them.
    for scores in [*result["scores"], *filter(None, [result.get("pipeline")])]:
        assert np.abs(np.array(scores) - expected.ravel()).max() <= BOUND * scale


@pytest.mark.parametrize("name", BY_NAME)
def test_strangers_score_is_the_trainers(name: str, runs: Path, strangers: dict) -> None:
    case = BY_NAME[name]
    expected = trainer_rewards(RunDirectory(runs / name), audience_of(case))
    assert expected.std() > 1e-4, "texts must differ for the comparison to mean something"
    assert_close(strangers[name, "own"], expected)
    if case.is_stock:
        stock = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
        assert strangers[name, "stock"]["class"] == stock[case.backbone]
        assert_close(strangers[name, "stock"], expected.ravel()[SHORT])
    elif case.head != "bt":
        other = trainer_rewards(RunDirectory(runs / name), {"mixture": [0.0, 1.0, 0.0]})
        assert_close(strangers[name, "other"], other)


@pytest.mark.parametrize("name", BY_NAME)
def test_folder_is_complete(name: str, exported: dict) -> None:
    folder, facts = exported[name]
    assert facts["max_difference"] <= BOUND * max(1.0, facts["scale"])
    assert facts.get("tokenizer_exact", True) == (not name.startswith("mistral"))
    assert ("alone does not score" in (folder / "README.md").read_text()) == ("mistral" in name)
    hashes = json.loads((folder / "export.json").read_text())["sha256"]
    present = {p.name for p in folder.iterdir()} - {"export.json"}
    assert set(hashes) == present and "README.md" in present
    assert (folder / "model.safetensors.index.json").is_file()
    suffixes = {p.suffix for p in folder.iterdir()}
    assert suffixes == {".py", ".json", ".safetensors", ".md"}
    text = "".join(p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".md"))
    assert '"u1"' not in text and "users.jsonl" not in present


def test_users_travel_only_when_asked(runs: Path, tmp_path: Path) -> None:
    run = RunDirectory(runs / "llama_pal_a_full")
    export(run, tmp_path / "out", ExportOptions(with_users=True, quiet=True))
    lines = (tmp_path / "out" / "users.jsonl").read_text().splitlines()
    users = {row["user_id"]: row["mixture"] for row in map(json.loads, lines)}
    assert set(users) == {"u0", "u1", "u2"}
    assert sum(users["u0"]) == pytest.approx(1, abs=1e-5)


def test_bf16_export_says_its_difference(runs: Path, tmp_path: Path) -> None:
    run = RunDirectory(runs / "llama_pal_a_full")
    facts = export(run, tmp_path / "out", ExportOptions(dtype="bf16", quiet=True))
    assert 0 < facts["max_difference"] < 0.1
    assert load_reward_model(tmp_path / "out").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user": "nobody"}, "unknown user 'nobody'"),
        ({"mixture": [0.5, 0.5]}, "2 entries"),
        ({"mixture": [0.5, 0.4, 0.2]}, "sums to 1.1"),
        ({"mixture": [1.5, -0.5, 0.0]}, "below 0"),
        ({"user": "u1", "mixture": MIXTURE}, "one of them"),
        ({"step": "99"}, "--step 99"),
        ({"data_path": Path("/nowhere")}, "no such folder"),
        ({"max_shard_size": "many"}, "--max_shard_size"),
    ],
)
def test_bad_requests_leave_nothing(
    runs: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    run = RunDirectory(runs / "llama_pal_a_full")
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out", ExportOptions(**options, quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(RunDirectory(runs / "llama_pal_a_full"), tmp_path, ExportOptions(quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_user_of_a_head_without_users_is_refused(runs: Path, tmp_path: Path) -> None:
    run = RunDirectory(runs / "llama_bt_full")
    with pytest.raises(UserError, match="one reward for everyone"):
        export(run, tmp_path / "out", ExportOptions(user="u1", quiet=True))


def test_consolidate_command(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Path(__file__).parents[2] / "tools" / "consolidate.py"
    given = [str(runs / "llama_pal_a_full"), str(tmp_path / "out")]
    wrong = ["--mixture", "0.5,0.6,0"]
    command = [sys.executable, str(tool), *given, *wrong]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "sums to 1.1" in done.stderr and "Traceback" not in done.stderr
    for extra, words in (
        (wrong, "sums to 1.1"),
        (["--mixture", "a,b"], "separated by commas"),
        (["--user", "u1", "--population"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as end:
            consolidate.main([*given, *extra])
        said = capsys.readouterr().err
        assert end.value.code == 2 and words in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama_pal_a_lora", "bert_pal_b_full", "gpt2_bt_full"])
def test_loading_in_python(name: str, runs: Path, exported: dict) -> None:
    """A run and its export give the same module."""
    case = BY_NAME[name]
    run, folder = runs / name, exported[name][0]
    mixture = None if case.head == "bt" else MIXTURE
    ids = torch.tensor([[5, 9, 11, 7, 8, 12], [6, 9, 4, 10, 13, 7]])
    extra = {"prompt_lengths": [3, 2]} if case.head == "pal_b" else {}
    mask = torch.ones_like(ids)
    scores = [load_reward_model(p, mixture)(ids, mask, **extra).logits for p in (run, folder)]
    assert torch.allclose(*scores, atol=1e-5)


def test_names_of_pal_refuse_another_kind(runs: Path, exported: dict) -> None:
    assert load_pal_rm_a(exported["llama_pal_a_full"][0], MIXTURE).config.mixture == MIXTURE
    assert load_pal_rm_b(runs / "llama_pal_b_full").config.mixture is not None
    for load, name in ((load_pal_rm_a, "llama_pal_b_full"), (load_pal_rm_b, "llama_bt_full")):
        for path in (runs / name, exported[name][0]):
            with pytest.raises(UserError, match="holds a"):
                load(path)
    with pytest.raises(UserError, match="neither a run"):
        load_reward_model(runs)


def test_canonical_tokenizer_keeps_each_special_once(runs: Path, tmp_path: Path) -> None:
    from pal_ds.data.tokenise import Rendered, TextEncoder, load_tokenizer

    for backbone in ("llama", "gpt2"):
        source, folder = runs / f"data_{backbone}" / "tokenizer", tmp_path / backbone
        folder.mkdir()
        encoder = TextEncoder(load_tokenizer(str(source)))
        tokens = encoder.describe(None, None)
        pad = write_canonical_tokenizer(source, folder, tokens, tokens["vocab_size"])
        assert pad not in tokens["end_ids"]
        tokenizer = load_tokenizer(str(folder))
        for text in ("tea!!", "\n tea \n", "<s>tea", "tea</s>", "a<|end|>b<s>c", "ü 漢 \t"):
            item = encoder.encode([Rendered(text, 0, 0)])[0]
            for special in (True, False):
                ids = tokenizer(text, add_special_tokens=special)["input_ids"]
                assert ids == [*item.prompt_ids, *item.response_ids], text
