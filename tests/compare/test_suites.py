"""Suites as files: those that are shipped resolve, and a mistake is told with its method before anything is written."""

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from pal_ds.cli.arguments import with_shipped_files
from pal_ds.cli.main import build_parser, main
from pal_ds.cli.training_commands import suite_of
from pal_ds.compare.suite import Suite
from pal_ds.config.changes import changed_keys
from pal_ds.config.recipe import dump_recipe
from pal_ds.data.sources import UkpConvArg
from tests.compare.cases import METHODS, write_suite
from tests.spawn import ROOT

PAL_B = {"class_path": "PalB"}
SHIPPED = sorted(path.stem for path in (ROOT / "pal_ds" / "suites").glob("*.yaml"))


@functools.cache
def read(name: str, *words: str) -> Suite:
    parser = build_parser()
    given = with_shipped_files(["compare", f"--config={name}", "--out=runs/x", *words])
    parsed = parser.parse_args(given)
    return suite_of(parser.instantiate(parsed)["compare"], parsed["compare"])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_resolve(name: str) -> None:
    suite = read(name)
    settings = suite.settings
    assert suite.name == name and settings.about and settings.needs
    assert len(suite.planned) == len(suite.folds) * len(settings.methods) * len(settings.seeds)
    assert len(settings.seeds) >= 3, "fewer have no interval"
    assert not settings.few_shot or settings.num_draws >= 20
    assert len({planned.run.path for planned in suite.planned}) == len(suite.planned)
    for planned in suite.planned:
        assert planned.config.train.seed == planned.seed


def test_the_seeds_experiments_are_there() -> None:
    wanted = {"dsp_five_users", "dsp_four_domains", "persona_groups", "pets", "tldr", "prism"}
    wanted |= {
        "ultrafeedback_p2",
        "ultrafeedback_p4",
        "pick_a_pic",
        "community_alignment",
        "hh_users_alike",
    }
    of_people = {"ukp_leave_one_topic_out", "polis_held_out_votes", "polis_held_out_statements"}
    assert wanted | of_people == set(SHIPPED)
    others = ("per-group", "Bradley-Terry", "PAL-B", "LoRe")
    curves = [f"{kind}K={k}" for kind in ("", "hard-") for k in range(1, 9)]
    assert [*read("persona_groups").settings.methods] == [*curves, *others]


def test_each_topic_is_left_out_once() -> None:
    suite = read("ukp_leave_one_topic_out")
    assert len(suite.folds) == 24
    for fold in suite.folds:
        for planned in suite.of("LoRe", fold):
            source = planned.config.data.source
            assert isinstance(source, UkpConvArg) and source.test_topics == [fold]
            recipe = yaml.safe_load(planned.recipe)
            assert recipe["data"]["source"]["init_args"]["test_topics"] == [fold]
            assert recipe["data"]["path"] == planned.config.data.path == f"runs/ukp/data/{fold}"
            assert planned.run.path == Path("runs/x/runs/LoRe", fold, f"seed_{planned.seed}")
            assert recipe["train"]["seed"] == planned.seed


@pytest.mark.parametrize(
    ("name", "recipe", "may_differ"),
    [
        ("dsp_five_users", "dsp_frozen", ("backbone.cache", "head")),
        (
            "persona_groups",
            "persona_groups",
            ("backbone.cache", "head", "data.dev_", "data.test_", "data.unseen_", "data.source"),
        ),
    ],
)
def test_a_suite_trains_as_the_recipe_of_its_data(
    name: str, recipe: str, may_differ: tuple[str, ...]
) -> None:
    parser = build_parser()
    words = [f"--config={recipe}", "--head=PalA", "--run_dir=x"]
    parsed = parser.parse_args(with_shipped_files(["train", *words]))
    changed = changed_keys(dump_recipe(parsed["train"]), read(name).planned[0].recipe)
    assert [key for key in changed if not key.startswith(may_differ)] == []


def test_a_methods_keys_lie_over_the_shared_ones(tmp_path: Path) -> None:
    path = write_suite(
        tmp_path,
        head={"class_path": "PalA", "init_args": {"num_prototypes": 3, "num_layers": 1}},
        backbone={"tuning": "frozen"},
        methods={
            "shared": {},
            "K=1": {"head": {"init_args": {"num_prototypes": 1}}, "optim": {"learning_rate": 0.5}},
            "BTL": {"head": "BradleyTerry"},
        },
    )
    found = {
        planned.method: yaml.safe_load(planned.recipe)
        for planned in read(str(path), "--train.epochs=7").planned
        if planned.seed == 1
    }
    heads = {method: recipe["head"] for method, recipe in found.items()}
    assert [heads[name]["class_path"].split(".")[-1] for name in found] == [
        "PalA",
        "PalA",
        "BradleyTerry",
    ]
    assert [heads[name]["init_args"]["num_prototypes"] for name in ("shared", "K=1")] == [3, 1]
    assert heads["K=1"]["init_args"]["num_layers"] == 1
    rates = [found[name]["optim"]["learning_rate"] for name in found]
    assert rates == [0.03, 0.5, 0.03]
    assert {recipe["train"]["epochs"] for recipe in found.values()} == {7}
    assert {recipe["train"]["seed"] for recipe in found.values()} == {1}
    assert {recipe["backbone"]["cache"] for recipe in found.values()} == {"runs/x/cache"}


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"sedes": [0]}, [], "'sedes'. Did you mean seeds?"),
        ({"metods": METHODS}, [], "Did you mean methods?"),
        ({}, ["--seeds=0"], "seeds: it must be of type list, as [0,1] or [a,b]. Got value: 0"),
        ({"methods": {}}, [], "methods is empty; it must be a mapping of names to recipe keys"),
        ({"seeds": []}, [], "seeds is empty; it must be at least one number"),
        ({"seeds": [1, 1]}, [], "seeds is [1, 1]; it must be different numbers, 0 or more"),
        ({"num_draws": 0}, [], "num_draws is 0; it must be at least 1"),
        ({"reference": "BT"}, [], "reference is BT; it must be one of BTL, PAL."),
        ({"users_above": [-1]}, [], "users_above is [-1]; it must be numbers of 0 or more."),
        ({"folds": {"a": {"optim": {}}}}, [], "folds.a: must hold keys of `data` and nothing else"),
        ({"folds": {"a/b": {"data": {}}}}, [], "folds: 'a/b' names a folder"),
        (
            {"folds": {"a": {"data": {"seed": 1}}, "b": {"data": {"sead": 1}}}},
            [],
            "folds.b: does not accept option 'data.sead'. Did you mean data.seed?",
        ),
        ({"split": "train"}, [], "split: it must be one of 'dev', 'test'"),
        (
            {"methods": {**METHODS, "last": {"head": {"class_path": "PalC"}}}},
            [],
            "methods.last: head: there is no class PalC. Did you mean PalB?",
        ),
        (
            {
                "methods": {
                    **METHODS,
                    "last": {"head": {**PAL_B, "init_args": {"num_protoypes": 2}}},
                }
            },
            [],
            "methods.last: head: Option 'num_protoypes' is not accepted. Did you mean num_prototypes?",
        ),
        (
            {"methods": {**METHODS, "last": {"head": "PalA", "train": {"batch_pears": 1}}}},
            [],
            "methods.last: does not accept option 'train.batch_pears'. Did you mean train.batch_pairs?",
        ),
        (
            {"methods": {**METHODS, "last": {"head": "PalA", "train": {"epochs": 0}}}},
            [],
            "methods.last: train.epochs is 0; it must be at least 1.",
        ),
        ({"methods": {"a": {"loss": {"kind": "hinge"}}}}, [], "methods.a: has no head"),
        ({"methods": {"a": {"data": {"seed": 3}}}}, [], "methods.a: has data of its own"),
        ({"methods": {"a": {"train": {"seed": 3}}}}, [], "methods.a: sets train.seed."),
        ({"methods": {"../a": {"head": "PalA"}}}, [], "methods: '../a' names a folder"),
        ({}, ["--only=PAT"], "--only PAT: suite tiny has no such method. Did you mean PAL?"),
        ({}, ["--only=pal"], "--only pal: suite tiny has no such method. Did you mean PAL?"),
        ({}, ["--data.source.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            {"needs": "a file of yours."},
            ["--data.source.path=nowhere.jsonl"],
            "(Suite tiny needs a file of yours.)",
        ),
    ],
)
def test_mistakes(
    keys: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite, out = write_suite(tmp_path, **keys), tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["compare", f"--config={suite}", f"--out={out}", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("error: ") == 1 and message in said
    assert not out.exists() and not (tmp_path / "data").exists()


def test_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A name is that of a suite for `compare` and of a recipe elsewhere; a file of that name goes first."""
    found = with_shipped_files(["compare", "--config", "persona_groups", "--config=nothing"])
    assert found[2].endswith("pal_ds/suites/persona_groups.yaml") and found[3] == "--config=nothing"
    (found,) = with_shipped_files(["train", "--config=persona_groups"])[1:]
    assert found.endswith("pal_ds/recipes/persona_groups.yaml")
    with pytest.raises(SystemExit):
        main(["compare", "--config=dsp_five_user", f"--out={tmp_path}"])
    said = capsys.readouterr().err
    assert (
        "--config dsp_five_user: no such file" in said and "Shipped are community_alignment" in said
    )
    with pytest.raises(SystemExit):
        main(["compare", f"--out={tmp_path}", "--data.path=x"])
    assert "give --config SUITE" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["dsp_five_users", "pal_ds/suites/dsp_five_users.yaml"])
def test_a_suite_is_no_recipe(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["prepare", f"--config={ROOT / file if '/' in file else file}"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "this is a suite" in said and "pal-ds compare --config" in said
