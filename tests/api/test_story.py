"""From Python, with a head, a loss and a source of one's own: what the commands do, alone and on two ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pal_ds.cli.main import main
from tests.api.story import TEXTS
from tests.api.votes import write_folder
from tests.spawn import ROOT, environment, run_command, torchrun


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("alone") / "place")
    run_command(folder, module="tests.api.story")
    return folder


@pytest.fixture(scope="module")
def report(alone: Path) -> dict[str, Any]:
    return json.loads((alone / "report.json").read_text())


def test_a_training_is_stopped_refused_and_resumed(report: dict[str, Any]) -> None:
    assert report["stopped"] == {
        "state": "stopped",
        "step": 5,
        "num_updates": report["finished"]["num_updates"],
        "reason": "stop_after",
    }
    assert "optim.learning_rate: 0.01 -> 5.0" in report["refused"]
    assert "optim.rate" in report["no such key"]
    assert report["finished"]["state"] == "finished"
    assert report["variables left"] == []


def test_code_of_ones_own_is_imported_by_leave_alone(report: dict[str, Any]) -> None:
    """A recipe that is a file, and a run, are data; the run that a training returned keeps its leave."""
    assert "is no class that pal_ds ships" in report["without leave"]
    assert "my_head.Centred, my_loss.Focal" in report["read without leave"]
    for said in (report["without leave"], report["read without leave"]):
        assert "--trust_code" in said and "trust_code=True" in said


def test_one_can_train_twice_and_a_recipe_says_what_classes_say(
    alone: Path, report: dict[str, Any]
) -> None:
    """The second training of the process, by classes, is the first one's, by import paths: to the bit."""
    assert report["same metrics"]
    recipes = [
        yaml.safe_load((alone / f"runs/{run}/config.yaml").read_text())
        for run in ("first", "second")
    ]
    assert recipes[0]["head"] == recipes[1]["head"] and recipes[0]["loss"] == recipes[1]["loss"]
    assert recipes[0]["loss"]["shape"] == {
        "class_path": "my_loss.Focal",
        "init_args": {"gamma": 0.5},
    }


def test_the_head_learns_and_new_users_join(report: dict[str, Any]) -> None:
    assert report["figures"]["accuracy"] > 0.8 and report["figures"]["temperature"] != 1.0
    assert set(report["users"]) == {f"u{n}" for n in range(6)}
    assert set(report["mixtures"]) == {"n0", "n1"}
    assert all(sum(point) == pytest.approx(1) for point in report["mixtures"].values())
    assert report["of new users"]["accuracy"] > 0.8 and report["of new users"]["adapted_users"] == 2
    short, long = report["scores"]
    assert long > short, "n1 likes long answers"


def test_exported_by_its_own_code(alone: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """With pal_ds, with the folder's code, and with transformers alone; new users get a folder each."""
    assert report["each"][1] == pytest.approx(report["scores"], abs=1e-4) != report["each"][0]
    assert "a folder that `adapt` wrote" in report["ids as a folder"]
    assert "a list of ids" in report["a folder as ids"]
    assert report["exported"] == pytest.approx(report["scores"], abs=1e-4)
    assert report["by its own code"] == pytest.approx(report["scores"], abs=1e-4)
    assert report["facts"]["head"] == "Centred" and report["facts"]["max_difference"] < 1e-4
    assert "no option 'dtyp'" in report["no such option"]
    texts = [row["prompt"] + "\n\n### Response:\n" + row["response"] for row in TEXTS]
    ways = [{"side": side, "special": True} for side in ("right", "left")]
    job = {
        "folder": str(alone / "out"),
        "texts": texts,
        "trust": True,
        "mixture": None,
        "ways": ways,
    }
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    reader = ROOT / "tests" / "export" / "reader.py"
    done = subprocess.run(
        [sys.executable, "-I", reader, tmp_path / "jobs.json", tmp_path / "results.json"],
        env=environment(HF_MODULES_CACHE=str(tmp_path / "modules")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads((tmp_path / "results.json").read_text())
    for scores in result["scores"]:
        assert scores == pytest.approx(report["scores"], abs=1e-4)


def test_a_run_is_evaluated_where_its_code_is_not_at_hand(
    alone: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    """From the copy that the run keeps; a command line in another folder."""
    moved = tmp_path / "moved"
    shutil.copytree(alone, moved, ignore=shutil.ignore_patterns("__pycache__", "out", "adapted"))
    for file in moved.glob("my_*"):
        file.unlink()
    words = ("evaluate", "--run_dir", "runs/first", "--name", "again", "--trust_code")
    done = subprocess.run(
        [sys.executable, "-m", "pal_ds", *words],
        env=environment(),
        cwd=moved,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    again = json.loads((moved / "runs/first/eval/again.json").read_text())
    assert again["users"] == report["figures"]["users"]
    # An exported folder's code runs where it is allowed, and is asked for by name where it is not.
    (moved / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    words = ("score", "--model", alone / "out", "--input", "texts.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "pal_ds", *map(str, words)],
        env=environment(),
        cwd=moved,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "trust_remote_code" in done.stderr
    assert "my_head.Centred" in done.stderr and "Traceback" not in done.stderr


def test_code_that_changed_is_noticed(alone: Path, tmp_path: Path) -> None:
    """On resume and on evaluation; a source may change, as data have a hash."""
    moved = tmp_path / "moved"
    shutil.copytree(alone, moved, ignore=shutil.ignore_patterns("__pycache__", "out", "adapted"))
    head = moved / "my_head.py"
    head.write_text(head.read_text().replace("-(place", "-2 * (place"))
    (moved / "my_source.py").write_text((moved / "my_source.py").read_text() + "# a word more\n")
    for words in (["train", "--config=my_head.yaml"], ["evaluate"]):
        done = subprocess.run(
            [sys.executable, "-m", "pal_ds", *words, "--run_dir=runs/first", "--trust_code"],
            env=environment(),
            cwd=moved,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr[-4000:]
        assert "my_head.py: not what this run was trained with" in done.stderr
        assert "--allow_change head" in done.stderr and "my_source" not in done.stderr


def test_two_ranks_train_twice_and_evaluate(tmp_path: Path) -> None:
    """Under torchrun, by the same calls: groups of ranks end and begin without a launch between."""
    folder = write_folder(tmp_path / "place")
    done = torchrun(2, "tests.api.story", folder, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["stopped"]["step"] == 5 and report["finished"]["state"] == "finished"
    assert "optim.learning_rate: 0.01 -> 5.0" in report["refused"]
    assert report["same metrics"] and report["figures"]["accuracy"] > 0.8
    manifest = next((folder / "runs/second/checkpoints").glob("step_*/manifest.json"))
    assert json.loads(manifest.read_text())["world_size"] == 2


def test_code_of_a_stranger_is_not_run(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by `users` either, which trusts a checkpoint as it unpickles nothing."""
    moved = tmp_path / "moved"
    shutil.copytree(alone / "runs/first", moved)
    (moved / "code/my_head.py").chmod(0o666)
    for words in (["evaluate"], ["users", "--list"]):
        with pytest.raises(SystemExit) as end:
            main([*words, f"--run_dir={moved}"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "may be written by anyone" in said and "my_head.py" in said
