"""The files that `--config` names: shipped ones by their name, and what is wrong with one, by file and line."""

from pathlib import Path

import yaml

from pal_ds.cli.table import COMMANDS
from pal_ds.errors import UserError


def with_shipped_files(arguments: list[str]) -> list[str]:
    """The arguments, with its path for each `--config` that is no file but the name of a shipped recipe, or suite."""
    folder = _shipped_folder(arguments)
    if folder is None:
        return list(arguments)
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


def config_files(arguments: list[str]) -> list[Path]:
    """The file of each `--config` of a command that reads recipes, in order, whether it exists or not."""
    if _shipped_folder(arguments) is None:
        return []
    files = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            files.append(Path(value if equals else "".join(arguments[position + 1 : position + 2])))
    return files


def check_config_files(arguments: list[str]) -> None:
    """Raises UserError, with file and line, for a `--config` that is missing or no YAML mapping."""
    for path in config_files(arguments):
        if not path.is_file():
            folder = _shipped_folder(arguments)
            shipped = sorted(file.stem for file in folder.glob("*.yaml")) if folder else []
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


def _shipped_folder(arguments: list[str]) -> Path | None:
    entry = COMMANDS.get(arguments[0]) if arguments else None
    if entry is None or entry.shipped is None:
        return None
    return Path(__file__).parents[1] / entry.shipped
