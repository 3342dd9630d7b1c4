"""The command line: one parser per command, errors that name the key and the nearest match, exit code 2 for usage."""

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from pal_ds.config.parser import Parser
from pal_ds.distributed import phase  # noqa: F401  (first of ours: its clock tells how long this process has run)
from pal_ds.errors import UserError, end_with


def with_shipped_files(arguments: list[str]) -> list[str]:
    """The arguments, with its path for each `--config` that is no file but the name of a shipped recipe, or suite."""
    folder = _shipped_folder(arguments)
    resolved: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        apart = resolved[-1:] == ["--config"]
        name = argument if apart else value if option == "--config" and equals else None
        if name is not None and not Path(name).is_file() and Path(name).name == name:
            shipped = folder / f"{name}.yaml"
            path = str(shipped) if shipped.is_file() else name
            argument = path if apart else f"--config={path}"
        resolved.append(argument)
    return resolved


def _shipped_folder(arguments: list[str]) -> Path:
    return Path(__file__).parents[1] / ("suites" if arguments[:1] == ["compare"] else "recipes")


def check_config_files(arguments: list[str]) -> None:
    """Raises UserError, with file and line, for a `--config` that is missing or no YAML mapping."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option != "--config":
            continue
        path = Path(value if equals else "".join(arguments[position + 1 : position + 2]))
        if not path.is_file():
            shipped = sorted(file.stem for file in _shipped_folder(arguments).glob("*.yaml"))
            named = f" Shipped are {', '.join(shipped)}." if path.name == str(path) else ""
            raise UserError(f"--config {path}: no such file (looked from {Path.cwd()}).{named}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{path}:{line}: not valid YAML ({error.problem}). Mend it.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML ({error}). Mend it.") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no keys; a recipe is a YAML mapping such as data: ...")


def build_parser() -> Parser:
    """The parser of all commands."""
    from pal_ds.cli import commands

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
    """Runs one command in this process and returns; SystemExit with code 2 for a mistake a person can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher puts this before the command; LOCAL_RANK is in the environment anyway.
    given = [argument for argument in given if not argument.startswith("--local_rank")]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pal_ds").setLevel(
        logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    )
    # Retries and their tracebacks; what comes of them is said in one message.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = build_parser()
    from pal_ds.cli import commands

    given = with_shipped_files(given)
    try:
        check_config_files(given)
        options = parser.parse_args(given)
        name = options["command"]
        commands.COMMANDS[name].run(parser.instantiate(options)[name], options[name])
    except (UserError, OSError) as error:
        end_with(error, "pal-ds")


def console() -> NoReturn:
    """Entry point of `pal-ds` and `python -m pal_ds`: `main`, then the end of the process."""
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        # Checkpoints are published whole, so there is nothing to tidy up.
        print("pal-ds: interrupted; the same command resumes a training.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Whoever read our output has had enough; what is left of it has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "pal_ds.distributed.world" in sys.modules and not isinstance(code, str):
        sys.modules["pal_ds.distributed.world"].leave(code or 0)
    sys.exit(code)
