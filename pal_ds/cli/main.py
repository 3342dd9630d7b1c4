"""The command line: one parser per command, errors that name the key and the nearest match, exit code 2 for usage.

`--help` and `--version` need neither torch nor a parser: both are answered from `command_table.py` alone, and a command
builds the parser of no other.
"""

import contextlib
import difflib
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pal_ds import __version__
from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.words import COMPLETION, as_declared
from pal_ds.distributed import phase  # noqa: F401  (first of ours: its clock tells how long this process has run)
from pal_ds.distributed.terminal import hangup_as_interrupt
from pal_ds.errors import UserError, end_with

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from pal_ds.config.parser import Parser

PROGRAM = "pal-ds"
HELP = Path(__file__).with_name("help")
"""What `COMMAND --help` prints, of the commands that read recipes: their parser needs torch, which takes two seconds.

`tools/write_help.py` writes it, and a test compares it with the parser's."""
DESCRIPTION = "Personalised reward models, trained with DeepSpeed."


def usage() -> str:
    """Return the text of `pal-ds --help`: every command with its line."""
    width = min(shutil.get_terminal_size().columns, 100)
    column = 2 + max(map(len, COMMANDS)) + 2
    lines = [f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]", "", DESCRIPTION, "", "commands:"]
    for name, entry in COMMANDS.items():
        shown = f"  {name}".ljust(column)
        lines += textwrap.wrap(
            entry.summary, width, initial_indent=shown, subsequent_indent=" " * column
        )
    lines += ["", "options:", "  -h, --help".ljust(column) + "Show this help message and exit."]
    lines += ["  --version".ljust(column) + "Show the version and exit."]
    lines += [
        f"  {COMPLETION}".ljust(column)
        + "Print what makes the TAB key complete commands and options.",
        "",
    ]
    return "\n".join([*lines, f"`{PROGRAM} COMMAND --help` lists the options of a command."])


def build_parser(name: str | None = None, program: str = PROGRAM) -> "Parser":
    """The parser of one command, or of all commands; `program` is who reports a mistake."""
    from pal_ds.config.parser import Parser

    parser = Parser(prog=PROGRAM, description=DESCRIPTION, program=program)
    subcommands = parser.add_subcommands(dest="command")
    for known, entry in COMMANDS.items():
        if name in (None, known):
            command = entry.load()
            sub = Parser(description=command.__doc__, program=program)
            command.add_arguments(sub)
            sub.add_argument(
                "--quiet", action="store_true", help="no bars and no lines but results and warnings"
            )
            subcommands.add_subcommand(known, sub, help=entry.summary)
    return parser


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> None:
    """Runs one command in this process and returns; SystemExit with code 2 for a mistake a person can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher puts this before the command; LOCAL_RANK is in the environment anyway.
    given = as_declared(
        [word for word in given if not word.startswith(("--local_rank", "--local-rank"))]
    )
    name = _command_of(given)
    if given[1:] in (["--help"], ["-h"]) and (shown := HELP / f"{name}.txt").is_file():
        print(shown.read_text(), end="")
        sys.exit(0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pal_ds").setLevel(
        logging.ERROR
        if COMMANDS[name].joins_ranks and os.environ.get("RANK", "0") != "0"
        else logging.INFO
    )
    # Retries and their tracebacks; what comes of them is said in one message.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Whatever the shell allows: what anyone may write is refused when it is read again.
    os.umask(os.umask(0o022) | 0o002)
    command = COMMANDS[name].load()
    if hasattr(command, "arguments_of"):
        given = [name, *command.arguments_of(given[1:])]
    parser = build_parser(name, program)
    from pal_ds.cli.arguments import check_config_files, config_files, with_shipped_files
    from pal_ds.config.parser import objects_of, parsed
    from pal_ds.progress import be_quiet

    given = with_shipped_files(given)
    try:
        check_config_files(given)
        with hangup_as_interrupt(), _allowed(given, config_files(given)) as check:
            options = parsed(parser, given, name)
            check(options[name])
            _refuse_empty_paths(options[name])
            if options[name].quiet:
                be_quiet()
            command.run(objects_of(parser, options)[name], options[name])
    except Exception as error:
        end_with(error, program, joins_ranks=COMMANDS[name].joins_ranks)


def _refuse_empty_paths(options: "Namespace") -> None:
    """Raise UserError for a path that is an empty word, which would be the working directory."""
    for key in ("run_dir", "run", "out", "output", "input", "model"):
        if options.get(key) == "":
            raise UserError(
                f"--{key}: is empty (a variable of the shell that is not set?). Name it."
            )


@contextlib.contextmanager
def _allowed(given: list[str], files: list[Path]) -> Iterator[Callable[["Namespace"], None]]:
    """Let what this command line allows be imported within the block; yields the check of what was parsed.

    A command that reads no recipe and is given no source needs neither, and none of the modules behind them.
    """
    names_source = any(word.partition("=")[0] == "--source" for word in given)
    if COMMANDS[given[0]].shipped is None and not names_source:
        yield lambda options: None
        return
    from pal_ds.config.consent import Consent

    consent = Consent.of_words(given)
    with consent.given(files):
        yield consent.check


def print_completion(shells: list[str]) -> None:
    """Print the completion script of a shell. Raises SystemExit with code 2 for a shell that has none."""
    import shtab

    if len(shells) != 1 or shells[0] not in shtab.SUPPORTED_SHELLS:
        print(
            f"{PROGRAM}: error: --completion takes one of {', '.join(shtab.SUPPORTED_SHELLS)}.",
            file=sys.stderr,
        )
        sys.exit(2)
    print(shtab.complete(build_parser(), shells[0]))


def _command_of(given: list[str]) -> str:
    """The command's name; prints and ends where it is --help, --version or none of ours."""
    first = given[0] if given else None
    if first in COMMANDS:
        return str(first)
    if first in ("-h", "--help", "--version"):
        print(usage() if first != "--version" else f"{PROGRAM} {__version__}")
        sys.exit(0)
    if first == COMPLETION.partition(" ")[0]:
        print_completion(given[1:])
        sys.exit(0)
    if first is None:
        said = f"give a command, one of {', '.join(COMMANDS)}."
    elif first.startswith("-"):
        said = f"unrecognized arguments: {first}. A command comes first; `{PROGRAM} --help` lists them."
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        said = f"there is no command {first!r}.{hint} Known are {', '.join(COMMANDS)}."
    print(f"{PROGRAM}: error: {said}", file=sys.stderr)
    sys.exit(2)


def run_tool(command: str, arguments: list[str] | None = None) -> None:
    """Runs a command as the file in tools/ that has its name; mistakes are reported by that name."""
    given = sys.argv[1:] if arguments is None else arguments
    main([command, *given], program=command.replace("-", "_"))


def console() -> NoReturn:
    """Entry point of `pal-ds` and `python -m pal_ds`: `main`, then the end of the process."""
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        # Checkpoints are published whole, so there is nothing to tidy up.
        print("pal-ds: interrupted; the same command goes on, or begins anew.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Whoever read our output has had enough; what is left of it has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "pal_ds.distributed.world" in sys.modules and not isinstance(code, str):
        sys.modules["pal_ds.distributed.world"].leave(code or 0)
    sys.exit(code)
