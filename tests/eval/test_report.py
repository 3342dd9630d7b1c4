"""The report of a run: a page, pictures, warnings, none without its data, and a simplex that no legend hides."""

import json
import shutil
from html.parser import HTMLParser
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
from pal_ds.eval import report_pictures as pictures
from pal_ds.eval.diagnostics import diagnose_latent
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.report import PICTURES, difference, write_report
from pal_ds.eval.results import file_request, split_request
from pal_ds.inference.load_run import open_run, restore
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import run_command
from tests.tiny import LLAMA, data_options, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """With evaluation and few-shot results; the head takes the largest logit in evaluation."""
    folder = tmp_path_factory.mktemp("report")
    pairs = write_pairs(folder / "pairs.jsonl", 96, num_users=12)
    run_command(
        "train",
        *data_options(folder, pairs),
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
        "report.html",
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
    assert pictures.reliability(axes, trained)
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
    assert pictures.prototypes(axes, trained)
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
        "mixtures.png",
        "report.html",
        "report.md",
        "simplex.png",
    ]
    assert page.count("![") == 2
    # An evaluation of strangers alone tells of the run's own users' prototypes, and has nothing to stumble over.
    run.eval.mkdir()
    strangers = evaluate_run(trained, ALONE, request=split_request("unseen_test"))
    (run.eval / "test.json").write_text(json.dumps({**strangers, "warnings": []}))
    more = write_report({"run": run}, tmp_path / "out").read_text()
    # The day and time of two reports may differ, of a kept evaluation the newest file.
    kept = (one.partition("## Users in")[2] for one in (more, page))
    assert next(kept).replace(_section("prototypes"), "") == next(kept)


def _section(name: str) -> str:
    return f"\n## {PICTURES[name]}\n\n![{PICTURES[name]}]({name}.png)\n"


class _Text(HTMLParser):
    """The page as a browser reads it: its elements, what they ask for, and its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_one_file_and_takes_no_name_for_markup(
    trained: RunDirectory, tmp_path: Path
) -> None:
    name = "<script>alert('x')</script> & $x_"
    write_report({name: trained, "other": trained}, tmp_path / "out")
    page = _Text((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags and name in page.words
    assert page.tags.count("img") == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "num_prototypes: 3" in page.words and open_run(trained).data.hash in page.words


def test_runs_are_compared_by_user_where_the_pairs_are_the_same(
    trained: RunDirectory, tmp_path: Path
) -> None:
    worse, better = (
        RunDirectory(shutil.copytree(trained.path, tmp_path / name)) for name in ("worse", "better")
    )
    figures = json.loads((trained.eval / "test.json").read_text())
    for run, gains in ((worse, (0.0, 0.0)), (better, (0.3, 0.1))):
        for number, user in enumerate(figures["users"].values()):
            user["accuracy"] = 0.5 + gains[number % 2]
        (run.eval / "test.json").write_text(json.dumps(figures))
    num = len(figures["users"])
    change = np.asarray([0.1 if number % 2 else 0.3 for number in range(num)])
    page = write_report({"a": worse, "b": better}, tmp_path / "out").read_text()
    assert f"| b - a | {num} | {difference(change)} |" in page
    # Of other users the pairs are others.
    figures["users"].popitem()
    (better.eval / "test.json").write_text(json.dumps(figures))
    page = write_report({"a": worse, "b": better}, tmp_path / "out").read_text()
    assert "Differences" not in page


def test_a_run_with_nothing_to_show_leaves_no_blank_panel(
    trained: RunDirectory, tmp_path: Path
) -> None:
    bare = RunDirectory(
        shutil.copytree(trained.path, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    )
    write_report({"a": trained}, tmp_path / "one")
    write_report({"a": trained, "bare": bare}, tmp_path / "two")
    one, two = (plt.imread(tmp_path / folder / "users.png") for folder in ("one", "two"))
    assert np.array_equal(one, two)


def test_users_lie_where_the_head_puts_them_and_the_legend_beside(trained: RunDirectory) -> None:
    users = restore(trained).users
    groups: dict[str, str | None] = {user: f"group {row % 4}" for row, user in enumerate(users.ids)}
    groups[users.ids[0]] = None
    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    assert pictures.simplex(axes, open_run(trained), groups)
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


def test_what_a_prototype_prefers_is_told_in_the_texts_of_the_data(
    trained: RunDirectory, tmp_path: Path
) -> None:
    """Each example is a comparison of the split, and its margins those of users who are all one prototype."""
    figures = json.loads((trained.eval / "test.json").read_text())
    examples = figures["prototype_examples"]
    assert [len(of_one) for of_one in examples] == [3, 3, 3]
    lines = (trained.path.parent / "pairs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    pairs = {frozenset((one["chosen"], one["rejected"])) for one in records}
    told = [one for of_one in examples for one in of_one]
    assert all(frozenset((one["likes_more"], one["than"])) in pairs for one in told)
    assert all(one["margin"] > one["mean_margin"] for one in told)
    page = write_report({"a": trained}, tmp_path / "out").read_text()
    assert "## What the prototypes of a prefer" in page
    clearest = examples[1][0]
    margins = f"{clearest['margin']:+.2f} ({clearest['mean_margin']:+.2f})"
    assert f"| 2 | {clearest['prompt']} | {clearest['likes_more']} |" in page and margins in page


def test_examples_of_prototypes_are_left_out_where_asked(
    trained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pal_ds.api import evaluate
    from pal_ds.cli.main import main

    usual = json.loads((trained.eval / "test.json").read_text())
    out = tmp_path / "out"
    words = ["evaluate", f"--run_dir={trained.path}", f"--out={out}"]
    for name, num in (("none", 0), ("few", 1)):
        main([*words, f"--name={name}", f"--num_example_pairs={num}"])
    none, few = (json.loads((out / f"{name}.json").read_text()) for name in ("none", "few"))
    assert "prototype_examples" not in none and none.keys() | {"prototype_examples"} == usual.keys()
    assert [len(of_one) for of_one in few["prototype_examples"]] == [1, 1, 1]
    assert none["accuracy"] == usual["accuracy"] == few["accuracy"]
    run = shutil.copytree(trained.path, tmp_path / "run")
    assert "prototype_examples" not in evaluate(run, num_example_pairs=0)
    capsys.readouterr()
    for more in (["--num_example_pairs=-1"], ["--best_of_n", "--num_example_pairs=0"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert stop.value.code == 2 and "--num_example_pairs" in capsys.readouterr().err


def test_texts_of_people_make_no_markdown(trained: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    figures = json.loads((run.eval / "test.json").read_text())
    figures["prototype_examples"][0][0]["prompt"] = "![x](http://a.example/x)\n<b>|`"
    (run.eval / "test.json").write_text(json.dumps(figures))
    page = write_report({"a": run}, tmp_path / "out").read_text()
    assert r"| 1 | !\[x\](http://a.example/x) \<b>\|\` |" in page


def test_margins_are_drawn_as_counted(trained: RunDirectory) -> None:
    counted = json.loads((trained.eval / "test.json").read_text())["margins"]
    figure, axes = plt.subplots()
    assert pictures.margins(axes, trained)
    assert [bar.get_height() for bar in axes.patches] == counted["pairs"]  # type: ignore[attr-defined]
    plt.close(figure)


def test_the_report_says_what_code_trained_the_run(trained: RunDirectory, tmp_path: Path) -> None:
    facts = trained.installation()
    assert facts["code of pal_ds"] and facts["started"]
    page = write_report({"a": trained}, tmp_path / "out").read_text()
    assert f"| {facts['version of pal_ds']} {facts['commit of pal_ds'] or ''}".rstrip() in page


@pytest.mark.parametrize("content", ["", "[]", '{"pairs": 3}', '{"pairs": 3, "acc'])
def test_a_damaged_evaluation_is_named(trained: RunDirectory, tmp_path: Path, content: str) -> None:
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    (run.eval / "test.json").write_text(content)
    with pytest.raises(UserError, match=r"test\.json: cannot be read .* Evaluate again\."):
        write_report({"a": run}, tmp_path / "out")


def test_pairs_from_elsewhere_do_not_take_the_place_of_a_split(tmp_path: Path) -> None:
    for name in ("test", None):
        with pytest.raises(UserError, match=r"eval/test\.json, .* Give another --name"):
            file_request(tmp_path / "test.jsonl", name)
    assert file_request(tmp_path / "test.jsonl", "own").name == "own"


@pytest.mark.parametrize("content", ["", "[]", '{"started": 3}'])
def test_a_damaged_record_of_the_start_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "installation.json").write_text(content)
    with pytest.raises(UserError, match=r"installation\.json.*Delete it"):
        RunDirectory(tmp_path).installation()


def test_signs_that_the_font_has_not_are_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    figure, axes = plt.subplots()
    axes.set_title("\U0001f600 Zo\u00eb")
    pictures.save_figure(figure, tmp_path / "a.png")
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    assert (tmp_path / "a.png").is_file()
