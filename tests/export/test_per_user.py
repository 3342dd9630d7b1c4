"""A folder per user on one set of weights: every score is the trainer's, and no user costs disk."""

import json
import shutil
from pathlib import Path

import pytest

from pal_ds.errors import UserError
from pal_ds.export import ExportOptions, export_users, read_user_list
from pal_ds.export.per_user import folder_name
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.export.cases import CASES
from tests.export.test_folder import assert_close, raw_texts, read_as_stranger, trainer_rewards
from tools import consolidate

NAME = "llama_pal_b_full"
CASE = next(case for case in CASES if case.name == NAME)
NEW_USER = "Zoë / new"


@pytest.fixture(scope="module")
def adapted(runs: Path) -> Path:
    """A table as `adapt` leaves it, with one user whom the run does not know."""
    table = UserTable(3, [NEW_USER])
    table.save(runs / "adapted")
    return runs / "adapted"


def bytes_of_its_own(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir() if not path.is_symlink())


def test_every_user_scores_as_in_training_from_shared_weights(
    runs: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, out = tmp_path / "ids.txt", tmp_path / "out"
    listed.write_text(f"u0\nu1\r\n\n{NEW_USER}\n", encoding="utf-8")
    run = RunDirectory(runs / NAME)
    both = ["--users", str(listed), "--users", str(adapted)]
    consolidate.main([str(run.path), str(out), *both])
    assert "3 users, a folder each" in capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "models"
    moved.parent.mkdir()
    shutil.copytree(out, moved, symlinks=True)  # as cp -r, rsync -a and tar do
    shutil.rmtree(out)

    folders = json.loads((moved / "users.json").read_text(encoding="utf-8"))
    assert list(folders) == ["u0", "u1", NEW_USER] and folders["u0"] == "u0"
    assert sorted(p.name for p in moved.iterdir()) == sorted(
        [*folders.values(), "_shared", "users.json"]
    )
    way = [{"side": "right", "special": True}, {"side": "left", "special": False, "batch": 3}]
    job = {"texts": raw_texts(CASE), "trust": True, "mixture": None, "ways": way}
    names = [*folders.values(), "_shared"]
    results = read_as_stranger([{**job, "folder": str(moved / name)} for name in names], tmp_path)
    new = UserTable.load(adapted).mixtures()[0].tolist()
    audiences = [{"user": "u0"}, {"user": "u1"}, {"mixture": new}, {}]
    for audience, result in zip(audiences, results, strict=True):
        assert_close(result, trainer_rewards(run, audience))
    assert results[0]["scores"] != results[1]["scores"] != results[2]["scores"]

    weights = sum(path.stat().st_size for path in (moved / "_shared").glob("*.safetensors"))
    for name in folders.values():
        assert bytes_of_its_own(moved / name) < 10_000 < weights
        facts = json.loads((moved / name / "export.json").read_text())
        shared = json.loads((moved / "_shared" / "export.json").read_text())
        assert facts["sha256"]["model.safetensors"] == shared["sha256"]["model.safetensors"]
        assert facts["sha256"]["config.json"] != shared["sha256"]["config.json"]
        assert facts["audience"] == "one user"
        assert "measured for the population" in (moved / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "ids", "options", "words"),
    [
        (NAME, ["u0", "who", "else"], {}, "unknown user"),
        (NAME, ["u0"], {"user": "u1"}, "leave out --user"),
        (NAME, ["u0"], {"with_users": True}, "leave out --user"),
        ("llama_bt_full", ["u0"], {}, "one reward for everyone"),
    ],
)
def test_bad_requests_leave_nothing(
    runs: Path, tmp_path: Path, name: str, ids: list[str], options: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        options = ExportOptions(**options, quiet=True)
        export_users(RunDirectory(runs / name), tmp_path / "out", ids, options)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pal_ds.export.per_user.card.write_card", _fail_at_second())
    with pytest.raises(OSError, match="gone"):
        options = ExportOptions(quiet=True)
        export_users(RunDirectory(runs / NAME), tmp_path / "out", ["u0"], options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_adapt_and_a_list_name_users(
    runs: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, the folder is the list; beside --user it is where that user is looked up."""
    run = str(runs / NAME)
    consolidate.main([run, str(tmp_path / "all"), "--users", str(adapted)])
    consolidate.main([run, str(tmp_path / "two"), "--users", "u0, u2"])
    consolidate.main([run, str(tmp_path / "one"), "--users", str(adapted), "--user", NEW_USER])
    named = [json.loads((tmp_path / n / "users.json").read_text()) for n in ("all", "two")]
    assert [list(folders) for folders in named] == [[NEW_USER], ["u0", "u2"]]
    configs = [tmp_path / "all" / named[0][NEW_USER], tmp_path / "one"]
    points = [json.loads((place / "config.json").read_text())["mixture"] for place in configs]
    assert points[0] == points[1] == UserTable.load(adapted).mixtures()[0].tolist()
    with pytest.raises(UserError, match="'a' is named already"):
        read_user_list("a,b,a")


def _fail_at_second():
    calls = []

    def write_card(folder: Path, facts: dict) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("gone")

    return write_card


@pytest.mark.parametrize("user_id", ["u0", "a.b_c-d", "0" * 64])
def test_plain_ids_are_their_own_folders(user_id: str) -> None:
    assert folder_name(user_id) == user_id


def test_other_ids_get_names_that_any_file_system_takes() -> None:
    ids = ["Alice", "alice ", "../x", "..", ".", "_shared", "users.json", "-rf", "a/b", "ü", "漢字"]
    ids += ["x" * 65, "x" * 66, "a\nb", "CON."]
    names = [folder_name(user_id) for user_id in ids]
    assert len({*names, "alice", "con"}) == len(ids) + 2
    for name in names:
        assert name.isascii() and name == name.lower() and len(name) <= 60
        assert name[0].isalnum() and not set(name) & set("/\\ .:\n") and name != "users.json"


def test_lists_that_cannot_be_are_named(tmp_path: Path, capsys) -> None:
    path = tmp_path / "ids"
    for content, words in ((b"a\nb\na\n", "ids:3: 'a' stands on line 1"), (b"\n", "names no user")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_user_list(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_user_list(path)
    for given, words in (([path, path], "one folder and one"), (["nowhere"], "nothing is")):
        with pytest.raises(SystemExit) as stopped:
            consolidate.main(["run", "out", *(w for p in given for w in ("--users", str(p)))])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
