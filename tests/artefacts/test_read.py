"""What an earlier version wrote is read by this one: prepared data, runs, exported folders and user tables.

`kept/` was made by commit 385b785, see README.md. Its figures come from another processor as well as another version,
so they are compared with a bound, which is argued at `BOUND`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pal_ds.cli.main import main
from pal_ds.export import ExportOptions, export
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import environment

HERE = Path(__file__).parent
READER = HERE.parent / "export" / "reader.py"
SEPARATOR = "\n\n### Response:\n"
RUNS = ("pal_a", "pal_b", "bradley_terry")

BOUND = 2 * 15 * 64 * 2**-24
"""Largest difference of a margin between two orders of summation, relative to the scores of its run.

A score is made by about 15 layers of sums of at most 64 terms (8 hidden units, 12 in the MLP, 64 positions), each
rounded to 2**-24; a margin is a difference of two. What is derived from margins moves less than they do, for a sigmoid
has slope 1/4 at most. Counts and bins do not move: in these data no margin is closer to 0 than 0.027, and no
confidence is closer to the edge of a bin of the ECE than 0.0004, 0.0008 and 0.0068 (the three runs).
"""
SCALES = {"pal_a": 5.5, "pal_b": 12.4, "bradley_terry": 0.4}
"""Largest scores of each run. BOUND times them is 6e-4, 1.4e-3 and 5e-5, of which a quarter is below the gaps above."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `kept/` that this user alone may write, whatever the mask of the checkout was."""
    folder = tmp_path_factory.mktemp("artefacts") / "kept"
    shutil.copytree(HERE / "kept", folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_near(got: Any, wanted: Any, scale: float, where: str = "") -> None:
    """Numbers to BOUND at the scale of their run, everything else equal, keys and lengths included.

    Intervals hold what they held: these data have a handful of prompts, of which the normal interval of then said too
    much. tests/eval/test_metrics.py has their exact ends.
    """
    if where.endswith("_ci95") and isinstance(wanted, list):
        slack = BOUND * scale
        assert 0 <= got[0] <= wanted[0] + slack and wanted[1] - slack <= got[1] <= 1, where
        return
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_near(got[key], value, scale, f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_near(got[index], value, scale, f"{where}/{index}")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=0, abs=BOUND * scale), where
    else:
        assert got == wanted, where


def test_nothing_names_a_machine() -> None:
    """Else the copies would read the paths where they were made."""
    for path in (HERE / "kept").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for folder in (b"/tmp/", b"/home/", str(Path.home()).encode()):
                assert folder not in content, path
    size = sum(path.stat().st_size for path in (HERE / "kept").rglob("*") if path.is_file())
    assert size < 1.5e6


FIGURES = sorted(
    str(path.relative_to(HERE / "kept")) for path in HERE.glob("kept/runs/*/eval/*.json")
)


@pytest.mark.parametrize("figures", FIGURES)
def test_evaluate_gives_the_stored_figures(
    kept: Path, monkeypatch: pytest.MonkeyPatch, figures: str
) -> None:
    """On a split of the prepared data, and on the comparisons of users of a table that `adapt` wrote."""
    monkeypatch.chdir(kept)
    run, of_new_users = figures.split("/")[1], figures.endswith("new_users.json")
    words = ["evaluate", f"--run_dir=runs/{run}"]
    if of_new_users:
        words += ["--data=new_users.jsonl", f"--users=users/{run}", "--name=new_users"]
    Path(figures).unlink()
    main(words)
    got, wanted = (json.loads(Path(f, figures).read_text()) for f in (".", HERE / "kept"))
    for newer in ("margins", "prototype_examples"):
        got.pop(newer, None)
        got["unknown_users"].pop(newer, None)
    assert_near(got, wanted, SCALES[run])
    assert got["adapted_users"] == (2 if of_new_users else 0)


def test_a_stopped_run_goes_on(kept: Path, tmp_path: Path) -> None:
    """Two ranks left it after update 9; one rank makes the tenth."""
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    words = ["--config=recipe.yaml", "--config=pal_a.yaml", "--run_dir=runs/pal_a"]
    done = subprocess.run(
        [sys.executable, "-m", "pal_ds", "train", *words, "--train.stop_after=10"],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    resumed = "resuming from runs/pal_a/checkpoints/step_00000009 at update 9 of 14"
    assert resumed in done.stdout + done.stderr
    assert json.loads((folder / "runs/pal_a/status.json").read_text())["step"] == 10
    logged = rows(folder / "runs/pal_a/metrics.jsonl")
    earlier = rows(HERE / "kept/runs/pal_a/metrics.jsonl")
    assert logged[: len(earlier)] == earlier
    # The mean over all updates since the start: nine of the earlier version, and the tenth. A coin has log 2.
    assert logged[-1]["step"] == 10 and 0.3 < logged[-1]["loss"] < 1.0


def test_prepared_data_are_taken_as_they_are(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(kept)
    files = [path for path in Path("data").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    main(["prepare", "--config=recipe.yaml"])
    assert "prepared before with these settings; reusing it" in "".join(capfd.readouterr())
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before


def test_an_export_of_today_is_the_export_of_then(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to the bit: they are read from the shards, and no arithmetic is in between."""
    monkeypatch.chdir(kept)
    export(RunDirectory("runs/pal_b"), tmp_path / "out", ExportOptions(quiet=True))
    stored = load_file(kept / "exported/pal_b/model.safetensors")
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == stored.keys()
    assert all((made[name] == stored[name]).all() for name in stored)


SCORED = {
    **{name: (["--model", f"exported/{name}"], f"exported/{name}.jsonl") for name in RUNS},
    "pal_b_u1": (["--run_dir=runs/pal_b", "--user=u1"], "exported/pal_b_u1.jsonl"),
}


@pytest.mark.parametrize("name", SCORED)
def test_score_gives_the_stored_scores(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(kept)
    words, stored = SCORED[name]
    main(["score", *words, "--input=texts.jsonl", f"--output={tmp_path / 'scores.jsonl'}"])
    assert_near(
        rows(tmp_path / "scores.jsonl"), rows(Path(stored)), SCALES[name.removesuffix("_u1")]
    )


def test_transformers_alone_gives_the_stored_scores(kept: Path, tmp_path: Path) -> None:
    """By the code that lies in the folders, where there is no pal_ds."""
    wanted = {name: rows(kept / f"exported/{name}.jsonl") for name in RUNS}
    ways = [{"side": side, "special": True} for side in ("right", "left")]
    jobs = [
        {
            "folder": f"exported/{name}",
            "texts": [row["prompt"] + SEPARATOR + row["response"] for row in wanted[name]],
            "trust": True,
            "mixture": None,
            "ways": ways,
        }
        for name in RUNS
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", READER, tmp_path / "jobs.json", tmp_path / "results.json"],
        cwd=kept,
        env=environment(HF_MODULES_CACHE=str(tmp_path / "modules")),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for name, result in zip(RUNS, results, strict=True):
        for scores in result["scores"]:
            assert_near(scores, [row["score"] for row in wanted[name]], SCALES[name])
