"""`--help` and `--version` import next to nothing, and a command builds the parser of no other."""

import subprocess
import sys
from pathlib import Path

import pytest

from pal_ds import __version__
from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import HELP, build_parser, main, usage
from tests.spawn import ROOT, environment

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
    "a missing argument": (["retention", "a", "b"], "required: SETS"),
    "missing options": (["train"], "required: --data.path, --head, --run_dir"),
    "a missing argument of a class": (
        ["evaluate", "--run_dir=a", "--source=Dsp"],
        "path of Dsp: --KEY.path",
    ),
    "initials": (["train", "--optim.lr=1"], "Did you mean optim.learning_rate?"),
    "a key without what is above it": (["train", "--epochs=1"], "Did you mean train.epochs?"),
    "a key of a peer": (["train", "--train.batch_size=1"], "Did you mean train.batch_pairs?"),
    "an argument of a head": (
        ["train", "--head=PalB", "--head.num_protos=1"],
        "'num_protos' is not accepted. Did you mean num_prototypes?",
    ),
    "a loss of one's own": (
        ["train", "--loss.kind=my.Loss"],
        "a loss of your own goes to loss.shape",
    ),
    "no number": (["few_shot", "--run_dir=a", "--num_comparisons", "1", "x"], "no whole numbers"),
    "data and a source": (
        ["evaluate", "--run_dir=a", "--data", "b", "--source=Synthetic"],
        "give --data or --source, not both",
    ),
    "a function for a source": (
        ["evaluate", "--run_dir=a", "--source=os.system"],
        "os.system is no",
    ),
    "a shell": (["--completion", "csh"], "--completion takes one of bash"),
    "two runs": (["report", "--run_dirs", "a", "b", "--out=c"], "a: no config.yaml here"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = MISTAKES[case]
    with pytest.raises(SystemExit) as end:
        main(words)
    found = capsys.readouterr()
    assert end.value.code == 2 and found.out == ""
    assert found.err.startswith("pal-ds: error: ") and wanted in found.err, found.err


@pytest.mark.parametrize("words", [["--run-dir=a"], ["--run_dir", "a"], ["--run-dir", "a"]])
def test_dashes_stand_for_underscores(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("few-shot", "few_shot"):
        with pytest.raises(SystemExit):
            main([command, *words])
        assert capsys.readouterr().err.startswith("pal-ds: error: a: no config.yaml here")


def test_help_that_is_shipped_is_the_parsers(tmp_path: Path) -> None:
    """`python -m tools.write_help` writes it anew after a change of options or of their docstrings."""
    # In a process of its own: classes that other tests defined would be listed with ours.
    code = (
        "import sys, pathlib; from tools.write_help import write; write(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in HELP.iterdir()}
    assert len(made) == sum(entry.shipped is not None for entry in COMMANDS.values())


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.shipped])
def test_help_of_a_command_that_reads_recipes_needs_no_parser(name: str) -> None:
    code, printed, modules = modules_after(name, "--help")
    assert code == 0 and "--data.path" in printed and not modules & set(HEAVY)


def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0
    assert "consolidate" in script and "--optim.learning_rate" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_quiet_is_a_persons_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quiet: true\ndata: {path: d, source: Synthetic}\n")
    with pytest.raises(SystemExit):
        main(["prepare", f"--config={recipe}"])
    assert "quiet: stands in a recipe, and only a person may say it" in capsys.readouterr().err


def test_quiet_leaves_results_and_errors_alone(tmp_path: Path) -> None:
    source = [
        "--data.source=Synthetic",
        "--data.source.num_users=2",
        f"--data.path={tmp_path / 'd'}",
    ]
    run = [sys.executable, "-m", "pal_ds", "prepare", *source]
    said = []
    for words in ([], [], ["--quiet"]):
        done = subprocess.run(
            [*run, *words], env=environment(), text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert "reusing it" in said[1] and "reusing it" not in said[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"pal-ds {__version__}\n"
    assert version("pal_ds") == __version__
