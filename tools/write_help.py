"""Writes pal_ds/cli/help/: what `COMMAND --help` prints of commands that read recipes, so that it needs no torch."""

import os
from pathlib import Path

from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import HELP, build_parser


def help_of(name: str) -> str:
    """The text as the parser makes it for 80 columns."""
    os.environ["COLUMNS"] = "80"
    maps = (getattr(action, "_name_parser_map", None) for action in build_parser(name)._actions)
    (commands,) = filter(None, maps)
    return commands[name].format_help()


def write(folder: Path) -> None:
    """Write a file per command that reads recipes, COMMAND.txt."""
    folder.mkdir(exist_ok=True)
    for name, entry in COMMANDS.items():
        if entry.shipped is not None:
            (folder / f"{name}.txt").write_text(help_of(name))


if __name__ == "__main__":
    write(HELP)
