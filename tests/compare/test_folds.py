"""A suite over folds: every method once on each fold's data, means and gains over folds, and a row from scratch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pal_ds.data.tables import PreparedData
from tests.compare.cases import METHODS, write_suite
from tests.warm import WarmParent

START = "tests.compare.cases:start"
FOLDS = ("north", "south", "west")


@pytest.fixture(scope="module")
def out(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    folds = {fold: {"data": {"seed": seed}} for seed, fold in enumerate(FOLDS)}
    suite = write_suite(folder, folds=folds, seeds=[0], users_above=[0, 39], reference="BTL")
    assert warm(START, suite, folder / "out", folder / "log") == [0]
    # Nothing is left to do for a second start, and it says the same.
    table = (folder / "out" / "table.json").read_bytes()
    assert warm(START, suite, folder / "out", folder / "log") == [0]
    assert (folder / "out" / "table.json").read_bytes() == table
    return folder / "out"


@pytest.fixture(scope="module")
def table(out: Path) -> dict[str, Any]:
    return json.loads((out / "table.json").read_text())


def evaluation(out: Path, method: str, fold: str, name: str = "test") -> dict[str, Any]:
    return json.loads(
        (out / "runs" / method / fold / "seed_0" / "eval" / f"{name}.json").read_text()
    )


def test_each_fold_has_data_and_runs_of_its_own(out: Path, table: dict[str, Any]) -> None:
    assert [*table["data"]] == [*FOLDS] and [*table["methods"]] == [*METHODS]
    hashes = {PreparedData.open(out.parent / "data" / fold).hash for fold in FOLDS}
    assert hashes == {part["hash"] for part in table["data"].values()} and len(hashes) == 3
    for method, row in table["methods"].items():
        figures = {fold: evaluation(out, method, fold) for fold in FOLDS}
        by_fold = {fold: one["accuracy"] for fold, one in figures.items()}
        assert row["accuracy"]["by_fold"] == by_fold
        assert row["accuracy"]["mean"] == pytest.approx(np.mean([*by_fold.values()]))
        assert row["pairs"] == sum(one["pairs"] for one in figures.values())
        curves = [evaluation(out, method, fold, "few_shot") for fold in FOLDS]
        for place, point in enumerate(row["few_shot"]):
            points = [curve["curve"][place] for curve in curves]
            mean = np.mean([point["accuracy"] for point in points])
            assert point["accuracy"]["mean"] == pytest.approx(mean)
            assert point["test_pairs"] == sum(point["test_pairs"] for point in points)
            gains = [curve["scratch"][place]["gain"] for curve in curves]
            assert point["gain"] == pytest.approx(np.mean(gains))


def test_gains_are_paired_by_fold(table: dict[str, Any]) -> None:
    own, other = (table["methods"][name]["accuracy"]["by_fold"] for name in ("PAL", "BTL"))
    gain = table["methods"]["PAL"]["gain"]
    assert "gain" not in table["methods"]["BTL"] and gain["over"] == "BTL"
    assert gain["by_fold"] == pytest.approx({fold: own[fold] - other[fold] for fold in FOLDS})
    low, high = gain["ci95"]
    assert low < gain["mean"] == pytest.approx((low + high) / 2)


def test_users_with_many_comparisons(out: Path, table: dict[str, Any]) -> None:
    """Everybody has 40 comparisons: more than 39, and more than none."""
    row = table["methods"]["PAL"]
    assert row["users_above"]["0"] == row["users_above"]["39"]
    assert row["users_above"]["0"]["by_fold"] == pytest.approx(row["accuracy"]["by_fold"])


def test_the_row_from_scratch(out: Path, table: dict[str, Any]) -> None:
    """Camps like what lies near a point, which is not linear, but better told by own pairs than by everybody's."""
    row = table["baselines"]["regression from scratch"]
    assert row["runs"] == [] and len(row["accuracy"]["by_seed"]) == 1
    scratch = {
        fold: json.loads((out / "scratch" / fold / "test.json").read_text()) for fold in FOLDS
    }
    assert row["accuracy"]["by_fold"] == {fold: one["accuracy"] for fold, one in scratch.items()}
    assert row["gain"]["mean"] == pytest.approx(
        row["accuracy"]["mean"] - table["methods"]["BTL"]["accuracy"]["mean"]
    )
    assert row["gain"]["mean"] > 0.1
    for fold, one in scratch.items():
        counts = evaluation(out, "BTL", fold)["by_prompt"]
        assert counts["pairs"] == one["by_prompt"]["pairs"] and "users" not in one
        assert sum(one["by_prompt"]["right"]) / sum(counts["pairs"]) == pytest.approx(
            one["accuracy"]
        )
    assert [point["num_comparisons"] for point in row["few_shot"]] == [0, 4]
    assert row["few_shot"][0]["accuracy"]["mean"] == 0.5, "of nothing, nothing is known"


def test_the_page_has_a_row_per_fold(out: Path, table: dict[str, Any]) -> None:
    text = (out / "table.md").read_text()
    assert "| fold | BTL | PAL | regression from scratch |" in text
    rows = {**table["methods"], **table["baselines"]}
    for fold in FOLDS:
        cells = " | ".join(f"{row['accuracy']['by_fold'][fold]:.3f}" for row in rows.values())
        assert f"| {fold} | {cells} |" in text
    assert "gain over BTL" in text and "users with > 39" in text
    assert "Gain over each user's own regression from scratch" in text
