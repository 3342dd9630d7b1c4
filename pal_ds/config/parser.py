"""The parser of commands and suites: refuses abbreviations, and words its errors for people."""

import difflib
import inspect
import mmap
import re
import sys
from argparse import ArgumentError, _AppendAction
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader

from pal_ds.distributed import phase  # noqa: F401  (first of ours: its clock tells how long this process has run)
from pal_ds.errors import UserError, chain_of, storage_error, without_stop
from pal_ds.io.boundary import reason_of
from pal_ds.io.yaml_files import is_odd_number, refuse_expansion, refuse_odd_numbers

_LEAST_BYTES = 32 << 20
"""Memory that a command takes at the least once its options are read."""
_LONG_VALUE = re.compile(r"((?:Given|Got) value: .{200}).+")
"""A value that a message repeats, which may be all of somebody's data."""
_read_yaml = get_loader("yaml")


def _load_value(text: str) -> object:
    """Read a value of the command line, or a file, as jsonargparse does; numbers in odd spellings are no YAML."""
    try:
        refuse_odd_numbers(text, "line")
        if "*" in text and "&" in text:
            refuse_expansion(yaml.compose(text, Loader=yaml.SafeLoader), "line")
    except UserError as error:
        raise yaml.YAMLError(str(error)) from None
    return _read_yaml(text)


# A word that is no YAML stays a text, which a key of a number refuses by its name.
set_loader("yaml", _load_value, exceptions=(yaml.YAMLError,))


class Parser(ArgumentParser):
    """Refuses abbreviations (they set the wrong key silently) and suggests the nearest option for a typo."""

    def __init__(self, *args: Any, program: str = "pal-ds", **kwargs: Any) -> None:
        self.program = program
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r"(?<=arguments are required: ).*", self._as_typed, message)
        print(f"{self.program}: error: {explained(message, self)}", file=sys.stderr)
        sys.exit(2)

    def _as_typed(self, names: re.Match[str]) -> str:
        """Reword the options and arguments that are missing: jsonargparse puts the command before some of its own."""
        if getattr(self, "_inner_parser", False):
            # Of a class that a key names, of which this parser has nothing but the arguments.
            first = names[0].split(", ")[0]
            named = ".".join(self.groups or ())
            return f"{names[0]} of {named}: --KEY.{first}, KEY being what names it, or in init_args"
        commands: dict[str, ArgumentParser] = {}
        for action in self._actions:
            commands |= getattr(action, "_name_parser_map", None) or {}
        actions = [a for parser in (self, *commands.values()) for a in parser._actions]
        positional = {action.dest for action in actions if not action.option_strings}
        typed = []
        for name in names[0].split(", "):
            first, _, rest = name.removeprefix("--").partition(".")
            name = rest if first in commands else name.removeprefix("--")
            typed.append(name.upper() if name in positional else f"--{name}")
        return ", ".join(typed)


def parsed(parser: ArgumentParser, words: Sequence[str], where: str) -> Namespace:
    """Parse words; the parser's own errors pass. Raises UserError for a value at which it fails, as a huge number."""
    try:
        _refuse_repeated(parser, words)
        options = parser.parse_args([*words])
        _refuse_odd_words(options, words)
        return options
    except (ArgumentError, UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"{where}: a value cannot be read ({reason_of(error)}). Mend it."
        ) from error


def _refuse_repeated(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Raise UserError for an option that stands twice, of which argparse takes the last value and says nothing.

    Options that add up, as `--config`, may; so may switches, whose second says what the first did.
    """
    actions = [*parser._actions]
    for action in parser._actions:
        for command in (getattr(action, "_name_parser_map", None) or {}).values():
            actions += command._actions
    several = {
        name
        for action in actions
        if action.nargs == 0 or isinstance(action, _AppendAction | ActionConfigFile)
        for name in action.option_strings
    }
    takes_list = {n for action in actions if action.nargs == "+" for n in action.option_strings}
    met: set[str] = set()
    for word in words[: [*words, "--"].index("--")]:
        written = word.partition("=")[0]
        # KEY+ adds to a list; init_args may be left out of a key.
        if not written.startswith("--") or written.endswith("+") or written in several:
            continue
        name = written.replace(".init_args.", ".")
        if name in met:
            remedy = f"Give all values at once: {written} A B." if written in takes_list else ""
            raise UserError(
                f"{written} is given twice, and only one of the two could count. {remedy or 'Give it once.'}"
            )
        met.add(name)


def _refuse_odd_words(options: Namespace, words: Sequence[str]) -> None:
    """Raise UserError for a number of the command line that is not in plain digits, as 1:30, which was read as 90."""
    parts = (options, *(part for part in vars(options).values() if isinstance(part, Namespace)))
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if not option.startswith("--"):
            continue
        value = value if equals else following
        read = [part.get(option[2:]) for part in parts]
        is_number = any(type(one) in (int, float) for one in read)
        if is_number and is_odd_number(value):
            raise UserError(f"{option}: {value} is no number in plain digits, as 10 or 0.5 is.")


def objects_of(parser: ArgumentParser, options: Namespace) -> Namespace:
    """Make the objects that parsed options describe. Raises UserError as their classes do."""
    try:
        return parser.instantiate(options)
    except ValueError as error:
        for cause in chain_of(error):
            if isinstance(cause, UserError):
                raise cause from None
        raise


def explained(message: str, parser: ArgumentParser) -> str:
    """Reword a message of jsonargparse: without its Python types, and with the nearest option for a typo.

    Raises:
        StorageError: this process gets no more memory, for want of which a class may not have been read.
    """
    _refuse_without_memory()
    message = _LONG_VALUE.sub(r"\1 ...", _without_noise(message))
    if "No module named" in message:
        from pal_ds.config.own_code import where_looked

        return f"{message.rstrip('. ')}. {where_looked()}"
    unknown = any(part in message for part in ("nrecognized arguments", "not accept"))
    return without_stop(message) + _suggestion(message, parser) if unknown else message


def _refuse_without_memory() -> None:
    try:
        # Taken and not touched: it counts against a limit and costs nothing.
        mmap.mmap(-1, _LEAST_BYTES).close()
    except OSError as error:
        raise storage_error(error) or error from error


def _suggestion(message: str, parser: ArgumentParser) -> str:
    """Return the remedy for the unknown option that a message of jsonargparse names."""
    maps = (getattr(action, "_name_parser_map", None) or {} for action in parser._actions)
    parsers = [parser, *(command for commands in maps for command in commands.values())]
    options = {name.lstrip("-") for one in parsers for name in one._option_string_actions}
    names = sorted(options | (_class_arguments() if "is not accepted" in message else set()))
    named = re.search(r"[Oo]ption '([\w.]+)'", message)
    said = [named[1]] if named else re.findall(r"--([\w.]+)", message)
    for word in said:
        if known := _known_as(word, names):
            return f". Did you mean {known}?"
        # Or of a key that holds others.
        for part in dict.fromkeys((word, word.partition(".")[0])):
            near = difflib.get_close_matches(part, names, n=5, cutoff=0.7)
            # People err at the end of a name more than at its beginning.
            near.sort(key=lambda name: -_length_of_common_beginning(name, part))
            if near and near[0] != part:
                return f". Did you mean {near[0]}?"
    return ". `pal-ds COMMAND --help` lists what there is."


def _length_of_common_beginning(first: str, second: str) -> int:
    differs = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differs, min(len(first), len(second)))


def _class_arguments() -> set[str]:
    """The names of what the shipped heads and sources are made with."""
    from pal_ds.data.sources import SOURCES
    from pal_ds.heads import HEADS

    classes = [*HEADS.values(), *SOURCES.values()]
    return {name for cls in classes for name in inspect.signature(cls).parameters}


def _known_as(word: str, names: Sequence[str]) -> str | None:
    """The option that a word stands for: its last part without what is above, or the initials of that, as lr."""
    above, _, last = word.rpartition(".")
    if len(last) < 2:
        return None
    for name in names:
        parent, _, own = name.rpartition(".")
        initials = "".join(part[0] for part in own.split("_") if part)
        if above in ("", parent) and name != word and (last in (own, initials)):
            return name
    return None


def _without_noise(message: str) -> str:
    """Reword what jsonargparse says of Python types: a class that is unknown or refused, or a choice that is none."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    if "but is abstract" in message and (named := re.search(r"Given value: ([\w.]+)", message)):
        return f"{key[1] if key else 'class'}: {named[1]} {_left_out(named[1])}"
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
    if name is None or key is None:
        own = (
            "; a loss of your own goes to loss.shape"
            if key and key[1].endswith("loss.kind")
            else ""
        )
        message = re.sub(
            r"Expected a typing.Literal\[(.*?)\]", rf"it must be one of \1{own}", message
        )
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


def _left_out(path: str) -> str:
    """Say which methods an abstract class of one's own would have to define."""
    module, _, name = path.rpartition(".")
    methods = sorted(
        getattr(getattr(sys.modules.get(module), name, None), "__abstractmethods__", ())
    )
    return f"does not define {', '.join(methods) or 'every method'}, which its base class asks for."


def _refusal(message: str, path: str) -> str:
    """Say that a value names something which pal_ds does not ship; nothing of it was imported."""
    from pal_ds.config.consent import REMEDY

    key = re.search(r'Parser key "([\w.]+)"', message)
    named = f"{key[1]}: {path}" if key else path
    if path.endswith((".yaml", ".yml")):
        return f"{named} is taken for a class. For a file of the keys of {key[1] if key else 'it'}, write ./{path}"
    if path.partition(".")[0] in {*sys.stdlib_module_names, "pal_ds", "jsonargparse"}:
        return f"{named} is no head, source or loss, and a recipe calls nothing else. Name a class."
    return (
        f"{named} is no class that pal_ds ships, and to import it is to run code. {REMEDY} A class "
        "that is named on the command line itself needs no flag."
    )
