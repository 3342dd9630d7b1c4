"""`score`: keys of lines that look as if they mattered, inputs that are no file, and numbers that are not finite."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pal_ds.cli.main import main
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.errors import UserError
from pal_ds.export import ExportOptions, export_users
from pal_ds.export.audience import choose_audience
from pal_ds.heads import PalA
from pal_ds.inference.text_rows import read_rows
from pal_ds.io.text_files import byte_lines
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.export.test_score import pairs, score, whose

PAIR = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({**PAIR, "group": "g"}, "in.jsonl:2: names a group, and this model reads the user_id"),
        ({"messages": []}, "the messages before the answer as 'prompt', and the answer, the last"),
        ({"prompt": "a", "responses": ["b"]}, "one answer, as 'response'. Write a line for each"),
        ({**PAIR, "system": "c"}, "a system message is the first message of 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "For 'chosen' and 'rejected', a line"),
    ],
)
def test_keys_are_read_or_refused(line, words, runs: Path, capsys, tmp_path) -> None:
    where = ["--run_dir", runs / "llama_pal_a_full"]
    code, scored, error = score(capsys, tmp_path, [pairs()[0], line], *where)
    assert code == 2 and scored == [] and words in error


def test_a_group_beside_a_user_is_told(runs: Path, capsys, tmp_path, caplog) -> None:
    lines = [{**whose("u1"), "group": "g"}, whose("u1")]
    where = ["--run_dir", runs / "llama_pal_a_full"]
    _, scored, _ = score(capsys, tmp_path, lines, *where)
    assert scored[0]["score"] == pytest.approx(scored[1]["score"], abs=1e-6)
    assert "in.jsonl:1 and 0 other lines name a group, which changes nothing" in caplog.text


def test_one_reward_for_everyone_is_told(runs: Path, capsys, tmp_path, caplog) -> None:
    where = ["--run_dir", runs / "gpt2_bt_full"]
    lines = [whose("u0"), {**pairs()[0], "group": "g"}, pairs()[0]]
    code, scored, _ = score(capsys, tmp_path, lines, *where)
    assert code == 0 and len(scored) == 3
    assert "in.jsonl:1 and 1 other lines name a user_id, which changes nothing" in caplog.text
    caplog.clear()
    score(capsys, tmp_path, pairs(), *where)
    assert "changes nothing" not in caplog.text


def test_a_folder_is_named_as_one(tmp_path, capsys) -> None:
    for given, words in (
        (tmp_path, "is a folder; name the file in it"),
        (tmp_path / "none", "no such file (looked from"),
    ):
        with pytest.raises(SystemExit):
            main(["score", "--run_dir", str(tmp_path), "--input", str(given)])
        assert f"--input {given}: {words}" in capsys.readouterr().err


READ = "import sys; from pathlib import Path; from pal_ds.inference.text_rows import read_rows\n"


@pytest.mark.parametrize("compress", [False, True])
def test_standard_input_and_pipes_are_read(compress: bool, tmp_path) -> None:
    import gzip

    text = f"{json.dumps(PAIR)}\n{json.dumps({**PAIR, 'group': 'g'})}\n".encode()
    content = gzip.compress(text) if compress else text
    code = READ + "print([(row.where, row.group) for row in read_rows(Path(sys.argv[1]))])"
    for given in ("-", "/dev/stdin"):
        words = [sys.executable, "-c", code, given]
        done = subprocess.run(words, input=content, capture_output=True, check=True)
        assert done.stdout.decode().split("\n")[0] == (
            "[('/dev/stdin:1', None), ('/dev/stdin:2', 'g')]"
        )


def test_a_file_of_few_bytes_is_read_from_its_beginning(tmp_path) -> None:
    for content in (b"", b"a", b"ab\ncd", b"x" * 100_000):
        (tmp_path / "few").write_bytes(content)
        assert b"".join(byte_lines(tmp_path / "few")) == content


def test_folders_of_users_are_named(runs: Path, tmp_path, capsys) -> None:
    out = tmp_path / "per_user"
    run = RunDirectory(runs / "llama_pal_b_full")
    export_users(run, out, ["u0", "u1"], ExportOptions(quiet=True))
    for where, words in (
        (out, f"it holds 3 exported models: _shared, u0, u1. Name one of them: --model {out}/u1"),
        (run.path, "no export.json here; it is a run: give it as --run_dir"),
        (tmp_path / "none", "no such folder"),
    ):
        code, _, error = score(capsys, tmp_path, pairs(), "--model", where)
        assert code == 2 and f"--model {where}: " in error and words in error
    assert score(capsys, tmp_path, pairs(), "--model", out / "u1")[0] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_table_of_users_with_numbers_that_are_not_finite(
    value: float, runs: Path, tmp_path, capsys
) -> None:
    table = UserTable(3, ["mia", "tom"])
    table.logits[1, 2] = value
    table.save(tmp_path / "users")
    with pytest.raises(UserError, match="logits of user 'tom' are no finite numbers"):
        UserTable.load(tmp_path / "users")
    run = runs / "llama_pal_a_full"
    users = ["--users", tmp_path / "users"]
    code, _, error = score(capsys, tmp_path, pairs(), "--run_dir", run, *users, "--user", "mia")
    assert code == 2 and "logits of user 'tom'" in error
    with pytest.raises(SystemExit) as stop:
        main(["consolidate", str(run), str(tmp_path / "out"), *map(str, users)])
    assert stop.value.code == 2 and "logits of user 'tom'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama_pal_a_full", "gpt2_bt_full", "llama_pal_b_lora"])
def test_a_model_with_numbers_that_are_not_finite(
    name: str, runs: Path, tmp_path, capsys, monkeypatch
) -> None:
    tensor = ShardedCheckpoint.tensor

    def damaged(self, wanted: str, *args):
        return tensor(self, wanted, *args) * (torch.nan if wanted.startswith("head.") else 1)

    monkeypatch.setattr(ShardedCheckpoint, "tensor", damaged)
    code, scored, error = score(capsys, tmp_path, pairs(), "--run_dir", runs / name)
    assert code == 2 and scored == [] and "its score is nan, no finite number" in error
    for dtype in ("fp32", "bf16"):
        with pytest.raises(SystemExit) as stop:
            main(["consolidate", str(runs / name), str(tmp_path / "out"), f"--dtype={dtype}"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "holds values that are not finite" in error
    assert not (tmp_path / "out").exists()


def test_an_audience_that_is_not_finite_is_no_traceback() -> None:
    table = UserTable(3, ["mia", "tom"])
    table.logits[:] = torch.nan
    named: list[dict[str, Any]] = [{"user": "mia"}, {}]
    for whom in named:
        with pytest.raises(UserError, match="holds numbers that are not finite"):
            choose_audience(PalA(8, num_prototypes=3), table, **whom)


def test_a_score_that_is_replaced_is_told(runs: Path, capsys, tmp_path, caplog) -> None:
    where = ["--run_dir", runs / "gpt2_bt_full"]
    (plain, _) = score(capsys, tmp_path, [pairs()[0], pairs()[1]], *where)[1]
    assert "have a 'score' already" not in caplog.text
    _, scored, _ = score(capsys, tmp_path, [{**pairs()[0], "score": 9.5}, pairs()[1]], *where)
    assert scored[0] == plain
    assert "in.jsonl:1 and 0 other lines have a 'score' already" in caplog.text


def test_a_record_in_memory_may_have_a_score(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({**PAIR, "score": 1}))
    assert len(read_rows(tmp_path / "in.jsonl")) == 1
