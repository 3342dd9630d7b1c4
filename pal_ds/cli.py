"""The command line: one parser per command, errors that name the key and the nearest match, exit code 2 for usage."""

import difflib
import logging
import os
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from pal_ds.errors import UserError


class Parser(ArgumentParser):
    """Refuses abbreviations (they set the wrong key silently) and suggests the nearest option for a typo."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(
            f"pal-ds: error: {message}{_suggestion(message, _option_names(self))}", file=sys.stderr
        )
        sys.exit(2)


def _option_names(parser: ArgumentParser) -> list[str]:
    """Option names of a parser and of its commands, without dashes."""
    names = {option.lstrip("-") for option in parser._option_string_actions}
    for action in parser._actions:
        for command in (getattr(action, "_name_parser_map", None) or {}).values():
            names |= {option.lstrip("-") for option in command._option_string_actions}
    return sorted(names)


def _suggestion(message: str, names: list[str]) -> str:
    """ " Did you mean ...?" for the unknown option that a message of jsonargparse names."""
    if (
        "nrecognized arguments" not in message
        and "does not accept" not in message
        and "not accepted" not in message
    ):
        return ""
    for word in message.replace("'", " ").replace('"', " ").replace("=", " ").split():
        near = difflib.get_close_matches(word.lstrip("-").rstrip(".,:"), names, n=1, cutoff=0.75)
        if near and near[0] != word.lstrip("-"):
            return f" Did you mean {near[0]}?"
    return ""


def build_parser() -> Parser:
    from pal_ds import commands

    parser = Parser(
        prog="pal-ds", description="Personalised reward models, trained with DeepSpeed."
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in commands.COMMANDS.items():
        sub = Parser(description=command.__doc__)
        command.add_arguments(sub)
        subcommands.add_subcommand(name, sub, help=(command.__doc__ or "").splitlines()[0])
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `pal-ds` and `python -m pal_ds`."""
    given = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher puts this before the command; LOCAL_RANK is in the environment anyway.
    given = [argument for argument in given if not argument.startswith("--local_rank")]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pal_ds").setLevel(
        logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = build_parser()
    from pal_ds import commands

    options = parser.parse_args(given)
    name = options["command"]
    if name is None:
        parser.error(f"a command is required: {', '.join(commands.COMMANDS)}")
    code = 0
    try:
        commands.COMMANDS[name].run(parser.instantiate(options)[name], options[name])
    except UserError as error:
        code = 2
        if os.environ.get("RANK", "0") == "0":
            print(f"pal-ds: error: {error}", file=sys.stderr)
    if "pal_ds.engine.dist" in sys.modules:
        sys.modules["pal_ds.engine.dist"].leave(code)
    sys.exit(code)
