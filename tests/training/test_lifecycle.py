"""What may happen to a run between two starts: a changed rate, a forgotten user, other base weights, foreign files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pal_ds.cli.main import main
from pal_ds.inference.load_run import restore
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import run_command
from tests.tiny import LLAMA, data_keys


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run on weights of its own folder, stopped after two of its updates."""
    folder = tmp_path_factory.mktemp("lifecycle")
    recipe = {
        "data": data_keys(folder, 48, dev_fraction=0.0, test_fraction=0.0),
        "backbone": {"path": str(folder / "base"), "tuning": "lora", "lora": {"rank": 4}},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "optim": {"learning_rate": 1e-2},
        "train": {"ds_config": "zero0", "batch_pairs": 8, "log_every": 1, "stop_after": 2},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run_command("prepare", f"--config={folder / 'recipe.yaml'}")
    vocab_size = json.loads((folder / "data" / "dataset.json").read_text())["tokens"]["vocab_size"]
    from pal_ds.backbones.config import BackboneConfig
    from pal_ds.backbones.transformer import materialise_architecture

    materialise_architecture(BackboneConfig(architecture=LLAMA), vocab_size, 0, folder / "base")
    run_command("train", f"--config={folder / 'recipe.yaml'}", f"--run_dir={folder / 'run'}")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def copied(started: Path, tmp_path: Path) -> Path:
    shutil.copytree(started / "run", tmp_path / "run")
    return tmp_path / "run"


def test_an_allowed_learning_rate_is_the_one_in_force(started: Path, tmp_path: Path) -> None:
    """The checkpoint brings the rates it was saved with; those of the recipe must win."""
    run = copied(started, tmp_path)
    before = restore(RunDirectory(run)).model.state_dict()
    words = (f"--config={started / 'recipe.yaml'}", f"--run_dir={run}", "--train.stop_after=4")
    run_command("train", *words, "--optim.learning_rate=0", "--allow_change", "optim.learning_rate")
    after = restore(RunDirectory(run)).model.state_dict()
    assert RunDirectory(run).complete_steps()[-1] == 4
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_run_that_forgot_a_user_is_not_resumed_on_their_data(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(started, tmp_path)
    main(["users", f"--run_dir={run}", "--remove", "u0"])
    capsys.readouterr()
    words = (f"--config={started / 'recipe.yaml'}", f"--run_dir={run}", "--train.stop_after=4")
    with pytest.raises(AssertionError, match="user 'u0' was removed from this run"):
        run_command("train", *words)
    assert RunDirectory(run).complete_steps() == [2]


def test_other_base_weights_are_refused(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = started / "base" / "model.safetensors"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, weights, metadata={"format": "pt"})
    try:
        message = refused(capsys, "evaluate", f"--run_dir={started / 'run'}", "--split=train")
    finally:
        weights.write_bytes(kept)
    assert "trained on frozen weights" in message


def test_a_failed_start_deletes_nothing_of_others(started: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    shutil.copytree(started / "base", run / "base")
    (run / "notes.txt").write_text("mine")
    words = (
        f"--config={started / 'recipe.yaml'}",
        f"--backbone.path={run / 'base'}",
        f"--run_dir={run}",
    )
    with pytest.raises(AssertionError, match="target"):
        run_command("train", *words, "--backbone.lora.target_modules=[nothing_like_it]")
    assert (run / "base" / "model.safetensors").is_file()
    assert (run / "notes.txt").read_text() == "mine"


def test_random_weights_do_not_replace_what_lies_there(started: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    shutil.copytree(started / "base", run / "base")
    kept = (run / "base" / "model.safetensors").read_bytes()
    recipe = json.loads((started / "recipe.yaml").read_text())
    recipe["backbone"] = {"architecture": LLAMA}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(AssertionError, match="did not write"):
        run_command("train", f"--config={tmp_path / 'recipe.yaml'}", f"--run_dir={run}")
    assert (run / "base" / "model.safetensors").read_bytes() == kept


def test_more_tokens_than_positions_are_refused(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = started / "base" / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "max_position_embeddings": 32}))
    try:
        with pytest.raises(AssertionError, match="has 32 positions"):
            run_command(
                "train", f"--config={started / 'recipe.yaml'}", f"--run_dir={tmp_path / 'run'}"
            )
    finally:
        config.write_text(kept)
    assert not (tmp_path / "run").exists()
