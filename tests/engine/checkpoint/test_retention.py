"""Loss on general sets from two evaluations, by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pal_ds.eval.retention import retention
from pal_ds.runs.run_dir import RunDirectory
from tools.retention import main


def part(pairs: int, accuracy: float | None, half: float = 0.0) -> dict[str, Any]:
    interval = None if accuracy is None else [accuracy - half, min(1.0, accuracy + half)]
    return {"pairs": pairs, "accuracy": accuracy, "accuracy_ci95": interval}


def evaluated(path: Path, **sets: dict[str, Any]) -> RunDirectory:
    run = RunDirectory(path)
    run.eval.mkdir(parents=True)
    for name, figures in sets.items():
        (run.eval / f"{name}.json").write_text(json.dumps(figures))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDirectory]:
    nobody = part(0, None)
    before = {**part(100, 0.8, 0.06), "unknown_users": nobody}
    # Those who were known are strangers to the later run; of the other set a quarter is.
    after = {**nobody, "unknown_users": part(100, 0.7, 0.08)}
    mixed = {**part(300, 0.9, 0.04), "unknown_users": part(100, 0.98, 0.04)}
    return [
        evaluated(tmp_path / "before", hh=before, webgpt=mixed),
        evaluated(tmp_path / "after", hh=after, webgpt=mixed, other={**after, **part(3, 1.0)}),
    ]


def test_loss_per_set(runs: list[RunDirectory]) -> None:
    hh, webgpt = retention(*runs, ["hh", "webgpt"])
    assert (hh["set"], hh["pairs"], hh["before"], hh["after"]) == ("hh", 100, 0.8, 0.7)
    assert hh["loss_ci95"] == pytest.approx([0.1 - 0.1, 0.1 + 0.1])
    assert (webgpt["pairs"], webgpt["before"], webgpt["loss"]) == (400, pytest.approx(0.92), 0)
    half = np.sqrt(2) * np.hypot(0.75 * 0.04, 0.25 * 0.04)
    assert webgpt["loss_ci95"] == pytest.approx([-half, half])


def test_command(
    runs: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (str(run.path) for run in runs)
    main([before, after, "hh,webgpt", f"--out={tmp_path / 'out'}"])
    page = (tmp_path / "out" / "retention.md").read_text()
    assert capsys.readouterr().out == page
    assert "| hh | 100 | 0.800 | 0.700 | +0.100 (+0.000 to +0.200) |" in page
    rows = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert rows == retention(*runs, ["hh", "webgpt"])
    for name, match in (("nothing", "no such file"), ("other", "no such file")):
        with pytest.raises(SystemExit) as end:
            main([before, after, name])
        assert end.value.code == 2 and match in capsys.readouterr().err
    (runs[0].eval / "other.json").write_text((runs[0].eval / "hh.json").read_text())
    with pytest.raises(SystemExit):
        main([before, after, "other"])
    assert "of 100 pairs before and of 103 after" in capsys.readouterr().err
