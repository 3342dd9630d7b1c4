"""One small trained run, and `refused`: a command must say one clear thing, exit with 2 and change no file."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pal_ds.cli.main import main
from tests.spawn import ROOT, environment, run_command
from tests.tiny import LLAMA, write_pairs


class Place:
    """A folder with pairs, a recipe, prepared data and a run of 6 updates with checkpoints at 3 and 6."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs, self.recipe = folder / "pairs.jsonl", folder / "recipe.yaml"
        self.data, self.run = folder / "data", folder / "run"

    def make(self) -> None:
        write_pairs(self.pairs, 40)
        recipe = {
            "data": {
                "path": str(self.data),
                "source": {"class_path": "Jsonl", "init_args": {"path": str(self.pairs)}},
                "vocab_size": 400,
                "max_length": 64,
                "dev_fraction": 0.2,
                "test_fraction": 0.0,
            },
            "backbone": {"architecture": LLAMA},
            "head": {"class_path": "PalA", "init_args": {"num_prototypes": 2}},
            "train": {"ds_config": "tests/ds/zero0.json", "batch_pairs": 16, "epochs": 2},
        }
        self.recipe.write_text(yaml.safe_dump(recipe))
        run_command(*self.train())

    def train(self, *options: object, run: Path | None = None) -> list[str]:
        """Arguments of `train` with the recipe, into its run unless told otherwise."""
        return [
            "train",
            f"--config={self.recipe}",
            f"--run_dir={run or self.run}",
            *map(str, options),
        ]


def pal_ds(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m pal_ds ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pal_ds", *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )


def contents(*folders: Path) -> dict[Path, str]:
    """Hash of every file, and the folders, under `folders`."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("bad_input"))
    place.make()
    return place


Refused = Callable[..., str]


@pytest.fixture
def refused(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Runs a command in this process; returns its message."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: object, command: Callable[[list[str]], None] = main) -> str:
        before = contents(place.folder, tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert "Traceback" not in said
        assert said.count("error: ") == 1, said
        assert not re.search(r"[^./]\.\.(?:\s|$)|[.;]; |;\.|\.,\s", said), said
        assert contents(place.folder, tmp_path) == before
        return said[said.index("error: ") + len("error: ") :].strip()

    return run
