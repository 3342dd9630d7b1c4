"""`score`: texts in, scores out, from a run or an exported folder; every mistake named."""

import json
from pathlib import Path
from typing import Any

import pytest

from pal_ds.cli.main import main
from tests.export.cases import MIXTURE, texts_of_rows

ROWS = texts_of_rows()[:4]


def score(capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: list[Any], *options: object):
    """(exit code, scored lines, error text) of one `score` command."""
    source, code = tmp_path / "in.jsonl", 0
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    source.write_text("".join(f"{text}\n" for text in texts))
    try:
        main(["score", "--input", str(source), *map(str, options)])
    except SystemExit as stop:
        code = int(str(stop.code))
    caught = capsys.readouterr()
    scored = [json.loads(line) for line in caught.out.splitlines() if line.startswith("{")]
    return code, scored, caught.err


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "response": text, "id": i} for i, (prompt, (text, _)) in enumerate(ROWS)
    ]


@pytest.mark.parametrize(
    "name", ["llama_pal_a_full", "llama_pal_b_lora", "bert_pal_b_frozen", "gpt2_bt_full"]
)
def test_run_and_export_agree(name: str, runs: Path, exported: dict, capsys, tmp_path) -> None:
    mixture = [] if "_bt_" in name else ["--mixture", ",".join(map(str, MIXTURE))]
    separator = " [SEP] " if name.startswith("bert") else "\n\n### Response:\n"
    texts = [{"text": f"{prompt}{separator}{text}"} for prompt, (text, _) in ROWS]
    found = []
    for where in (["--run_dir", runs / name], ["--model", exported[name][0]]):
        code, scored, error = score(capsys, tmp_path, [*pairs(), *texts], *where, *mixture)
        assert code == 0, error
        assert [row["id"] for row in scored[:4]] == [0, 1, 2, 3]
        found.append([row["score"] for row in scored])
        assert found[-1][:4] == pytest.approx(found[-1][4:], abs=1e-5)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len(set(found[0][:4])) == 4


def test_users_score_differently(runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full", "--batch_texts", 3]
    scores = {
        tuple(row["score"] for row in score(capsys, tmp_path, pairs(), *where, *extra)[1])
        for extra in (["--user", "u0"], ["--user", "u1"], [])
    }
    assert len(scores) == 3


def test_output_file_is_whole_or_absent(runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_b_full", "--output", tmp_path / "out.jsonl"]
    assert score(capsys, tmp_path, pairs(), *where)[0] == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    (tmp_path / "out.jsonl").unlink()
    code, _, error = score(capsys, tmp_path, [*pairs(), {"text": "no marker"}], *where)
    assert code == 2 and "no response marker" in error and "in.jsonl:5" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_input_is_not_written_over(capsys, tmp_path) -> None:
    where = ["--run_dir", tmp_path / "none", "--output", tmp_path / "in.jsonl"]
    code, _, error = score(capsys, tmp_path, pairs(), *where)
    assert code == 2 and "is the --input" in error
    assert len((tmp_path / "in.jsonl").read_text().splitlines()) == 4


def test_messages_are_texts_too(runs: Path, capsys, tmp_path) -> None:
    prompt, (text, _) = ROWS[0]
    plain = {"prompt": prompt, "response": text}
    message = {**plain, "response": [{"role": "assistant", "content": text}]}
    _, scored, _ = score(capsys, tmp_path, [plain, message], "--run_dir", runs / "llama_pal_a_full")
    assert scored[0]["score"] == pytest.approx(scored[1]["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "in.jsonl:2: not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({"prompt": "a"}, "in.jsonl:2: has no 'response'"),
        ({"prompt": "a", "response": " "}, "'response' must be"),
        ({"text": ""}, "'text' must be"),
        ({"prompt": [{"role": "user"}], "response": "b"}, "message 0"),
    ],
)
def test_bad_lines_are_named(line, words, runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full"]
    code, scored, error = score(capsys, tmp_path, [pairs()[0], line], *where)
    assert code == 2 and scored == [] and words in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--run_dir", "RUN", "--user", "nobody"], "unknown user 'nobody'"),
        (["--run_dir", "RUN", "--mixture", "0.5,0.6,0.1"], "sums to 1.2"),
        (["--run_dir", "RUN", "--mixture", "a"], "separated by commas"),
        (["--run_dir", "RUN", "--model", "OUT"], "exactly one of"),
        (["--run_dir", "OUT"], "no config.yaml"),
        (["--model", "RUN"], "export.json"),
        (["--model", "OUT", "--user", "u1"], "knows no user ids"),
        (["--model", "OUT", "--mixture", "1"], "1 entries"),
        (["--run_dir", "RUN", "--batch_texts", "0"], "at least 1"),
    ],
)
def test_bad_options_are_named(
    options, words, runs: Path, exported: dict, capsys, tmp_path
) -> None:
    paths = {"RUN": runs / "llama_pal_a_full", "OUT": exported["llama_pal_a_full"][0]}
    given = [paths.get(option, option) for option in options]
    code, _, error = score(capsys, tmp_path, pairs(), *given)
    assert code == 2 and words in error and "Traceback" not in error


def test_missing_and_empty_input(runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full"]
    assert "is empty" in score(capsys, tmp_path, [], *where)[2]
    with pytest.raises(SystemExit):
        main(["score", "--input", str(tmp_path / "none"), *map(str, where)])
    assert "no such file" in capsys.readouterr().err
