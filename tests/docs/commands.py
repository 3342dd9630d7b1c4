"""Runs and parses the commands of a page; called in the warm parent, which has imported everything.

A command of ours runs in a forked child, so that it costs what it computes and not its imports; `torchrun` forks as
many ranks as it says. Whatever else a block holds goes to bash. A command that is not run is parsed by the parser that
would read it: every option exists and every value has its type.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from pal_ds.cli import main as cli
from pal_ds.cli.arguments import with_shipped_files
from pal_ds.cli.command_table import COMMANDS
from tests.docs.blocks import SHELL, Block, commands_of, read_blocks
from tests.spawn import ROOT, environment
from tests.warm import fork_ranks, wait_for

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SECONDS = 480
SCRIPTS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "train": lambda words: [["train", "--config", words[0], *_with_run_dir(words[1:])]],
    "embed": lambda words: [["embed", "--config", words[0], *words[1:]]],
    "evaluate": lambda words: [["evaluate", "--run_dir", words[0], *words[1:]]],
    "adapt": lambda w: [["adapt", "--run_dir", w[0], "--pairs", w[1], "--out", w[2], *w[3:]]],
    "sweep": lambda words: [
        ["train", "--config", word, "--run_dir", "runs/sweep"]
        for word in words
        if word.endswith(".yaml")
    ],
}
"""slurm/NAME.sbatch: the commands of ours that it comes to, given the words after the script."""


def run_page(folder: str, page: str, name: str) -> list[str]:
    """Runs the blocks of `page` in `folder` and parses what is not run; returns what went wrong."""
    here = Path(folder)
    blocks = read_blocks(Path(page), name)
    for number, block in enumerate(blocks):
        if "file" in block.marks:
            (here / block.marks["file"]).write_text(block.code + "\n")
        if block.runs and (failure := _run_block(block, here, here / f"log_{number}")):
            return [failure]
    return _in_child(lambda: _parse_blocks(blocks), here, here / "log_parsed")


def _run_block(block: Block, folder: Path, log: Path) -> str | None:
    if block.language == "python":
        code = compile(block.code, block.where, "exec")
        failures = _in_child(lambda: exec(code, {"__name__": "__main__"}), folder, log)
        return failures[0] if failures else None
    for number, command in enumerate(commands_of(block.code)):
        one_log = log.with_name(f"{log.name}_{number}")
        if (failure := _run_command(command, folder, one_log)) is not None:
            return f"{block.where}: {command}\n{failure}"
    return None


def _run_command(command: str, folder: Path, log: Path) -> str | None:
    """Runs one line; what it printed where it failed."""
    words = shlex.split(command, comments=True)
    ours = our_commands(command)
    if ours:
        # Python puts the folder on the path of a module that it runs, and not on that of a script.
        path = str(folder) if words[0] != "pal-ds" else None
        failures = _in_child(lambda: call(ours[0], path), folder, log, _num_ranks(words))
        return failures[0] if failures else None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment(PATH=path),
        text=True,
        capture_output=True,
        timeout=SECONDS,
    )
    return None if done.returncode == 0 else f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def our_commands(line: str) -> list[list[str]]:
    """What a shell line asks of `pal-ds`, each without the program's name; empty where it asks nothing.

    >>> our_commands("torchrun --nproc_per_node 8 -m pal_ds train --config a.yaml")
    [['train', '--config', 'a.yaml']]
    """
    inner = re.fullmatch(r"\w+=\$\((.*)\)", line)
    words = shlex.split(inner[1] if inner else line, comments=True)
    if words[0] == "pal-ds":
        return [words[1:]]
    if words[0] == "sbatch":
        at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        return SCRIPTS[Path(words[at]).stem](words[at + 1 :])
    if words[0] == "python" and words[1].startswith("tools/") and words[1].count("/") == 1:
        return [[Path(words[1]).stem.replace("_", "-"), *words[2:]]]
    if words[0] in ("python", "torchrun", "deepspeed", "srun") and "pal_ds" in words:
        return [words[words.index("pal_ds") + 1 :]]
    return []


def _num_ranks(words: list[str]) -> int:
    return int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 0


def _with_run_dir(words: list[str]) -> list[str]:
    return words if any(w.startswith("--run_dir") for w in words) else [*words, "--run_dir=runs/a"]


def _in_child(work: Callable[[], Any], folder: Path, log: Path, num_ranks: int = 0) -> list[str]:
    """Calls `work` in `folder` in a forked process, or in `num_ranks` that a launcher's variables make ranks.

    Returns what it returned, a list of failures, or one failure where a process did not end with 0.
    """
    answers = log.with_suffix(".answers")

    def child() -> None:
        os.chdir(folder)
        if not num_ranks:
            for name in RANK_VARIABLES:
                os.environ.pop(name, None)
        os.environ["HF_HUB_OFFLINE"] = "1"
        answer = work()
        answers.write_text("\0".join(answer or []))

    codes = wait_for(fork_ranks(max(num_ranks, 1), child, log), seconds=SECONDS)
    if any(codes):
        printed = [Path(f"{log}.{rank}").read_text()[-4000:] for rank in range(len(codes))]
        return [f"exit codes {codes}\n" + "\n".join(printed)]
    return [part for part in answers.read_text().split("\0") if part] if answers.exists() else []


def call(words: list[str], first_on_path: str | None = None) -> None:
    """`pal-ds WORDS...` in this process."""
    if first_on_path is not None:
        sys.path.insert(0, first_on_path)
    if words[0] in COMMANDS:
        cli.main(words)
    else:
        _tool(words[0]).main(with_shipped_files(words)[1:])


def _parse_blocks(blocks: list[Block]) -> list[str]:
    """What is wrong in blocks that are not run, each "page:line: ..."; those of a page that ran need no parser."""
    sys.path.insert(0, str(Path.cwd()))
    failures = []
    for block in blocks:
        for words in [] if block.runs else _words_to_parse(block):
            if (message := parse(words)) is not None:
                failures.append(f"{block.where}: {shlex.join(words)}\n{message}")
    return failures


def _words_to_parse(block: Block) -> list[list[str]]:
    if block.language in SHELL:
        return [words for line in commands_of(block.code) for words in our_commands(line)]
    if block.language != "yaml" or "other" in block.marks:
        return []
    shown = Path(f"shown_{block.where.replace('/', '_').replace(':', '_')}.yaml")
    shown.write_text(block.code)
    if "suite" in block.marks:
        return [["compare", f"--config={shown}", "--data.path=data", "--out=out"]]
    return [["prepare", "--data.path=data", f"--config={shown}"]]


def parse(words: list[str]) -> str | None:
    """Parses a command as `pal-ds` would, without running it; the message where it is refused."""
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused), contextlib.redirect_stdout(io.StringIO()):
            _parse(words)
    except SystemExit as end:
        return None if not end.code else refused.getvalue()
    except Exception:
        return traceback.format_exc(limit=-3)
    return None


def _parse(words: list[str]) -> None:
    """`pal-ds WORDS...` up to where the command would begin."""
    if words[0] not in COMMANDS:
        tool = _tool(words[0])
        parser = getattr(tool, "options_parser", None) or getattr(tool, "build_parser", None)
        if parser is not None:
            cut = words.index("--") if "--" in words else len(words)
            parser().parse_args(words[1:cut])
        return
    command = COMMANDS[words[0]].load()
    no_run = mock.patch.object(command, "run", staticmethod(lambda *_: None))
    # A handler made now would write to the stream that stands for stderr here, for as long as the process lives.
    with no_run, mock.patch("logging.basicConfig"):
        cli.main(words)


def _tool(name: str) -> ModuleType:
    """tools/NAME.py of a command that `pal-ds` does not have."""
    assert (ROOT / "tools" / f"{name.replace('-', '_')}.py").is_file(), f"no command {name}"
    return importlib.import_module(f"tools.{name.replace('-', '_')}")
