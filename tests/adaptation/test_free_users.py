"""A run whose new users have directions of their own, through every command that meets them."""

import json
from pathlib import Path

import pytest
import torch

import pal_ds
from pal_ds.adaptation.result import read_report
from pal_ds.cli.main import main
from pal_ds.errors import UserError
from pal_ds.users import UserTable
from tests.spawn import run_command
from tests.tiny import LLAMA, data_options, write_pairs

NUM_PROTOTYPES, WIDTH = 2, LLAMA["hidden_size"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `run`, new users `fitted` of it, and texts of one of them and of one of the run's."""
    folder = tmp_path_factory.mktemp("free")
    pairs = write_pairs(folder / "pairs.jsonl", 120, num_users=6)
    write_pairs(folder / "new.jsonl", 24, num_users=2, seed=1)
    lines = (folder / "new.jsonl").read_text().replace('"u0"', '"new0"').replace('"u1"', '"new1"')
    (folder / "new.jsonl").write_text(lines)
    run_command(
        "train",
        *data_options(folder, pairs),
        "--data.dev_fraction=0.2",
        "--data.unseen_user_fraction=0.3",
        f"--backbone.architecture={json.dumps(LLAMA)}",
        "--head=Lore",
        f"--head.num_prototypes={NUM_PROTOTYPES}",
        "--head.mixture=free",
        "--head.length_weight=0.01",
        "--train.batch_pairs=16",
        "--train.stop_after=8",
        "--optim.learning_rate=1e-2",
        "--train.ds_config=zero0",
        f"--run_dir={folder / 'run'}",
    )
    main(
        [
            "adapt",
            f"--run_dir={folder / 'run'}",
            f"--pairs={folder / 'new.jsonl'}",
            f"--out={folder / 'fitted'}",
        ]
    )
    return folder


def test_table_holds_weights_and_directions(place: Path) -> None:
    table = UserTable.load(place / "fitted")
    assert list(table.ids) == ["new0", "new1"]
    assert table.logits.shape == (2, NUM_PROTOTYPES + WIDTH)
    assert table.logits[:, NUM_PROTOTYPES:].norm(dim=1).min() > 0
    report = read_report(place / "fitted")
    entry = report["users"]["new0"]
    assert len(entry["mixture"]) == NUM_PROTOTYPES + WIDTH
    assert entry["accuracy_before"] <= entry["accuracy_on_these_pairs"]


def test_scores_are_those_of_the_export(place: Path, tmp_path: Path) -> None:
    """`score` with the table, an export of the user, and the direction by hand agree."""
    export = tmp_path / "export"
    words = [str(place / "run"), str(export), f"--users={place / 'fitted'}", "--user=new0"]
    main(["consolidate", *words])
    texts = [{"prompt": "a b", "response": text} for text in ("c d", "e f g")]
    by_run = pal_ds.score(place / "run", texts, user="new0", users=place / "fitted")
    by_export = pal_ds.score(export, texts)
    assert by_run == pytest.approx(by_export, abs=1e-5)
    model = pal_ds.load_reward_model(export)
    assert len(model.config.mixture) == NUM_PROTOTYPES + WIDTH
    plain = pal_ds.load_reward_model(export, mixture=model.config.mixture[:NUM_PROTOTYPES])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        gap = (model(ids).logits - plain(ids).logits).abs().max()
    assert gap > 1e-4  # the direction counts
    with pytest.raises(UserError, match=f"points of {NUM_PROTOTYPES} or {NUM_PROTOTYPES + WIDTH}"):
        pal_ds.load_reward_model(export, mixture=[1.0])


def test_users_of_the_run_and_new_ones_are_scored_together(place: Path) -> None:
    figures = pal_ds.evaluate(
        place / "run", users=place / "fitted", data=place / "new.jsonl", name="new"
    )
    assert figures["adapted_users"] == 2 and figures["pairs"] == 24
    curve = pal_ds.few_shot(place / "run", [0, 2, 4], 2)["curve"]
    assert [row["num_comparisons"] for row in curve] == [0, 2, 4]


def test_solvers_that_cannot_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fitted by newton alone"):
        pal_ds.adapt(place / "run", place / "new.jsonl", tmp_path / "out", solver="adam")
