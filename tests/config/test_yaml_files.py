"""A key that stands twice in a recipe, a suite or a run's config is an error with both lines."""

from pathlib import Path

import pytest

from pal_ds.api import prepare
from pal_ds.config.recipe import load_recipe, read_recipe, recipe_from_arguments
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


ODD = ["010", "-017", "1:30", "1_0", "0b11", "1_0.5", "190:20:30.15", "1_0e1"]


@pytest.mark.parametrize("number", ODD)
def test_numbers_that_others_read_otherwise_are_refused(number, tmp_path, capsys):
    from pal_ds.cli.main import main

    path = tmp_path / "recipe.yaml"
    text = "head: PalA\n# a comment\ndata:\n  path: D\n  test_fraction: "
    path.write_text(text + number)
    said = f"recipe.yaml:5: data.test_fraction: {number} is another number"
    for read in (
        lambda: read_yaml(path),
        lambda: read_recipe([f"--config={path}"]),
        lambda: load_recipe(path),
        lambda: prepare(path),
    ):
        with pytest.raises(UserError, match=said):
            read()
    with pytest.raises(SystemExit):
        main(["prepare", "--config", str(path)])
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="test_fraction"):
        read_recipe(["--head=PalA", "--data.path=D", f"--data.test_fraction={number}"])


def test_odd_numbers_as_keys_in_lists_and_in_files_of_groups(tmp_path):
    for text in ("a: [1, 010]", "a:\n  010: x", "a: {b: &c 010, d: *c}"):
        with pytest.raises(UserError, match=r"x:\d: a[.\w]*: 010 is another"):
            parse_yaml(text, "x")
    (tmp_path / "optim.yaml").write_text("learning_rate: 1_0")
    words = ["--head=PalA", "--data.path=D"]
    with pytest.raises(UserError, match="1_0"):
        read_recipe([*words, f"--optim={tmp_path}/optim.yaml"])


def test_numbers_of_plain_digits_and_texts_in_quotes_are_read(tmp_path):
    numbers = "[0, -3, 10, 0.5, .5, 5., 1.e3, 1.0e-3, 1e-3, 0x10, 00.5, 2001-01-01]"
    assert parse_yaml(f"a: {numbers}\nb: '010'\nc: \"1:30\"\nd: 10:ab\ne: a_1", "x")
    path = tmp_path / "recipe.yaml"
    path.write_text("head: PalA\ndata: {path: '010', test_fraction: 1e-1, separator: '1:30'}")
    config, resolved = read_recipe([f"--config={path}"])
    assert (config.data.path, config.data.separator) == ("010", "1:30")
    (tmp_path / "config.yaml").write_text(resolved)
    assert load_recipe(tmp_path / "config.yaml").data.separator == "1:30"


def test_a_text_on_the_command_line_has_any_spelling():
    words = ["--head=PalA", "--data.path=010", "--data.separator=1:30"]
    config, _ = read_recipe(words)
    assert (config.data.path, config.data.separator) == ("010", "1:30")


def _nested_aliases(levels: int) -> str:
    """Lists of nine aliases each of the list before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("levels", [4, 9, 200])
def test_aliases_that_make_far_more_of_a_file_are_refused(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(_nested_aliases(levels))
    with pytest.raises(UserError, match=r"recipe\.yaml: aliases \(\*NAME\) make [\d,]+ values of"):
        read_yaml(path)
    with pytest.raises(UserError, match="aliases"):
        recipe_from_arguments([f"--config={path}", "--head=BradleyTerry"])
    with pytest.raises(UserError, match="aliases"):
        recipe_from_arguments(["--head=BradleyTerry", f"--data={_nested_aliases(levels)}"])


def test_a_few_aliases_are_read_and_one_of_itself_is_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(_nested_aliases(2))
    assert len(read_yaml(path)["a2"]) == 9
    for text in ("a: &a [*a]\n", "a: &a {b: {c: *a}}\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"recipe\.yaml:1: the value stands within itself"):
            read_yaml(path)
