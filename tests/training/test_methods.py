"""Each method beyond PAL through the same trainer: any world size, evaluation, new users, export."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.adaptation.few_shot import few_shot_curve
from pal_ds.data.splits import SPLITS
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import file_request, split_request
from pal_ds.export import ExportOptions, export, export_users
from pal_ds.export.audience import choose_audience
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import list_users
from pal_ds.inference.readers import known_users
from pal_ds.reward_models import load_reward_model
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.training.method_cases import METHODS
from tests.warm import WarmParent

CASES = "tests.training.method_cases:"
ALONE = World(0, 1, torch.device("cpu"))
ENCODED = ("vpl", "spl", "mrm", "vrf")
PERSONAL = (*ENCODED, "lore", "per_domain")


@pytest.fixture(scope="module")
def place(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "place"
    warm(f"{CASES}make_place", folder)
    return folder


@pytest.fixture(scope="module")
def trained(warm: WarmParent, place: Path) -> dict[str, Any]:
    return {method: warm(f"{CASES}train", place, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_and_two_train_alike(trained: dict[str, Any], method: str) -> None:
    """Contexts, noise and the generic user's share belong to a comparison, not to the rank that computes it."""
    one, two = trained[method]["1"], trained[method]["2"]
    assert len(one["losses"]) >= 20 and np.ptp(one["losses"]) > 1e-3
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=2e-3)
    np.testing.assert_allclose(one["losses"][0], two["losses"][0], rtol=1e-5)
    assert one["users"] == two["users"]


@pytest.mark.parametrize("method", METHODS)
def test_taste_is_learnt_where_there_can_be_any(trained: dict[str, Any], method: str) -> None:
    """Half of the users like what the other half does not: who knows no users stays at chance."""
    accuracy = trained[method]["1"]["dev"]
    if method in PERSONAL:
        assert accuracy > 0.9
    elif method in ("mean_variance", "categorical"):
        assert abs(accuracy - 0.5) < 0.35


def test_the_generic_user_stands_for_strangers(trained: dict[str, Any], place: Path) -> None:
    assert trained["lore"]["1"]["users"]["logits"] == [5, 3]
    assert trained["vpl"]["1"]["users"]["logits"] == [4, 8]
    restored = restore(RunDirectory(place / "lore_1"))
    generic = restored.users.logits[restored.users.rows(["population"])].softmax(1)
    known = known_users(restored, None)
    torch.testing.assert_close(known.mixtures[-1:], generic)
    # Trained on both tastes alike, unlike the four others' mean by chance alone.
    assert not torch.allclose(known.mixtures[:-1].mean(0, keepdim=True), generic, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", PERSONAL)
def test_evaluation_finds_what_training_found(
    trained: dict[str, Any], place: Path, method: str
) -> None:
    run = RunDirectory(place / f"{method}_1")
    assert (
        evaluate_run(run, ALONE, request=split_request("dev"))["accuracy"]
        == trained[method]["1"]["dev"]
    )


@pytest.mark.parametrize("method", [*ENCODED, "lore"])
def test_new_users_join_from_comparisons(
    warm: WarmParent, trained: dict[str, Any], place: Path, method: str
) -> None:
    run, out, pairs = place / f"{method}_1", place / f"{method}_users", place / "new.jsonl"
    told = warm(
        f"{CASES}run_commands",
        place,
        [
            ["adapt", f"--run_dir={run}", f"--pairs={pairs}", f"--out={out}"],
            ["evaluate", f"--run_dir={run}", f"--data={pairs}", f"--users={out}", "--name=new"],
            ["evaluate", f"--run_dir={run}", f"--data={pairs}", "--name=strangers"],
        ],
    )
    assert [part["code"] for part in told] == [0, 0, 0], told
    known = json.loads((run / "eval" / "new.json").read_text())
    unknown = json.loads((run / "eval" / "strangers.json").read_text())["unknown_users"]
    assert known["pairs"] == unknown["pairs"] == 16
    assert known["adapted_users"] == 2
    assert known["accuracy"] > 0.9 > 0.8 > unknown["accuracy"]


@pytest.mark.parametrize("method", PERSONAL)
def test_exports_score_for_the_point_they_are_given(
    trained: dict[str, Any], place: Path, method: str
) -> None:
    """The export itself checks its scores against the run's; here other points give other scores."""
    run, out = RunDirectory(place / f"{method}_1"), place / f"{method}_export"
    facts = export(run, out, ExportOptions(quiet=True))
    assert facts["head"] == METHODS[method]["head"]["class_path"]
    width = len(facts["mixture"])
    corner = [1.0] + [0.0] * (width - 1)
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = [
            load_reward_model(out, mixture=point)(ids, torch.ones_like(ids)).logits
            for point in (None, corner)
        ]
    assert scores[0].shape == (2, 1) and not torch.allclose(*scores)


def test_a_group_has_a_model_of_its_own(
    warm: WarmParent, trained: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """By name, exported or scored from the run: each likes the answers of its own group."""
    run, texts = place / "per_domain_1", tmp_path / "texts.jsonl"
    long = "Well, tea is something one could talk about for hours 3."
    answers = ["Tea is fine 3.", long]
    rows = [{"prompt": "About tea 3?", "response": answer} for answer in answers]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for group in ("brief", "wordy"):
        facts = export(RunDirectory(run), tmp_path / group, ExportOptions(group=group, quiet=True))
        assert facts["audience"] == f"the group {group}" and sum(facts["mixture"]) == 1
        out = [f"--input={texts}", f"--output={tmp_path / group}.jsonl"]
        lines = [
            ["score", f"--model={tmp_path / group}", *out],
            ["score", f"--run_dir={run}", f"--group={group}", *out],
        ]
        for line in lines:
            told = warm(f"{CASES}run_commands", place, [line])
            assert told[0]["code"] == 0, told
            scored = (tmp_path / f"{group}.jsonl").read_text().splitlines()
            found.setdefault(group, []).append([json.loads(row)["score"] for row in scored])
        np.testing.assert_allclose(*found[group], rtol=1e-5)
    assert found["brief"][0][0] > found["brief"][0][1]
    assert found["wordy"][0][0] < found["wordy"][0][1]
    head = restore(RunDirectory(run)).model.head
    wrong = {
        "no such group (did you mean 'brief'?)": {"group": "breif", "groups": ["brief", "wordy"]},
        "--user and --group are 2 answers": {"user": "a", "group": "brief"},
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            choose_audience(head, UserTable(2, ["a"]), **options)
    lore = restore(RunDirectory(place / "lore_1")).model.head
    with pytest.raises(UserError, match="does not ask for the group"):
        choose_audience(lore, UserTable(3, ["a"]), group="brief")


@pytest.mark.parametrize("method", ENCODED)
def test_contexts_are_flipped_of_users_who_have_them(
    trained: dict[str, Any], place: Path, tmp_path: Path, method: str
) -> None:
    """Whoever else is scored beside them: an adapted user's point is not made again."""
    run = RunDirectory(place / f"{method}_1")
    width = restore(run).model.head.num_prototypes
    UserTable(width, ["x", "y"]).save(tmp_path / "users")
    own, new = ((place / f"{name}.jsonl").read_text() for name in ("pairs", "new"))
    found = {}
    for name, text, users in (("own", own, None), ("both", own + new, tmp_path / "users")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(text)
        found[name] = evaluate_run(run, ALONE, users=users, request=file_request(file))
    assert found["both"]["pairs"] == found["own"]["pairs"] + 16
    assert found["both"]["context_flip"]["all"] == found["own"]["context_flip"]["all"] > 0.5


@pytest.mark.usefixtures("one_thread")
def test_groups_of_new_users_are_known(trained: dict[str, Any], place: Path) -> None:
    """A head that asks for groups serves a stranger as it does everybody, after any number of comparisons."""
    restored = restore(RunDirectory(place / "per_domain_1"))
    table, rows = np.array(restored.data.comparisons), restored.data.rows("dev")
    table["split"][rows] = SPLITS.index("unseen_test")
    table["split"][restored.data.rows("train")] = SPLITS.index("unseen_train")
    data = replace(restored.data, comparisons=table)
    curve = few_shot_curve(replace(restored, data=data), [0, 2], ALONE)
    assert [row["accuracy"] for row in curve.rows] == [trained["per_domain"]["1"]["dev"]] * 2
    with pytest.raises(UserError, match="asks for the group of a comparison"):
        known_users(restored, place / "vpl_users")


def test_each_adapted_user_has_a_folder(
    trained: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Points of a head that reads contexts come from the table that `adapt` leaves; the run's own table has none."""
    table = UserTable(8, ["x"])
    table.logits.fill_(0.5)
    table.save(tmp_path / "users")
    run, options = RunDirectory(place / "vpl_1"), ExportOptions(quiet=True)
    adapted = replace(options, users_dir=tmp_path / "users")
    export_users(run, tmp_path / "out", ["x"], adapted)
    facts = json.loads((tmp_path / "out" / "x" / "export.json").read_text())
    assert facts["mixture"] == [0.5] * 8
    with pytest.raises(UserError, match="Run `adapt`"):
        export_users(run, tmp_path / "other", ["a"], options)
    export(run, tmp_path / "whole", replace(adapted, with_users=True))
    assert json.loads((tmp_path / "whole" / "users.jsonl").read_text()) == {
        "user_id": "x",
        "mixture": [0.5] * 8,
    }


def test_a_context_is_no_row_of_the_table(
    warm: WarmParent, trained: dict[str, Any], place: Path
) -> None:
    """Scores for a user of the run need comparisons, or a group: the message names the way."""
    (place / "texts.jsonl").write_text('{"prompt": "About tea?", "response": "Tea is fine."}\n')
    lines = [
        ["score", f"--run_dir={place}/{name}_1", "--user=a", f"--input={place}/texts.jsonl"]
        for name in ("vpl", "per_domain")
    ]
    listed = list_users(RunDirectory(place / "vpl_1"))
    assert listed == [{"user_id": user, "mixture": None} for user in "abcd"]
    told = warm(f"{CASES}run_commands", place, lines)
    assert [part["code"] for part in told] == [2, 2]
    assert "Run `adapt`" in told[0]["said"] and "Give --group" in told[1]["said"]
