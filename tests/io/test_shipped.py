"""Files that come with pal_ds are found in a checkout and wherever pip put them."""

from pathlib import Path

import pytest

from pal_ds.cli.submit import SCRIPTS
from pal_ds.engine.ds_config import SHIPPED_CONFIGS
from pal_ds.io import files
from tests.spawn import ROOT


def test_a_checkout_has_its_own() -> None:
    assert ROOT / "slurm" == SCRIPTS and ROOT / "ds_configs" == SHIPPED_CONFIGS


@pytest.mark.parametrize("where", ["target", "environment", "user"])
def test_where_pip_put_them(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--target` has them beside the package, an environment under its prefix, `--user` under the user's base."""
    base = {name: tmp_path / name for name in ("target", "environment", "user")}
    monkeypatch.setattr(files, "__file__", str(base["target"] / "pal_ds" / "io" / "files.py"))
    monkeypatch.setattr("sys.prefix", str(base["environment"]))
    monkeypatch.setattr("site.getuserbase", lambda: str(base["user"]))
    # Somebody else's package of that name.
    (base["target"] / "slurm").mkdir(parents=True)
    folder = base[where] / "share" / "pal_ds" / "slurm"
    folder.mkdir(parents=True)
    (folder / "train.sbatch").touch()
    assert files.shipped_folder("slurm", "*.sbatch") == folder
