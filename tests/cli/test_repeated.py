"""An option that stands twice is refused by its name, in every command: argparse would silently take the last."""

import pytest

from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import build_parser, main
from pal_ds.config.recipe import recipe_from_arguments
from pal_ds.errors import UserError
from tests.tiny import LLAMA

ADD_UP = {"config", "consolidate.users", "ask.user"}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_value_is_refused_twice(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = next(iter(build_parser(command)._actions[-1]._name_parser_map.values()))  # pyright: ignore
    options = {name for a in parser._actions if a.nargs != 0 for name in a.option_strings}
    options = {name for name in options if name.startswith("--") and not name.endswith("+")}
    options = {n for n in options if not {n[2:], f"{command}.{n[2:]}"} & ADD_UP and n != "--help"}
    assert options
    for option in sorted(options)[:: max(1, len(options) // 12)]:
        for second in ([option, "2"], [f"{option}=2"], [option.replace("_", "-"), "2"]):
            said = refused([command, f"{option}=1", *second], capsys)
            assert f"error: {option} is given twice" in said


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["users", "--run_dir=r", "--remove", "bob", "--remove", "carol"], "--remove is given tw"),
        (["evaluate", "--data", "a", "b", "--data", "c"], "all values at once: --data A B."),
        (["report", "--run_dirs=a", "--run_dirs=b"], "all values at once: --run_dirs A B."),
        (
            ["train", "--head=PalA", "--head.init_args.num_layers=2", "--head.num_layers=1"],
            "--head.num_layers is given twice",
        ),
    ],
)
def test_the_message_says_what_to_do(
    words: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remedy in refused(words, capsys)


def test_what_adds_up_may_stand_twice(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config=quickstart", "--config", "quickstart_pal_a", *["--trust_code"] * 2]
    main([*words, "--num_gpus=1", "--data.vocab_size=400"])
    said = refused(["consolidate", "r", "o", "--users=a,b", "--users=c,d"], capsys)
    assert "give at most one folder and one file or list" in said
    said = refused(["submit", "train", "no.yaml", "--", "--train.seed=1"], capsys)
    assert "twice" not in said


def test_words_of_a_call_are_held_to_the_same() -> None:
    words = ["--head=BradleyTerry", f"--backbone.architecture={LLAMA}"]
    with pytest.raises(UserError, match=r"--optim\.epsilon is given twice"):
        recipe_from_arguments([*words, "--optim.epsilon=1", "--optim.epsilon=2"])
