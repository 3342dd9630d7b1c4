"""Damaged files, each in a way of its own: a kind of file has one boundary, whose message names file and remedy."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors.torch import save_file

from pal_ds.cli.main import main
from pal_ds.config.recipe import load_recipe
from pal_ds.data.sources import Jsonl
from pal_ds.errors import UserError
from pal_ds.export import contents
from pal_ds.export.contents import read_facts, verify_export
from pal_ds.io.boundary import reading
from pal_ds.reward_models import load_reward_model
from pal_ds.runs.lock import only_writer
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users.files import StoredUsers
from tests.artefacts.test_read import HERE

KEPT = HERE / "kept"
USERS = KEPT / "runs" / "pal_a" / "checkpoints" / "step_00000009"
NESTED, LONG = "[" * 5000 + "]" * 5000, "1" * 5000
BAD_JSON = ["", "[]", "null", NESTED, f'{{"step": {LONG}}}', '{"step": "x"}', "\xff", "{}"]


def test_any_error_becomes_one_message(tmp_path: Path) -> None:
    class PanicException(BaseException):
        pass

    for error in (KeyError("tokens"), RecursionError("too deep"), PanicException("no value")):
        with (
            pytest.raises(UserError, match=r"a\.json: cannot be read \(.*\): no list.*Mend it\."),
            reading("a.json", "list", "Mend it."),
        ):
            raise error
    for passed in (KeyboardInterrupt(), SystemExit(3), UserError("as it is")):
        with pytest.raises(type(passed)), reading("a.json", "list", "Mend it."):
            raise passed


@pytest.mark.parametrize("content", BAD_JSON)
@pytest.mark.parametrize("name", ["status.json", "best.json", "latest.json", "init/origin.json"])
def test_small_files_of_a_run(tmp_path: Path, name: str, content: str) -> None:
    run = RunDirectory(tmp_path)
    run.init.mkdir()
    (tmp_path / name).write_text(content, encoding="latin-1")
    readers: dict[str, Callable[[], object]] = {
        "status.json": run.status,
        "best.json": lambda: run.pointer("best"),
        "latest.json": lambda: run.pointer("latest"),
        "init/origin.json": run.origin_facts,
    }
    with pytest.raises(UserError, match=name):
        readers[name]()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "a: [",
        NESTED,
        "? [a]\n: b",
        "loss: 0",
        "train: 3",
        "data: {path: [1]}",
        "optim: {learning_rate: 1" + "0" * 400 + "}",
        "train: {seed: " + "9" * 5000 + "}",
        "\xff",
    ],
)
def test_a_runs_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_recipe(tmp_path / "config.yaml")


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(contents.MARKS_VARIABLE, str(tmp_path / "marks"))
    return Path(shutil.copytree(KEPT / "exported" / "pal_a", tmp_path / "pal_a"))


@pytest.mark.parametrize("content", BAD_JSON)
def test_the_listing_of_an_export(export: Path, content: str) -> None:
    (export / "export.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"export\.json: "):
        read_facts(export)


def test_a_listing_of_format_1_without_tokens(export: Path) -> None:
    facts = json.loads((export / "export.json").read_text())
    del facts["tokens"]
    (export / "export.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"export\.json: cannot be read \(it has no 'tokens'\)"):
        read_facts(export)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [*BAD_JSON[:5], "\xff", '{"auto_map": 3}'])
def test_configs_of_an_export(export: Path, name: str, content: str) -> None:
    """Listed with their hash, as whoever damages them may do."""
    (export / name).write_text(content, encoding="latin-1")
    facts = json.loads((export / "export.json").read_text())
    facts["sha256"][name] = contents.sha256_of(export / name)
    (export / "export.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=str(export)):
        load_reward_model(export)


@pytest.mark.parametrize("variable", ["HOME", contents.MARKS_VARIABLE])
def test_marks_without_a_home(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A user whom the system does not know has none (a container's); an empty variable is as good as none."""
    monkeypatch.chdir(tmp_path)
    for name in (contents.MARKS_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable == "HOME":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv(contents.MARKS_VARIABLE, "")
    verify_export(export)
    assert not (tmp_path / "exports").exists()
    assert (tmp_path / "home" / ".cache" / "pal_ds").is_dir() == (variable != "HOME")


def broken_users(folder: Path, kind: str) -> None:
    ids = pa.array(["u0", "u1"], pa.string())
    schema = pa.schema([("id", pa.string()), ("row", pa.int64()), ("seen", pa.bool_())])
    if kind == "a null":
        ids = pa.array(["u0", None], pa.string())
    if kind == "half a character":
        ids = pa.array([b"u0", b"\xc3"], pa.binary()).view(pa.string())
    columns = [ids, pa.array([0, 1]), pa.array([True, False])]
    if kind == "numbers":
        schema = pa.schema([("id", pa.int64()), ("row", pa.int64()), ("seen", pa.bool_())])
        columns[0] = pa.array([1, 2])
    if kind == "no column":
        schema, columns = pa.schema([("id", pa.string())]), columns[:1]
    with pa.ipc.new_file(str(folder / "users.arrow"), schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


@pytest.mark.parametrize("kind", ["a null", "half a character", "numbers", "no column"])
def test_users_that_are_none(tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(USERS, tmp_path / "users"))
    broken_users(folder, kind)
    with pytest.raises(UserError, match=r"users: cannot be read"):
        StoredUsers(folder)
    shutil.copy(USERS / "users.arrow", folder)
    save_file({}, folder / "users.safetensors", {"format": "pal_ds.users/1", "seed": "x"})
    with pytest.raises(UserError, match=r"users: cannot be read"):
        StoredUsers(folder)


def test_numbers_that_are_too_large(tmp_path: Path) -> None:
    big = "1" + "0" * 400
    texts = {
        "scores": f'{{"prompt": "p", "responses": ["a", "b"], "scores": [{big}, 1]}}',
        "margin": f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {big}}}',
        "y": f'{{"prompt": "p", "response_1": "a", "response_2": "b", "y": {big}}}',
        "response_features": f'{{"response_features": [[{big}], [1]], "y": 1}}',
        "probability": f'{{"prompt": "p", "chosen": "a", "rejected": "b", "probability": {big}}}',
    }
    for key, text in texts.items():
        (tmp_path / "a.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match=rf"a\.jsonl:1: '{key}"):
            list(Jsonl(str(tmp_path / "a.jsonl")).records())


def test_a_run_directory_of_odd_files(tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "is a link to": lambda run: run.symlink_to(tmp_path / "gone"),
        "lock: is a folder": lambda run: (run / "lock").mkdir(parents=True),
        "checkpoints: is a file": lambda run: (run.mkdir(), (run / "checkpoints").touch()),
        "is a file": lambda run: run.touch(),
    }
    for number, (words, make) in enumerate(cases.items()):
        run = tmp_path / f"run{number}"
        make(run)
        before = sorted(tmp_path.rglob("*"))
        with (
            pytest.raises(UserError, match=f"run{number}.*{words}"),
            only_writer(RunDirectory(run)),
        ):
            pass
        assert sorted(tmp_path.rglob("*")) == before


def test_a_flag_in_a_recipe_of_python(tmp_path: Path) -> None:
    """It would be no one's word: the call's own argument is."""
    from pal_ds import prepare

    keys = {"data": {"path": str(tmp_path / "D"), "source": None}, "trust_code": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    for recipe in (tmp_path / "recipe.yaml", keys):
        with pytest.raises(
            UserError, match=r"trust_code: stands in a recipe.*trust_code=True in P"
        ):
            prepare(recipe)


def test_a_command_says_it_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(KEPT / "runs" / "pal_a", tmp_path / "run"))
    (run / "config.yaml").write_text(NESTED)
    for command in (["users", f"--run_dir={run}", "--list"], ["evaluate", f"--run_dir={run}"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--trust_checkpoint"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and f"{run / 'config.yaml'}" in said, said
        assert "Traceback" not in said and os.linesep * 2 not in said
