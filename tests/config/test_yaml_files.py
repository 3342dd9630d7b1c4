"""A key that stands twice in a recipe, a suite or a run's config is an error with both lines."""

import pytest

from pal_ds.api import prepare
from pal_ds.config.recipe import load_recipe, read_recipe
from pal_ds.errors import UserError
from pal_ds.io.yaml_files import parse_yaml, read_yaml

TWICE = "data: {path: D}\noptim: {learning_rate: 0.1}\nhead: PalA\noptim:\n  betas: [0.9, 0.99]\n"


def test_both_lines_are_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TWICE)
    for read in (
        lambda: read_yaml(path),
        lambda: read_recipe([f"--config={path}"]),
        lambda: load_recipe(path),
        lambda: prepare(path),
    ):
        with pytest.raises(UserError, match=r"recipe.yaml:4: the key 'optim' stands on line 2 alr"):
            read()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: {b: 1, c: 2, b: 3}", (1, 1)),
        ("a:\n  - x: 1\n    y: 2\n    x: 3", (2, 4)),
        ("a: 1\n'a': 2", (1, 2)),
    ],
)
def test_below_and_however_written(text, lines):
    with pytest.raises(UserError, match=rf"x:{lines[1]}: the key '\w' stands on line {lines[0]} "):
        parse_yaml(text, "x")


def test_keys_of_different_places_or_merged_ones_may_be_alike():
    text = "base: &base {a: 1}\none: {<<: *base, b: 2}\ntwo: {<<: *base, b: 3, a: 4}\n1: x\n'1': y"
    content = parse_yaml(text, "x")
    assert isinstance(content, dict) and content["two"] == {"a": 4, "b": 3}


def test_commands_and_suites(tmp_path, capsys):
    from pal_ds.cli.main import main

    path = tmp_path / "suite.yaml"
    path.write_text("methods: {a: {head: PalA}, a: {head: PalB}}")
    for words in (["compare", "--out", str(tmp_path / "out")], ["prepare"]):
        with pytest.raises(SystemExit):
            main([*words, "--config", str(path)])
        assert "suite.yaml:1: the key 'a' stands on line 1 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "optim.learning_rate: 1\nseed: 2\noptim: {weight_decay: 1}",
            "x:3: the key 'optim' stands",
        ),
        ("optim: {weight_decay: 1}\noptim.learning_rate: 1", "x:2: the key 'optim.learning_rate'"),
        ("train:\n  loss: {kind: a}\n  loss.shape.k: b", "x:3: the key 'loss.shape.k' stands"),
        ("a: {true: 1, True: 2}", "x:1: the key 'True' stands on line 1 already, as 'true'"),
        ("a: {0x10: 1, 16: 2}", "x:1: the key '16' stands on line 1 already, as '0x10'"),
    ],
)
def test_one_key_in_two_spellings(text, said):
    with pytest.raises(UserError) as refused:
        parse_yaml(text, "x")
    assert str(refused.value).startswith(said)


def test_dots_in_names_of_peoples_own():
    text = (
        "methods: {pal: {}, pal.b: {}}\nhead: {init_args: {users: {a: 1, a.b: 2}}}\na.b: 1\na.c: 2"
    )
    assert parse_yaml(text, "x")


def test_a_dotted_key_beside_its_whole_is_refused_by_prepare(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {path: D}\nhead: PalA\noptim.learning_rate: 1\noptim: {weight_decay: 1}")
    with pytest.raises(UserError, match=r".yaml:4: the key .optim. stands on line 3 already"):
        prepare(path)
