"""`--help` and `--version` import next to nothing, and a command builds the parser of no other."""

import subprocess
import sys

import pytest

from pal_ds import __version__
from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import build_parser, main, usage
from tests.spawn import environment

HEAVY = ("torch", "transformers", "jsonargparse", "deepspeed", "numpy", "yaml", "datasets")


def modules_after(*words: str) -> tuple[int, str, set[str]]:
    """(exit code, what was printed, the modules in memory) of `python -m pal_ds WORDS`."""
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('pal_ds', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        "print('MODULES', code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=120,
    )
    printed, _, modules = done.stdout.partition("MODULES ")
    code, *names = modules.split()
    return int(code), printed + done.stderr, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], [], ["trian"], ["--nope"]])
def test_what_needs_no_parser_imports_none(words: list[str]) -> None:
    code, printed, modules = modules_after(*words)
    assert "pal_ds" in modules and not modules & set(HEAVY)
    assert code == (0 if words[:1] in (["--help"], ["-h"], ["--version"]) else 2), printed


def test_help_of_a_command_that_reads_no_recipe_needs_no_torch() -> None:
    code, printed, modules = modules_after("consolidate", "--help")
    assert code == 0 and "--max_shard_size" in printed
    assert "jsonargparse" in modules and not modules & {"torch", "transformers"}


def test_importing_the_package_is_light() -> None:
    code = "import sys, pal_ds; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), text=True, capture_output=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "pal_ds" in loaded and not loaded & set(HEAVY)


def test_usage_names_every_command() -> None:
    shown = {line.split()[0] for line in usage().splitlines() if line.startswith("  ")}
    assert shown >= set(COMMANDS) and {"-h,", "--version"} <= shown


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_are_the_docstrings_first_lines(name: str) -> None:
    assert (COMMANDS[name].load().__doc__ or "").splitlines()[0] == COMMANDS[name].summary


def test_one_command_builds_one_parser() -> None:
    def names(parser) -> set[str]:
        (action,) = (a for a in parser._actions if getattr(a, "_name_parser_map", None))
        return set(action._name_parser_map)

    assert names(build_parser("users")) == {"users"}
    assert names(build_parser()) == set(COMMANDS)


MISTAKES = {
    "a command": (["trian"], "there is no command 'trian'. Did you mean train?"),
    "no command": ([], "give a command, one of prepare, embed"),
    "an option before it": (["--nope", "train"], "unrecognized arguments: --nope"),
    "an option": (["consolidate", "a", "b", "--stp=3"], "Did you mean step?"),
    "two users": (["consolidate", "a", "b", "--user=x", "--mixture=1"], "not allowed with"),
    "a folder of users": (["consolidate", "a", "b", "--users=none"], "--users none: nothing is"),
    "no ranks": (["reshard", "a", "--world_size=0"], "--world_size is 0; it must be at least 1"),
    "no run": (["reshard", "a", "--world_size=2"], "a: no config.yaml here"),
    "a missing argument": (["retention", "a", "b"], "sets"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = MISTAKES[case]
    with pytest.raises(SystemExit) as end:
        main(words)
    found = capsys.readouterr()
    assert end.value.code == 2 and found.out == ""
    assert found.err.startswith("pal-ds: error: ") and wanted in found.err, found.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"pal-ds {__version__}\n"
    assert version("pal_ds") == __version__
