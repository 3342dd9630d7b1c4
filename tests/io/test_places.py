"""Paths as people write them: `~`, the current directory, and one that leads through a file."""

import json
from pathlib import Path

import pytest

from pal_ds.api.run import Run, path_or_list
from pal_ds.backbones.config import BackboneConfig
from pal_ds.config.run_config import TrainConfig
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.errors import StorageError, UserError, writing
from pal_ds.io.files import new_files, new_folder
from pal_ds.runs.run_dir import RunDirectory


def test_the_home_folder_is_meant_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data, backbone = DataConfig(path="~/d", tokenizer="~/t"), BackboneConfig(path="~/m", cache="~")
    train = TrainConfig(init_from="~/r", ds_config="~/z.json")
    given = data.path, data.tokenizer, backbone.path, train.init_from, train.ds_config
    assert given == tuple(f"{tmp_path}/{name}" for name in ("d", "t", "m", "r", "z.json"))
    assert backbone.cache == str(tmp_path) and BackboneConfig().path is None
    assert RunDirectory("~/r").path == Run("~/r").path == tmp_path / "r"
    assert path_or_list("~/x.jsonl", "texts") == tmp_path / "x.jsonl"
    # Nobody of this name: a name like others.
    assert RunDirectory("~nobody-of-this-name").path == Path("~nobody-of-this-name")


def config_at(path: str, folder: Path) -> DataConfig:
    pairs = folder / "pairs.jsonl"
    lines = ({"prompt": f"p {i}", "chosen": "yes", "rejected": "no"} for i in range(9))
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(path=path, source=Jsonl(str(pairs)), vocab_size=300)


@pytest.mark.parametrize("path", [".", "", "../here"])
def test_the_current_directory_is_not_replaced_by_what_is_made(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"is the current directory.*Name a folder in it"):
        prepare(config_at(path, tmp_path), quiet=True)
    assert not list((tmp_path / "here").iterdir())


def test_files_may_join_those_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_files(Path()) as aside:
        (aside / "file").write_text("x")
    assert Path("file").read_text() == "x" and [*tmp_path.iterdir()] == [tmp_path / "here"]


def test_a_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/x", tmp_path / "file/x/y"):
        with pytest.raises(StorageError, match=r"file.*name another place"):
            prepare(config_at(str(path), tmp_path), quiet=True)
        with pytest.raises(StorageError, match="name another place"), new_folder(path):
            pass
        with pytest.raises(StorageError, match="name another place"), writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
