"""What is read from others runs nothing, what a name says stays in its directory, and secrets stay where they are."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from pal_ds.cli.main import main
from pal_ds.engine.checkpoint.manifest import entry_of, write_manifest
from pal_ds.engine.checkpoint.shard_writer import ShardFiles
from pal_ds.engine.checkpoint.torch_archive import ForeignObjectError
from pal_ds.engine.checkpoint.verify import UntrustedCheckpointError, verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.kills import said
from tests.engine.newest import newest_intact
from tests.warm import WarmParent, fork_ranks, wait_for
from tools import consolidate

OTHER_USER = 12345
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_notARealTokenButLongEnoughToFind",
}


@pytest.fixture(scope="module")
def folder(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run of two ranks with two checkpoints."""
    folder = tmp_path_factory.mktemp("trust")
    made = warm("tests.engine.kills:train", folder, "run", {"save_every": 1, "stop_after": 2})
    assert made["codes"] == [0, 0], made["said"]
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> RunDirectory:
    """A copy, to be tampered with."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def replaced(step: Path, name: str, content: Any) -> Path:
    """Puts another object in a shard's place, with a manifest that agrees."""
    torch.save(content, step / name)
    manifest = verify_checkpoint_unread(step)
    manifest["files"][name] = entry_of(step / name)
    write_manifest(step, manifest)
    return step / name


def verify_checkpoint_unread(step: Path) -> dict[str, Any]:
    return json.loads((step / "manifest.json").read_text())


def optimizer_shard(step: Path) -> str:
    return next(p for p in (step / "engine").glob("*optim_states.pt")).relative_to(step).as_posix()


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("trust", [False, True])
def test_a_shard_cannot_run_code(run: RunDirectory, tmp_path: Path, trust: bool) -> None:
    """Not even one that we own, with a manifest that agrees, of a run that is trusted."""
    step = run.checkpoint(2)
    shard = replaced(step, optimizer_shard(step), {"x": Evil(tmp_path / "ran")})
    for read in (
        lambda: verify_checkpoint(step, trust=trust),
        # No older checkpoint takes over: this is no accident.
        lambda: newest_intact(run, trust=trust),
        # And where a shard is exchanged after it was verified:
        lambda: ShardFiles().load(str(shard)),
    ):
        with pytest.raises(ForeignObjectError, match=r"posix\.mkdir"):
            read()
    assert not (tmp_path / "ran").exists()
    with open(shard, "rb") as stream:
        assert b"mkdir" in stream.read()


def test_what_could_not_be_read_again_is_told_at_the_save(tmp_path: Path) -> None:
    shards = ShardFiles()
    shards.save({"x": Evil(tmp_path / "ran")}, str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match=r"posix\.mkdir"):
        shards.entries(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_shards_go_through_all_that_deepspeed_may_ask_for() -> None:
    """Its interface grows; ours stands in for all of it."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    asked = {name for name in vars(CheckpointEngine) if not name.startswith("_")}
    assert asked <= set(dir(ShardFiles))


def test_the_payload_of_that_test_works(tmp_path: Path) -> None:
    """Else it would show nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_writes_is_read(
    warm: WarmParent, folder: Path, stage: int, precision: str
) -> None:
    name = f"stage_{stage}_{precision}"
    options = {"ds_config": f"tests/ds/zero{stage}.json", "precision": precision, "stop_after": 1}
    made = warm("tests.engine.kills:train", folder, name, options, 1)
    assert made["codes"] == [0], made["said"]
    step = RunDirectory(folder / name).checkpoint(1)
    shards = [step / file for file in verify_checkpoint(step)["files"] if file.endswith(".pt")]
    assert shards
    for shard in shards:
        read, wanted = ShardFiles().load(str(shard)), torch.load(shard, weights_only=False)
        assert read.keys() == wanted.keys()


def as_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, OTHER_USER, -1, follow_symlinks=False)


@pytest.mark.parametrize("part", ["", "engine", "users.safetensors", "manifest.json", "SHARD"])
def test_a_strangers_file_needs_trust(run: RunDirectory, part: str) -> None:
    step = run.checkpoint(2)
    part = optimizer_shard(step) if part == "SHARD" else part
    as_another_user(step / part)
    with pytest.raises(UntrustedCheckpointError, match="--trust_checkpoint") as refused:
        newest_intact(run)
    assert str(step / part) in str(refused.value) and str(OTHER_USER) in str(refused.value)
    found = newest_intact(run, trust=True)
    assert found is not None and found[0] == step


@pytest.mark.parametrize("part", ["", "engine", "users.arrow"])
def test_what_anyone_may_write_needs_trust(run: RunDirectory, part: str) -> None:
    path = run.checkpoint(2) / part
    path.chmod(path.stat().st_mode | 0o022)
    with pytest.raises(UntrustedCheckpointError, match="may be written by anyone"):
        newest_intact(run)
    assert newest_intact(run, trust=True) is not None
    path.chmod(path.stat().st_mode & ~0o002)
    # Groups share runs on clusters.
    assert newest_intact(run) is not None


def test_a_generous_umask_makes_no_checkpoint_that_anyone_may_write(
    warm: WarmParent, folder: Path
) -> None:
    warm("tests.cli.test_trust:set_umask", 0)
    try:
        made = warm("tests.engine.kills:train", folder, "umask", {"stop_after": 1}, 1)
    finally:
        warm("tests.cli.test_trust:set_umask", 0o022)
    assert made["codes"] == [0], made["said"]
    assert verify_checkpoint(RunDirectory(folder / "umask").checkpoint(1))


def set_umask(mask: int) -> None:
    os.umask(mask)


def test_a_strangers_checkpoint_is_no_start_of_ours(run: RunDirectory) -> None:
    """DeepSpeed's own checkpoints have no manifest: neither resumed nor passed over for a fresh start."""
    shutil.rmtree(run.checkpoint(1))
    (run.checkpoint(2) / "manifest.json").unlink()
    for trust in (False, True):
        with pytest.raises(UserError, match=r"none of the steps \[2\] is intact"):
            newest_intact(run, trust=trust)


@pytest.mark.parametrize("name", ["../users.arrow", "/etc/passwd", "engine/../../x", "", "a\0b"])
def test_a_manifest_names_nothing_outside(run: RunDirectory, name: str) -> None:
    step = run.checkpoint(2)
    manifest = verify_checkpoint(step)
    manifest["files"][name] = manifest["files"]["users.arrow"]
    write_manifest(step, manifest)
    with pytest.raises(UserError, match="outside the checkpoint"):
        verify_checkpoint(step, trust=True)


@pytest.mark.parametrize("part", ["users.arrow", "engine"])
def test_links_are_refused(run: RunDirectory, tmp_path: Path, part: str) -> None:
    path = run.checkpoint(2) / part
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        verify_checkpoint(run.checkpoint(2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name=../../x"], "--name ../../x: must be a plain name"),
        (["--name=.."], "--name ..: must be a plain name"),
        (["--name=/tmp/x"], "must be a plain name"),
        (["--step=../../x"], "--step ../../x: not among the checkpoints"),
        (["--step=-1"], "--step -1: not among the checkpoints"),
    ],
)
def test_arguments_stay_in_the_run(
    run: RunDirectory, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.path.parent.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["evaluate", f"--run_dir={run.path}", "--split=train", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert sorted(run.path.parent.rglob("*")) == before


def test_a_strangers_recipe_needs_trust(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may name a class by its import path, or ask for code that a backbone's folder brings."""
    as_another_user(run.config_file)
    words = ["evaluate", f"--run_dir={run.path}", "--split=train"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert f"{run.config_file}: belongs to another user" in capsys.readouterr().err
    main([*words, "--trust_checkpoint"])
    assert (run.eval / "train.json").is_file()


def test_a_damaged_step_names_the_others(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.checkpoint(2) / "users.arrow").unlink()
    with pytest.raises(SystemExit):
        main(["evaluate", f"--run_dir={run.path}", "--split=train"])
    said = capsys.readouterr().err
    assert "users.arrow: named in the manifest but missing" in said
    assert "--step; there are [1]" in said


def test_pointers_stay_in_the_run(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "best.json").write_text(json.dumps({"step": "../../x", "path": "../../x"}))
    with pytest.raises(SystemExit) as end:
        main(["evaluate", f"--run_dir={run.path}", "--split=train", "--step=best"])
    assert end.value.code == 2
    assert "it.step is '../../x', no int" in capsys.readouterr().err


def live_with_secrets(folder: str, place: str) -> str:
    """Trains and exports in one process whose environment holds keys; what it printed."""
    recipe = yaml.safe_load((Path(folder) / "recipe.yaml").read_text())
    recipe["train"] |= {"stop_after": 1, "ds_config": "tests/ds/zero0.json"}
    recipe["wandb"] = {"project": "trust", "mode": "offline"}
    (Path(place) / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def work() -> None:
        os.environ.update(SECRETS)
        main(["train", f"--config={place}/recipe.yaml", f"--run_dir={place}/run"])
        consolidate.main([f"{place}/run", f"{place}/out"])

    log = Path(place) / "log"
    codes = wait_for(fork_ranks(1, work, log))
    printed = said(log, 1)[0]
    assert codes == [0], printed
    return printed


def test_secrets_stay_in_the_environment_and_exports_are_safetensors(
    warm: WarmParent, folder: Path, tmp_path: Path
) -> None:
    """A whole life of a run with wandb at work: nothing written or printed holds a key."""
    run, out = tmp_path / "run", tmp_path / "out"
    printed = warm("tests.cli.test_trust:live_with_secrets", folder, tmp_path)
    assert list(run.rglob("*.wandb")), "wandb was not at work"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in SECRETS.values():
        assert secret not in printed
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert_no_pickles(out)


def assert_no_pickles(out: Path) -> None:
    """Weights are safetensors, and nothing else that could be unpickled lies beside them."""
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert ".safetensors" in kinds and kinds <= {".safetensors", ".json", ".py", ".md", ".jinja"}
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            assert stream.keys()
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), path
