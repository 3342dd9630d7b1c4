"""Every command that reads a run refuses what another person may have written, whichever of its files that is."""

import os

import pytest

from pal_ds.cli.main import main
from pal_ds.engine.checkpoint.verify import UntrustedCheckpointError
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.launch import TrainingRequest, check_run_directory
from tests.security.attacks import reading, said_by
from tests.security.stranger import Stranger

PARTS = ("", "config.yaml", "base", "base/config.json", "checkpoints", "best.json", "eval")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "command",
    ("users", "users --remove", "report", "evaluate", "consolidate", "retention", "reshard"),
)
def test_what_anyone_may_write_is_refused_by_every_reader(
    part: str, command: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stranger.copy("run")
    path = run / part
    if not path.exists():
        (run / "eval").mkdir(exist_ok=True)
        path.touch()
    path.chmod(path.stat().st_mode | 0o002)
    words = reading(command, stranger, run)
    code, said = said_by(words, capsys)
    assert code == 2 and f"{path}: may be written by anyone" in said, said
    assert "--trust_checkpoint" in said and "chmod" in said
    if command in ("users", "evaluate") and part == "":
        main([*map(str, words), "--trust_checkpoint"])


def test_a_training_resumes_nothing_that_anyone_may_write(stranger: Stranger) -> None:
    run = RunDirectory(stranger.copy("run"))
    run.path.chmod(0o777)
    request = TrainingRequest(config=None, recipe="", run=run, ds_config={})
    with pytest.raises(UntrustedCheckpointError, match="may be written by anyone"):
        check_run_directory(request, None)


def test_a_link_is_as_trusted_as_what_it_leads_to(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stranger.copy("run")
    config = stranger.folder / "elsewhere.yaml"
    (run / "config.yaml").rename(config)
    (run / "config.yaml").symlink_to(config)
    config.chmod(0o666)
    code, said = said_by(reading("users", stranger, run), capsys)
    assert code == 2 and "config.yaml: may be written by anyone" in said


def test_nothing_is_left_for_anyone_to_write(stranger: Stranger) -> None:
    """Whatever the shell allows, the commands write what they will read again without complaint."""
    before = os.umask(0)
    try:
        out = stranger.folder / "report"
        main(["report", f"--run_dirs=[{stranger.copy('run')}]", f"--out={out}"])
        assert all(not path.stat().st_mode & 0o002 for path in (out, *out.rglob("*")))
    finally:
        os.umask(before)
