"""`score`: texts in, scores out, from a run or an exported folder; every mistake named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pal_ds.cli.main import main
from pal_ds.inference.score_texts import Scorer
from pal_ds.inference.text_rows import Row
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
    scored = [json.loads(line) for line in caught.out.split("\n") if line.startswith("{")]
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
        ({"prompt": "a", "response": [{"role": "user", "content": "b"}]}, "not the assistant's"),
        (
            {"prompt": "a", "response": [{"role": "assistant", "content": " "}]},
            "'response' is empty",
        ),
        ({"prompt": "a", "response": "b", "text": "c"}, "holds both 'text' and 'prompt'"),
        ({"prompt": "a", "response": "b", "userId": "u0"}, "it is 'user_id' that is. Rename it"),
        (
            {"prompt": "a", "response": "b", "system": "c"},
            "message is the first message of 'prompt'",
        ),
        ({"prompt": "a", "response": "b", "Group": "g"}, "it is 'group' that is. Rename it"),
        ({"prompt": "a", "response": "b", "group_id": 3}, "it is 'group' that is. Rename it"),
        ({"prompt": "a", "response": "b", "mixture": [1]}, "it is --mixture of the command, or"),
        ({"prompt": "a", "response": "b", "Response ": "c"}, "it is 'response' that is. Rename"),
        ({"prompt": "a", "response": "b", "user_id": 0.5}, "'user_id' is 0.5; give a text that"),
        (
            {"prompt": "a", "response": "b", "user_id": " "},
            "'user_id' is ' '; give a text that is not",
        ),
        (
            {"prompt": "a", "response": "b", "user_id": "nobody"},
            "in.jsonl:2: unknown user 'nobody'",
        ),
        ({"prompt": "a", "response": "b", "tools": "["}, "in.jsonl:2: 'tools': not valid JSON"),
        ('{"prompt": "a", "response": "b", "x": NaN}', "'x' holds nan, which no JSON number is"),
        ('{"prompt": "a", "response": "b", "x": 1' + "0" * 400 + "." + "5}", "'x' holds inf"),
        (
            '{"prompt": "a", "response": "b", "x": ' + "1" * 5000 + "}",
            "a number that cannot be read",
        ),
        ('{"prompt": "a", "response": "b\\ud83d"}', "half of a surrogate pair"),
        ('{"prompt": "a", "response": "b", "x": ' + "[" * 5000 + "]" * 5000 + "}", "deeper than"),
        ('{"prompt": "a", "response": "b", "user_id": "u0", "user_id": "u1"}', "stands twice"),
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


def whose(user_id: object, number: int = 0) -> dict[str, Any]:
    return {**pairs()[number], "user_id": user_id}


def test_each_line_is_scored_for_its_user(runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full"]
    alone = {}
    for name, extra in (("u0", ["--user", "u0"]), ("u1", ["--user", "u1"]), (None, [])):
        alone[name] = [r["score"] for r in score(capsys, tmp_path, pairs(), *where, *extra)[1]]
    lines = [whose("u0"), whose("u1"), pairs()[0], whose(None, 1), whose("u1", 1), whose("u0", 2)]
    code, scored, error = score(capsys, tmp_path, lines, *where)
    assert code == 0, error
    wanted = [alone["u0"][0], alone["u1"][0], alone[None][0], alone[None][1], alone["u1"][1]]
    wanted.append(alone["u0"][2])
    # The same forward in batches of other sizes: sums of fp32 in another order.
    assert [row["score"] for row in scored] == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 4) for value in wanted[:3]}) == 3
    assert [row.get("user_id") for row in scored] == ["u0", "u1", None, None, "u1", "u0"]


def test_one_user_for_all_lines_is_told(runs: Path, capsys, tmp_path, caplog) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full", "--user", "u0"]
    one = score(capsys, tmp_path, pairs()[:1], *where)[1][0]["score"]
    other = score(capsys, tmp_path, [whose("u1")], *where)[1][0]["score"]
    assert one == pytest.approx(other, abs=1e-6)
    assert (
        "in.jsonl:1 and other lines name a user_id, and all are scored for the one" in caplog.text
    )


class Compared(dict):
    """A record that notes how often it is compared with another."""

    times = 0

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]


def test_lines_of_many_users_are_not_compared_with_each_other() -> None:
    rows = [
        Row("in.jsonl", Compared(n=n), "a text", None, None, user_id=f"u{n}") for n in range(100)
    ]
    scorer: Any = Scorer(None, None, points_of=lambda names: [[1.0]] * len(names), is_for_one=True)  # type: ignore[arg-type]
    assert scorer.points(rows) == [None] * 100 and Compared.times == 0


def test_users_of_an_export(runs: Path, exported: dict, capsys, tmp_path) -> None:
    from pal_ds.export import ExportOptions, export
    from pal_ds.runs.run_dir import RunDirectory

    lines = [whose("u0"), whose("u1")]
    code, scored, error = score(capsys, tmp_path, lines, "--model", exported["llama_pal_a_full"][0])
    assert code == 2 and not scored and "in.jsonl:1: the line names a user_id" in error
    run = runs / "llama_pal_a_full"
    folder = tmp_path / "with_users"
    export(RunDirectory(run), folder, ExportOptions(with_users=True, quiet=True))
    of_run, of_export = (
        [row["score"] for row in score(capsys, tmp_path, lines, *where)[1]]
        for where in (["--run_dir", run], ["--model", folder])
    )
    assert of_run == pytest.approx(of_export, abs=1e-5) and of_run[0] != of_run[1]
    code, _, error = score(capsys, tmp_path, [lines[0], whose("nobody")], "--model", folder)
    assert code == 2 and "in.jsonl:2: user_id 'nobody' is none of the users" in error


def test_a_model_for_everyone_scores_lines_of_anybody(runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "gpt2_bt_full"]
    _, scored, _ = score(capsys, tmp_path, [whose("u0"), whose("stranger")], *where)
    assert scored[0]["score"] == pytest.approx(scored[1]["score"], abs=1e-6)


def test_what_does_not_fit_is_told(runs: Path, capsys, tmp_path, caplog) -> None:
    """A response is never cut, as in `prepare`; a prompt may be, and whole texts are, with a word."""
    long = "tea " * 3000
    lines = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": long},
        {"prompt": "b", "response": long + "."},
        {"prompt": long, "response": "yes"},
        {"text": long},
    ]
    code, scored, error = score(capsys, tmp_path, lines, "--run_dir", runs / "llama_pal_a_full")
    assert code == 0, error
    scores = [row["score"] for row in scored]
    assert scores[1:3] == [None, None] and all(scores[i] is not None for i in (0, 3, 4))
    for words in ("2 responses longer than", "1 prompts were cut", "1 texts were cut"):
        assert words in caplog.text


def test_a_score_that_is_no_number_is_never_written(runs: Path, capsys, tmp_path, monkeypatch):
    from pal_ds.remote_code.modeling_pal import PalForSequenceClassification

    monkeypatch.setattr(
        PalForSequenceClassification,
        "_reward",
        lambda _, features, __: torch.full((len(features.response_index), 1), torch.nan),
    )
    code, scored, error = score(capsys, tmp_path, pairs(), "--run_dir", runs / "llama_pal_a_full")
    assert code == 2 and scored == [] and "in.jsonl:1: its score is nan, no finite number" in error


@pytest.mark.parametrize("break_", ["\u2028", "\u0085", "\x0b"])
def test_it_reads_what_it_writes(runs: Path, capsys, tmp_path, break_: str) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full"]
    line = {"prompt": "a", "response": f"b{break_}c"}
    (first,) = score(capsys, tmp_path, [f"\ufeff{json.dumps(line)}"], *where)[1]
    (again,) = score(capsys, tmp_path, [json.dumps(first, ensure_ascii=False)], *where)[1]
    assert again == first and first["response"] == line["response"]
