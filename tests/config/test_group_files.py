"""A group of keys in a file of its own, and a class whose module is nowhere to be found."""

from pathlib import Path

import pytest
import yaml

from pal_ds.cli.main import main
from tests.tiny import LLAMA, data_keys

LOSS = """from pal_ds import MarginLoss


class Squared(MarginLoss):
    def __call__(self, margin):
        return (1 - margin).square()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "group_loss.py").write_text(LOSS)
    (tmp_path / "a" / "loss.yaml").write_text("shape: {class_path: group_loss.Squared}\n")
    (tmp_path / "optim.yaml").write_text("learning_rate: 0.25\n")
    head = {"class_path": "PalA", "init_args": {"num_prototypes": 2}}
    recipe = {"data": data_keys(tmp_path, 30), "head": head}
    recipe["backbone"] = {"architecture": LLAMA}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "loss": "./loss.yaml"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code of `train --print_config`, and what it said."""
    with pytest.raises(SystemExit) as end:
        main(["train", *words, "--run_dir=run", "--print_config"])
    return int(end.value.code or 0), "".join(capsys.readouterr())


def test_a_file_of_a_group(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in (["--optim", "optim.yaml"], ["--optim=optim.yaml"]):
        code, said = printed(capsys, "--config=recipe.yaml", *word)
        assert code == 0 and yaml.safe_load(said)["optim"]["learning_rate"] == 0.25, said
    (folder / "bare.yaml").write_text("optim: optim.yaml\n")
    code, said = printed(capsys, "--config=recipe.yaml", "--config=bare.yaml")
    assert code == 2 and "write ./optim.yaml" in said


@pytest.mark.parametrize(
    "words",
    [["--config=a/recipe.yaml"], ["--config=recipe.yaml", f"--loss={Path('a', 'loss.yaml')}"]],
)
def test_a_class_in_a_file_of_a_group_needs_leave(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = printed(capsys, *words)
    assert code == 2 and "--trust_code on the command line" in said
    code, said = printed(capsys, *words, "--trust_code")
    assert code == 0, said
    assert yaml.safe_load(said)["loss"]["shape"]["class_path"] == "group_loss.Squared"


def test_a_module_that_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = printed(capsys, "--config=recipe.yaml", "--head=nowhere_heads.Mine")
    assert code == 2 and "No module named 'nowhere_heads'. It was looked for among" in said
    assert str(folder.resolve()) in said
