"""A run that starts from another (`train.init_from`) starts with its backbone, its head and its users, and no more."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pal_ds.compare.runs import check_everything
from pal_ds.compare.suite import PlannedRun, Suite, SuiteConfig
from pal_ds.config.recipe import load_recipe
from pal_ds.config.run_config import TrainConfig
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.forget import forget_user
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.errors import UserError
from pal_ds.eval.figures import figures_of
from pal_ds.export import ExportOptions, export
from pal_ds.heads import PalA
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.scoring import Forwards
from pal_ds.modeling.build import assemble
from pal_ds.modeling.lengths import data_to_prepare
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.evaluation import open_eval_sets
from pal_ds.training.init_from.copy import _table, load_taken_over, take_over
from pal_ds.training.init_from.origin import OriginUsers
from pal_ds.training.state import ids_of_table, seen_users
from pal_ds.users import UserTable
from pal_ds.users.ids import UserIds
from tests.near import margin_bound, room
from tests.same_run import assert_same_step, figures
from tests.spawn import run_ranks
from tests.tiny import write_pairs
from tests.tiny_run import TinyRun
from tests.training.init_from.stages_worker import recipe


class Stages(NamedTuple):
    """Runs by name, and the data: `other` has the users of `data` in another order, and new ones."""

    out: Path
    data: Path
    other: Path
    base: Path

    def step(self, name: str) -> Path:
        run = RunDirectory(self.out / name)
        return run.checkpoint(run.complete_steps()[-1])


def prepared(folder: Path, name: str, tokenizer: Path | None, **options: Any) -> Path:
    pairs = write_pairs(folder / f"{name}.jsonl", 64, **options)
    # Backwards, so that users have other rows than in the data of before.
    pairs.write_text("".join(reversed(pairs.read_text().splitlines(keepends=True))))
    source = Jsonl(str(pairs))
    settings = {"max_length": 64, "vocab_size": 400, "dev_fraction": 0.2, "test_fraction": 0}
    chosen = None if tokenizer is None else str(tokenizer)
    config = DataConfig(path=str(folder / name), source=source, tokenizer=chosen, **settings)
    return prepare(config, quiet=True).path


@pytest.fixture(scope="module")
def stages(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    out = tmp_path_factory.mktemp("stages")
    other = prepared(out, "other", tiny_run.data / "tokenizer", seed=3, num_users=5)
    arguments = ("tests.training.init_from.stages_worker", out, tiny_run.data, other, tiny_run.base)
    run_ranks(2, *arguments)
    with_users = ExportOptions(quiet=True, with_users=True)
    export(RunDirectory(out / "adapted"), out / "adapted.out", with_users)
    export(RunDirectory(out / "base"), out / "base.out", ExportOptions(quiet=True))
    run_ranks(1, *arguments)
    return Stages(out, tiny_run.data, other, tiny_run.base)


def tensors(step: Path, prefix: str) -> dict[str, torch.Tensor]:
    checkpoint = ShardedCheckpoint(step)
    return {name: checkpoint.tensor(name) for name in checkpoint.names if name.startswith(prefix)}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def margins(run: Path, data: Path) -> np.ndarray:
    """Of the first user's mixture: what backbone and head make of the comparisons of `data`."""
    restored = restore(RunDirectory(run))
    rows = np.arange(12)
    collator = replace(restored.parts.collator, data=PreparedData.open(data))
    collator = replace(collator, table_rows=np.zeros(len(collator.data.users), np.int64))
    mixtures = user_mixtures(restored.model.head, restored.users)
    mixtures = torch.full_like(mixtures, 1 / mixtures.shape[1])
    alone = World(0, 1, torch.device("cpu"))
    return Forwards(restored.model, collator, 4, alone).margins(rows, mixtures)


def test_weights_and_head_go_on_to_the_bit(stages: Stages) -> None:
    for part in ("backbone.", "head."):
        before, after = (tensors(stages.step(name), part) for name in ("base", "general"))
        assert_equal(before, after)


def test_another_head_starts_afresh_on_the_same_backbone(stages: Stages) -> None:
    assert_equal(
        tensors(stages.step("base"), "backbone."), tensors(stages.step("customised"), "backbone.")
    )
    origin = json.loads((stages.out / "customised/init/origin.json").read_text())
    assert origin["head"] is None and origin["users"] == 0


def test_another_shape_starts_the_head_afresh(stages: Stages, tmp_path: Path, caplog: Any) -> None:
    run = RunDirectory(tmp_path / "wide")
    config = recipe(str(stages.other), "wide", "full", str(stages.out / "adapted"), None)
    assert take_over(config, PreparedData.open(stages.other), run, trust=False)
    origin = json.loads(run.origin_file.read_text())
    assert origin["head"] is None and origin["users"] == 0
    assert "of its head is (3, " in caplog.text and "start afresh" in caplog.text


@pytest.mark.parametrize("name", ["onward", "alone", "of_export"])
def test_adapters_are_merged_and_the_head_goes_on(stages: Stages, name: str) -> None:
    """LoRA at two ranks to LoRA at two, and to full weights at one rank, from the run and from its export."""
    wanted = margins(stages.out / "adapted", stages.other)
    assert np.ptp(wanted) > 1e-2
    found = margins(stages.out / name, stages.other)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(margins(stages.out / "base", stages.other) - wanted).max() > 1e-2


def test_a_stock_export_gives_backbone_and_head(stages: Stages) -> None:
    wanted = margins(stages.out / "base", stages.other)
    found = margins(stages.out / "of_stock", stages.other)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["onward", "of_export"])
def test_users_in_both_keep_their_mixture(stages: Stages, name: str) -> None:
    before, after = (UserTable.load(stages.step(run)) for run in ("adapted", name))
    shared = [user for user in after.ids if user in before]
    new = [user for user in after.ids if user not in before]
    assert len(shared) >= 2 and new
    theirs, ours = before.mixtures()[before.rows(shared)], after.mixtures()[after.rows(shared)]
    assert torch.allclose(theirs, ours, atol=1e-6)
    fresh = UserTable(3, [*shared, *new], after.config)
    fresh.config = replace(fresh.config, init_std=1.0)
    unlike = UserTable(3, shared, fresh.config).mixtures()
    assert (unlike - ours).abs().max() > 1e-2
    like = UserTable(3, new, fresh.config).mixtures()
    assert torch.allclose(like, after.mixtures()[after.rows(new)], atol=1e-6)
    origin = json.loads((stages.out / name / "init/origin.json").read_text())
    assert origin["users"] == len(shared) and origin["head"] == "PalA"


def test_a_frozen_backbone_is_named_not_copied(stages: Stages, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "from_frozen")
    config = recipe(str(stages.data), "pal", "frozen", str(stages.out / "frozen"), None)
    data = PreparedData.open(stages.data)
    assert take_over(config, data, run, trust=False)
    assert run.initial_backbone() == str(stages.base)
    assert not (run.init / "backbone").exists()
    head = load_file(run.init / "head.safetensors")
    assert_equal(
        tensors(stages.step("frozen"), "head."), {f"head.{name}": head[name] for name in head}
    )
    parts = assemble(config, data, run)
    assert parts.backbone is not None and parts.backbone.path == str(stages.base)


def test_a_resumed_run_needs_its_origin_no_more(stages: Stages) -> None:
    """The origin was deleted between the two starts; the run is, bit for bit, the one that never stopped."""
    assert not (stages.out / "leaving").exists()
    assert assert_same_step(stages.step("whole"), stages.step("stopped")) >= 8
    assert figures(stages.out / "stopped") == figures(stages.out / "whole")


def test_the_manifest_says_what_it_came_from(stages: Stages) -> None:
    said = json.loads((stages.step("onward") / "manifest.json").read_text())["init_from"]
    source = json.loads((stages.step("adapted") / "manifest.json").read_text())
    assert said["path"] == str(stages.out / "adapted") and said["kind"] == "run"
    assert (said["step"], said["hash"]) == (source["step"], source["checksum"])
    of_export = json.loads((stages.step("of_export") / "manifest.json").read_text())["init_from"]
    assert of_export["kind"] == "export" and of_export["hash"].startswith("sha256:")


def test_other_sets_are_scored_from_the_start_on(stages: Stages) -> None:
    """Nothing moves at a rate of 0: before and after are what the origin makes of that set's dev split."""
    rows = [row for row in figures(stages.out / "general") if "dev_accuracy" in row]
    assert [row["step"] for row in rows] == [0]
    other = PreparedData.open(stages.other)
    dev = other.rows("dev")
    restored = restore(RunDirectory(stages.out / "base"))
    collator = replace(restored.parts.collator, data=other)
    collator = replace(collator, table_rows=np.full(len(other.users), -1))
    alone = World(0, 1, torch.device("cpu"))
    forwards = Forwards(restored.model, collator, 4, alone)
    found, rewards = (read(dev, torch.ones(1, 1)) for read in (forwards.margins, forwards.rewards))
    # The run had two ranks: a margin within rounding of a tie may have turned.
    most = room(found, margin_bound(rewards), (1.0, 1.0)).accuracy
    wanted = figures_of(other, dev, found)["accuracy"]
    assert rows[0]["kept_accuracy"] == pytest.approx(wanted, abs=most)
    assert rows[0]["kept_pairs"] == len(dev) != rows[0]["dev_pairs"]
    assert RunDirectory(stages.out / "general").pointer("best") is None


def test_a_stage_tells_what_it_keeps(stages: Stages) -> None:
    for name in ("whole", "stopped"):
        rows = [row for row in figures(stages.out / name) if "general_accuracy" in row]
        assert rows[0]["step"] == 0 and all("dev_accuracy" in row for row in rows)
    frozen = figures(stages.out / "frozen")[0]
    assert frozen["step"] == 0 and {"dev_accuracy", "kept_accuracy"} <= frozen.keys()


def test_sets_that_cannot_be_scored_are_refused(stages: Stages, tmp_path: Path) -> None:
    data = PreparedData.open(stages.data)
    collator, ids = Collator(data), UserIds.of(data.users)
    strange = prepared(tmp_path, "strange", None, seed=8, num_prompts=3)
    with pytest.raises(UserError, match=r"train\.eval_sets\.x: .*its tokenizer is not the one"):
        open_eval_sets({"x": str(strange)}, data, collator, ids)
    with pytest.raises(UserError, match=r"no such file, so .* holds no prepared data"):
        open_eval_sets({"x": str(tmp_path)}, data, collator, ids)
    with pytest.raises(UserError, match=r"train\.eval_sets is dev; it must be names"):
        TrainConfig(eval_sets={"dev": "x"})


def test_refusals_name_what_differs(stages: Stages, tmp_path: Path) -> None:
    def refused(origin: Path, data: Path, run: Path = tmp_path / "new") -> str:
        config = recipe(str(data), "pal", "full", str(origin), None)
        with pytest.raises(UserError) as refusal:
            take_over(config, PreparedData.open(data), RunDirectory(run), trust=False)
        return str(refusal.value)

    strange = prepared(tmp_path, "strange", None, seed=8, num_prompts=3)
    for origin in ("adapted", "adapted.out", "base.out"):
        said = refused(stages.out / origin, strange)
        assert re.search(r"tokenizer is not the one .* token '.*' is id \d+ there and ", said)
        assert "Prepare the data with data.tokenizer: " in said
    assert "holds neither config.yaml" in refused(tmp_path, stages.other)
    vectors = tmp_path / "vectors.jsonl"
    row = {"user_id": "a", "response_features": [[0.1, 0.7], [0.4, 0.2]], "y": -1}
    vectors.write_text(
        "".join(json.dumps({**row, "prompt_features": [i, 0]}) + "\n" for i in range(8))
    )
    flat = prepare(DataConfig(path=str(tmp_path / "flat"), source=Jsonl(str(vectors))), quiet=True)
    assert "learned from texts" in refused(stages.out / "adapted", flat.path)
    (tmp_path / "taken" / "init").mkdir(parents=True)
    assert "that pal_ds did not write" in refused(
        stages.out / "adapted", stages.other, tmp_path / "taken"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("origin", ["adapted", "adapted.out"])
def test_the_length_of_texts_is_the_origins_unless_it_is_given(
    stages: Stages, tmp_path: Path, origin: str
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    config = recipe(str(stages.other), "pal", "full", str(stages.out / origin), None)
    config = replace(config, data=replace(config.data, source=Jsonl(str(pairs)), max_length=None))
    assert data_to_prepare(config).max_length == 64
    given = replace(config, data=replace(config.data, max_length=48))
    assert data_to_prepare(given).max_length == 48


def test_a_damaged_export_is_named(stages: Stages, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(stages.out / "base.out", tmp_path / "damaged")
    weights = next((tmp_path / "damaged").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    config = recipe(str(stages.other), "bt", "full", str(tmp_path / "damaged"), None)
    with pytest.raises(UserError, match=r"does not match the hash in export\.json"):
        take_over(
            config, PreparedData.open(stages.other), RunDirectory(tmp_path / "new"), trust=False
        )


def test_forgotten_users_leave_what_the_run_started_from(stages: Stages) -> None:
    run = RunDirectory(stages.out / "onward")
    user = UserTable.load(run.init).ids[0]
    forget_user(run, user)
    assert user not in UserTable.load(run.init)
    # Rows of the others have moved: a resumed run must not go on with them.
    config, data = load_recipe(run.config_file), PreparedData.open(stages.other)
    head = assemble(config, data, run).head
    table, _, _ = seen_users(config, data, head, World(0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match=f"user '{user}' was removed from this run"):
        load_taken_over(config, run, head, table)


def test_a_comparison_checks_a_stage_before_anything_is_taken_over(
    stages: Stages, tmp_path: Path
) -> None:
    run, data = RunDirectory(tmp_path / "run"), PreparedData.open(stages.other)
    for origin, kind in (("base", "full"), ("frozen", "frozen")):
        config = recipe(str(stages.other), "pal", kind, str(stages.out / origin), None)
        planned = PlannedRun("stage", 0, config, "", run)
        settings = SuiteConfig(methods={"stage": {}}, split="dev")
        suite = Suite("stages", settings, [planned], tmp_path / "out")
        assert [method for _, method in check_everything(suite, {"": data})] == ["stage"]
    assert not run.path.exists()


def test_the_generic_user_keeps_a_row_where_users_are_taken_over(
    stages: Stages, tmp_path: Path
) -> None:
    run, data = RunDirectory(tmp_path / "new"), PreparedData.open(stages.other)
    config = recipe(str(stages.other), "pal", "full", str(stages.out / "adapted"), None)
    config = replace(config, users=replace(config.users, generic_fraction=0.5))
    assert take_over(config, data, run, trust=False)
    head = assemble(config, data, run).head
    table, _, generic_row = seen_users(config, data, head, World(0, 1, torch.device("cpu")))
    load_taken_over(config, run, head, table)
    assert table.ids[generic_row] == "population"


def test_reliability_of_users_whom_both_know_is_taken_over(
    stages: Stages, caplog: pytest.LogCaptureFixture
) -> None:
    data = PreparedData.open(stages.data)
    config = recipe(str(stages.data), "pal", "full", None, str(stages.base))
    config = replace(config, users=replace(config.users, reliability="learnt"))
    ids = ids_of_table(config, data)
    known = OriginUsers(UserIds.of(ids[1:]), torch.ones(len(ids) - 1, 3), torch.tensor([0.5, -1.0]))
    for log_reliability in (known.log_reliability, None):
        users = known._replace(log_reliability=log_reliability)
        origin: Any = SimpleNamespace(path="a run", users=lambda _, users=users: users)
        taken = _table(config, data, PalA(32, 3), origin)
        assert taken is not None
        table, num_known = taken
        assert num_known == len(ids) - 1
        expected = [0.0] * len(ids) if log_reliability is None else [0.0, 0.5, -1.0]
        assert table.log_reliability.tolist() == expected
    assert "a run: says nothing of users' reliability, which starts afresh" in caplog.text
