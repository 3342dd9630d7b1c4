"""The parser of commands and suites: refuses abbreviations, and words its errors for people."""

import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from pal_ds.distributed import phase  # noqa: F401  (first of ours: its clock tells how long this process has run)
from pal_ds.errors import UserError


class Parser(ArgumentParser):
    """Refuses abbreviations (they set the wrong key silently) and suggests the nearest option for a typo."""

    def __init__(self, *args: Any, program: str = "pal-ds", **kwargs: Any) -> None:
        self.program = program
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse names a command's own options with the command in front, which no one can type.
        message = re.sub(r"(arguments are required: )\w+\.", r"\1--", message)
        print(f"{self.program}: error: {explained(message, self)}", file=sys.stderr)
        sys.exit(2)


def objects_of(parser: ArgumentParser, options: Namespace) -> Namespace:
    """Make the objects that parsed options describe. Raises UserError as their classes do."""
    try:
        return parser.instantiate(options)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def explained(message: str, parser: ArgumentParser) -> str:
    """Reword a message of jsonargparse: without its Python types, and with the nearest option for a typo."""
    message = _without_noise(message)
    unknown = any(part in message for part in ("nrecognized arguments", "not accept"))
    return message + (_suggestion(message, parser) if unknown else "")


def _suggestion(message: str, parser: ArgumentParser) -> str:
    """Return the remedy for the unknown option that a message of jsonargparse names."""
    maps = (getattr(action, "_name_parser_map", None) or {} for action in parser._actions)
    parsers = [parser, *(command for commands in maps for command in commands.values())]
    names = sorted({name.lstrip("-") for one in parsers for name in one._option_string_actions})
    for word in message.replace("'", " ").replace('"', " ").replace("=", " ").split():
        word = word.lstrip("-").rstrip(".,:")
        # Or of a key that holds others.
        for part in dict.fromkeys((word, word.partition(".")[0])):
            near = difflib.get_close_matches(part, names, n=1, cutoff=0.75)
            if near and near[0] != part:
                return f". Did you mean {near[0]}?"
    return ". `pal-ds COMMAND --help` lists what there is."


def _without_noise(message: str) -> str:
    """Reword what jsonargparse says of Python types: a class that is unknown or refused, or a choice that is none."""
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return _refusal(message, denied[1])
    message = re.sub(
        r"Type [\w.]*Callable\[.*?expects a function or a callable class: (.*?)\.? Got value: .*",
        r"\1",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(
        r"Group '([\w.]+)' does not accept option '([\w.]+)'",
        r"does not accept option '\1.\2'",
        message,
    )
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    key = re.search(r'Parser key "([\w.]+)"', message)
    if name is None or key is None:
        message = re.sub(r"Expected a typing.Literal\[(.*?)\]", r"it must be one of \1", message)
        message = re.sub(r"Expected an? <class '(\w+)'>", r"it must be of type \1", message)
        message = re.sub(r"(of type list)(\. Got)", r"\1, as [0,1] or [a,b]\2", message)
        return re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)
    from pal_ds.data.sources import SOURCES
    from pal_ds.heads import HEADS

    known = {"head": list(HEADS), "data.source": [cls.__name__ for cls in SOURCES.values()]}
    classes = known.get(key[1].rpartition("train.")[2], [])
    near = difflib.get_close_matches(name[1], classes, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"{key[1]}: there is no class {name[1]}.{hint} Known are {', '.join(classes)}; a class of "
        "your own goes by its import path, package.module.Class."
    )


def _refusal(message: str, path: str) -> str:
    """Say that a value names something which pal_ds does not ship; nothing of it was imported."""
    from pal_ds.config.consent import REMEDY

    key = re.search(r'Parser key "([\w.]+)"', message)
    named = f"{key[1]}: {path}" if key else path
    if path.partition(".")[0] in {*sys.stdlib_module_names, "pal_ds", "jsonargparse"}:
        return f"{named} is no head, source or loss, and a recipe calls nothing else. Name a class."
    return (
        f"{named} is no class that pal_ds ships, and to import it is to run code. {REMEDY} A class "
        "that is named on the command line itself needs no flag."
    )
