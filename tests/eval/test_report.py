"""The report of a run: a page, six pictures, warnings, none without its data, and a simplex that no legend hides."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pal_ds.adaptation.few_shot import evaluate_few_shot
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval import report
from pal_ds.eval.diagnostics import diagnose_latent
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.report import PICTURES, write_report
from pal_ds.eval.results import split_request
from pal_ds.inference.load_run import open_run, restore
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import run_command
from tests.tiny import LLAMA, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """With evaluation and few-shot results; the head takes the largest logit in evaluation."""
    folder = tmp_path_factory.mktemp("report")
    pairs = write_pairs(folder / "pairs.jsonl", 96, num_users=12)
    run_command(
        "train",
        f"--data.path={folder / 'data'}",
        "--data.source=Jsonl",
        f"--data.source.path={pairs}",
        "--data.vocab_size=400",
        "--data.max_length=64",
        "--data.dev_fraction=0.2",
        "--data.test_fraction=0.3",
        "--data.unseen_user_fraction=0.4",
        f"--backbone.architecture={json.dumps(LLAMA)}",
        "--head=PalA",
        "--head.num_prototypes=3",
        "--head.evaluation=hard",
        "--train.batch_pairs=16",
        "--train.ds_config=zero0",
        "--train.log_every=1",
        f"--run_dir={folder / 'run'}",
    )
    run = RunDirectory(folder / "run")
    evaluate_run(run, ALONE)
    evaluate_few_shot(run, [0, 1, 2], 1)
    return run


def test_page_and_pictures(trained: RunDirectory, tmp_path: Path) -> None:
    page = write_report({"first": trained, "second": trained}, tmp_path / "out").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md",
        *(f"{name}.png" for name in PICTURES),
    }
    for name, title in PICTURES.items():
        assert f"![{title}]({name}.png)" in page
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)
    figures = json.loads((trained.eval / "test.json").read_text())
    assert f"| first | {figures['pairs']} | {figures['accuracy']:.3f} (" in page
    assert f"| {figures['ece']:.3f} | {figures['brier']:.3f} |" in page
    assert figures["warnings"], "a model of a few random steps beats no baseline"
    for warning in figures["warnings"]:
        assert f"- second, eval/test.json: {warning}\n" in page


def test_reliability_is_drawn_as_evaluated(trained: RunDirectory) -> None:
    figure, axes = plt.subplots()
    assert report._reliability(axes, trained)
    bins = json.loads((trained.eval / "test.json").read_text())["reliability"]
    drawn = np.asarray(axes.collections[0].get_offsets())
    assert drawn == pytest.approx(
        np.asarray([[row["confidence"], row["accuracy"]] for row in bins])
    )
    sizes = np.asarray(axes.collections[0].get_sizes())  # type: ignore[attr-defined]
    pairs = np.asarray([row["pairs"] for row in bins])
    assert (sizes - 4) / 400 == pytest.approx(pairs / pairs.sum())
    plt.close(figure)


def test_prototypes_are_drawn_as_evaluated(trained: RunDirectory) -> None:
    found = json.loads((trained.eval / "test.json").read_text())["diagnostics"]
    figure, axes = plt.subplots()
    assert report._prototypes(axes, trained)
    (image,) = axes.get_images()
    assert np.asarray(image.get_array()) == pytest.approx(np.asarray(found["prototype_distances"]))
    assert f"{found['effective_prototypes']:.1f} in use" in axes.get_xlabel()
    plt.close(figure)


def test_latent_units_are_no_prototypes(trained: RunDirectory, tmp_path: Path) -> None:
    """Of a head that makes users' points from comparisons the page shows the rest."""
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    figures = json.loads((run.eval / "test.json").read_text())
    figures["diagnostics"] = diagnose_latent(torch.eye(3))
    (run.eval / "test.json").write_text(json.dumps(figures))
    page = write_report({"run": run}, tmp_path / "out").read_text()
    assert "learning.png" in page and "prototypes.png" not in page


def test_an_evaluation_of_an_earlier_version_is_shown(
    trained: RunDirectory, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    figures = json.loads((run.eval / "test.json").read_text())
    for key in ("brier", "reliability", "controversial", "diagnostics", "warnings"):
        del figures[key]
    (run.eval / "test.json").write_text(json.dumps({**figures, "ece": None}))
    page = write_report({"run": run}, tmp_path / "out").read_text()
    assert f"| run | {figures['pairs']} | {figures['accuracy']:.3f} (" in page
    assert not (tmp_path / "out" / "reliability.png").exists()
    assert not (tmp_path / "out" / "prototypes.png").exists()


def test_pictures_without_data_are_left_out(trained: RunDirectory, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("eval", "metrics.jsonl")
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run", ignore=left_out))
    page = write_report({"run": run}, tmp_path / "out").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.md",
        "simplex.png",
    ]
    assert page.count("![") == 1
    # An evaluation of strangers alone tells of the run's own users' prototypes, and has nothing to stumble over.
    run.eval.mkdir()
    strangers = evaluate_run(trained, ALONE, request=split_request("unseen_test"))
    (run.eval / "test.json").write_text(json.dumps({**strangers, "warnings": []}))
    more = write_report({"run": run}, tmp_path / "out").read_text()
    assert more.replace(_section("prototypes"), "") == page


def _section(name: str) -> str:
    return f"\n## {PICTURES[name]}\n\n![{PICTURES[name]}]({name}.png)\n"


def test_users_lie_where_the_head_puts_them_and_the_legend_beside(trained: RunDirectory) -> None:
    users = restore(trained).users
    groups: dict[str, str | None] = {user: f"group {row % 4}" for row, user in enumerate(users.ids)}
    groups[users.ids[0]] = None
    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    assert report._simplex(axes, open_run(trained), groups)
    figure.tight_layout()
    figure.canvas.draw()
    legend = axes.get_legend()
    assert legend is not None
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert figure.bbox.contains(*legend.get_window_extent().min)
    outline = axes.lines[0].get_xydata()
    assert isinstance(outline, np.ndarray)
    assert all(axes.bbox.contains(*axes.transData.transform(corner)) for corner in outline)
    labels = [text for text in axes.texts if text.get_text() in ("1", "2", "3")]
    assert len(labels) == 3
    for label in labels:
        assert axes.viewLim.contains(*label.get_position()), (
            "matplotlib draws no annotation outside the limits"
        )
    # Hard evaluation: everyone sits in a corner.
    offsets = [points.get_offsets() for points in axes.collections]
    places = np.concatenate([np.asarray(points) for points in offsets])
    assert len(places) == len(users)
    nearest = np.linalg.norm(places[:, None] - outline[None, :3], axis=-1).min(1)
    assert nearest.max() < 1e-6
    plt.close(figure)


def test_a_run_that_cannot_be_opened_is_an_error(trained: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    (run.checkpoint(run.complete_steps()[-1]) / "users.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"users\.arrow: 0 bytes"):
        write_report({"run": run}, tmp_path / "out")
