"""Length of texts against the backbone's positions, and what prepared data will be missed for, told before any work."""

import json
import logging
from pathlib import Path

import pytest

from pal_ds import UserError, prepare, train
from pal_ds.data.tables import PreparedData
from tests.tiny import LLAMA, data_keys

SHORT = {**LLAMA, "max_position_embeddings": 48}
HEAD = {"class_path": "PalA", "init_args": {"num_prototypes": 2}}


def recipe(folder: Path, **data: object) -> dict:
    keys = data_keys(folder, 30) | {"max_length": None} | data
    return {"data": keys, "backbone": {"architecture": SHORT}, "head": HEAD}


def test_a_length_that_nobody_gave_is_that_of_the_backbone(tmp_path: Path) -> None:
    assert prepare(recipe(tmp_path)).info["tokens"]["max_length"] == 48
    # Without one there is a default, as before.
    alone = {"data": {**recipe(tmp_path)["data"], "path": str(tmp_path / "alone")}}
    assert prepare(alone).info["tokens"]["max_length"] == 1024


def test_a_length_that_is_too_long_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for use in (prepare, lambda made: train(made, tmp_path / "run")):
        with pytest.raises(UserError, match=r"data.max_length: 49, and the backbone has 48 pos"):
            use(recipe(tmp_path, max_length=49))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_other_settings_are_refused_and_prepared_again_where_asked(tmp_path: Path) -> None:
    before = prepare(recipe(tmp_path, max_length=40))
    with pytest.raises(
        UserError, match=r"other settings \(data.max_length: 40 then, 48 now\).*--prepare_again"
    ):
        prepare(recipe(tmp_path))
    assert PreparedData.open(before.path).hash == before.hash
    after = prepare(recipe(tmp_path), again=True)
    assert after.info["tokens"]["max_length"] == 48
    # With the settings that made it there is nothing to do again.
    stamp = (after.path / "dataset.json").stat().st_mtime_ns
    prepare(recipe(tmp_path), again=True)
    assert (after.path / "dataset.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "pairs.jsonl"]


def test_data_that_cannot_be_made_again_stay(tmp_path: Path) -> None:
    before, other = prepare(recipe(tmp_path, max_length=40)), recipe(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(UserError):
        prepare(other, again=True)
    assert PreparedData.open(before.path).hash == before.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "pairs.jsonl"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not ours"):
        prepare(recipe(tmp_path), again=True)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "all of it"


def pairs(path: Path, num: int, **keys: object) -> None:
    rows = (
        {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} | keys for i in range(num)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("keys", "options", "said"),
    [
        ({"user_id": "ann"}, {"dev_fraction": 0.0}, "none of 20 prompts is in the split dev"),
        ({"user_id": "ann"}, {"test_fraction": 0.0}, "none of 20 prompts is in the split test"),
        (
            {"user_id": "ann"},
            {"test_fraction": 1.0, "dev_fraction": 0.0},
            "the split train: there is nothing to train on. Lower data.dev_fraction",
        ),
        ({}, {}, "no record names its user"),
        ({"user_id": "ann"}, {"unseen_user_fraction": 1e-9}, "and no user is held out"),
    ],
)
def test_what_will_be_missed_is_told_at_prepare(
    keys: dict, options: dict, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shares = {"dev_fraction": 0.3, "test_fraction": 0.3}
    made = recipe(tmp_path, **(shares | options))
    pairs(tmp_path / "pairs.jsonl", 20, **keys)
    with caplog.at_level(logging.WARNING):
        prepare(made)
    assert sum(said in message for message in caplog.messages) == 1, caplog.messages
    assert len(caplog.messages) == 1 + (options.get("test_fraction") == 1.0)


def test_a_head_of_groups_refuses_data_without(tmp_path: Path) -> None:
    made = recipe(tmp_path) | {
        "head": {"class_path": "PerDomain", "init_args": {"num_prototypes": 2}}
    }
    made["train"] = {"ds_config": "zero3_cpu"}
    with pytest.raises(UserError, match=r"no comparison of .* has a `group`"):
        train(made, tmp_path / "run")
