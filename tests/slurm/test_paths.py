"""Paths that look like options, or like patterns, are paths to every program that the batch scripts call."""

import subprocess
from pathlib import Path

import pytest

from pal_ds.cli.main import main
from tests.slurm.stand_ins import Job
from tests.spawn import ROOT

OPTIONS = ("-delete", "-exec", "--help", "!", "(", "-n", "-", "a b;touch ran", "$(touch ran)")


def bait(folder: Path) -> None:
    """A submission directory with something in it."""
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("years of work")
    (folder / "my_head.py").write_text("# mine\n")


def is_whole(folder: Path) -> bool:
    files = folder / "thesis" / "chapter.txt", folder / "my_head.py"
    return all(file.is_file() for file in files) and not (folder / "ran").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_of_any_name(name: str, tmp_path: Path) -> None:
    """`find -delete -name ...` would empty the folder from which the job was submitted."""
    bait(tmp_path)
    job = Job(tmp_path, status="", checkpoint="", recipe=f"backbone: {{cache: '{name}'}}\n")
    code, log = job.start(script="embed")
    assert code == 0 and is_whole(tmp_path), log
    assert (tmp_path / name / "slurm" / "starts.jsonl").is_file()
    job = Job(tmp_path, recipe=f"backbone: {{cache: '{name}'}}\n")
    code, log = job.start()
    assert code == 0 and is_whole(tmp_path), log


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_directory_of_any_name(name: str, tmp_path: Path) -> None:
    bait(tmp_path)
    job = Job(tmp_path, status="", checkpoint="")
    code, log = job.start(f"--run_dir={name}", "--train.ds_config=-x")
    assert code == 0 and is_whole(tmp_path), log
    assert (tmp_path / name / "slurm" / "7" / "recipe.yaml").is_file()
    assert f"--run_dir=./{name} " in job.srun() + " "


@pytest.mark.parametrize("script", ["train", "embed", "sweep"])
def test_a_recipe_named_as_an_option(script: str, tmp_path: Path) -> None:
    bait(tmp_path)
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"} if script == "sweep" else {}
    name = "--x.yaml" if script != "sweep" else "-x.yaml"
    recipe = "backbone: {cache: c}\n"
    job = Job(tmp_path, recipe=recipe, recipe_name=name, variables=array)
    code, log = job.start(script=script)
    assert code == 0 and is_whole(tmp_path), log


def test_every_script_passes_shellcheck() -> None:
    """With each file that it sources, as `make check` has it."""
    scripts = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch")])
    assert len(scripts) >= 9
    checker = ROOT / ".venv" / "bin" / "shellcheck"
    if not checker.is_file():
        pytest.skip("shellcheck is not in this checkout's environment")
    done = subprocess.run([checker, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_percent_sign_is_the_folders_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM would put the job's name in place of %x."""
    recipe = ROOT / "pal_ds" / "recipes" / "quickstart.yaml"
    words = ["submit", "train", str(recipe), "--gpus_per_node=0", "--dry_run"]
    method = ["--", "--head=PalA"]
    main([*words, f"--run_dir={tmp_path / '50%x'}", *method])
    printed = capsys.readouterr().out
    assert f"--output={tmp_path}/50%%x/slurm/%x-%j.out" in printed
    with pytest.raises(SystemExit) as end:
        main([*words, f"--run_dir={tmp_path / chr(92)}", *method])
    assert end.value.code == 2 and "has a backslash" in capsys.readouterr().err
