"""How every program of ours ends for what a person can mend: one line, one exit code; a bug keeps its traceback."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import pal_ds.engine.checkpoint.reshard
import pal_ds.export
from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import main
from pal_ds.errors import (
    BusyError,
    RankLostError,
    StorageError,
    UnfinishedError,
    UserError,
    end_with,
    mendable,
    writing,
)
from tools import consolidate, reshard

FULL = OSError(errno.ENOSPC, "No space left on device", "/full/x")
BUG = FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")
End = Callable[[Exception], None]


@pytest.fixture(params=["pal-ds", "consolidate", "reshard"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, End]:
    """Its name, and what runs it into an error."""
    words = {
        "pal-ds": ["users", "--run_dir=/run", "--list"],
        "consolidate": ["/run", "/out"],
        "reshard": ["/run", "--world_size=1"],
    }[request.param]
    run = {"pal-ds": main, "consolidate": consolidate.main, "reshard": reshard.main}[request.param]

    def end(error: Exception) -> None:
        def fail(*_: object, **__: object) -> NoReturn:
            raise error

        monkeypatch.setattr(COMMANDS["users"].load(), "run", fail)
        monkeypatch.setattr(pal_ds.export, "export", fail)
        monkeypatch.setattr(pal_ds.engine.checkpoint.reshard, "exchange_step", fail)
        run(words)

    return request.param, end


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FULL, 4, "/full/x: cannot be written or read: No space left on device. Make room there"),
        (UserError("no such run"), 2, "no such run"),
        (BusyError("in use"), 6, "in use"),
        (RankLostError("rank 1 died"), 5, "rank 1 died"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_a_code(
    program: tuple[str, End],
    error: Exception,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, end = program
    with pytest.raises(SystemExit) as ended:
        end(error)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: {said}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("400 requested and 16 written"), "x/y: cannot be written or read: No space left"),
        (Exception("No space left on device (os error 28)"), "x/y: cannot be .*: No space left"),
        (OSError(errno.EMFILE, "Too many open files", "z"), "z: cannot be .*: Too many open"),
        (
            ImportError("lib.so: failed to map segment from shared object"),
            "x/y: .* allocate memory",
        ),
        (
            RuntimeError("can't start new thread"),
            r"x/y: .* allocate memory.*again. \(RuntimeError: can't start new thread\)$",
        ),
        (MemoryError(), "x/y: .* allocate memory"),
        (OSError(errno.ENOSPC, "", "x/y.tmp-a_host-12/z.npy"), "^x/y/z.npy: .*No space left"),
    ],
)
def test_what_the_machine_refused_has_one_code_and_the_name_of_the_file(
    error: Exception, said: str
) -> None:
    with pytest.raises(StorageError, match=said), writing("x/y"):
        raise error


def test_a_reader_is_not_blamed_for_what_the_machine_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its remedy (delete the file, make it again) would lose what is sound."""
    try:
        try:
            raise OSError(errno.EMFILE, "", "data.npy")
        except OSError:
            raise UserError("data.npy: cannot be read; delete it") from None
    except UserError as error:
        with pytest.raises(SystemExit) as end:
            end_with(error, "pal-ds")
    assert end.value.code == 4
    assert "data.npy: cannot be written or read: Too many open files" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(program: tuple[str, End]) -> None:
    with pytest.raises(FileNotFoundError):
        program[1](BUG)


def test_what_the_watchdog_says_is_not_said_again(
    program: tuple[str, End], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RankLostError("rank 1 died")
    lost.is_printed = True
    with pytest.raises(SystemExit):
        program[1](lost)
    assert capsys.readouterr().err == ""


def test_a_program_of_one_process_speaks_whatever_rank_is_set(
    program: tuple[str, End],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shell that exported RANK=1 once took every word from such a program."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        program[1](UserError("no such run"))
    assert capsys.readouterr().err == f"{program[0]}: error: no such run\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "pal-ds: error: no such run\n"), ("1", "")])
def test_of_ranks_that_say_the_same_rank_zero_speaks(
    rank: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        end_with(UserError("no such run"), "pal-ds")
    assert capsys.readouterr().err == said


def test_every_code_is_in_both_tables() -> None:
    import pal_ds.errors

    manual = (Path(__file__).resolve().parents[1] / "docs" / "reliability.md").read_text()
    kinds = [kind for kind in vars(pal_ds.errors).values() if isinstance(kind, type)]
    # A kind that only says who speaks shares the code of its parent.
    codes = [
        kind.exit_code
        for kind in kinds
        if issubclass(kind, UserError) and "exit_code" in vars(kind)
    ]
    assert len(codes) == len(set(codes)) == 6
    for code in codes:
        assert f"| {code} | " in (pal_ds.errors.__doc__ or "")
        assert f"| {code} | " in manual


def test_a_stop_that_was_asked_for_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """It has a code of its own, by which a script knows it from the end."""
    with pytest.raises(SystemExit) as stop:
        end_with(UnfinishedError("stopped before the end"), "pal-ds")
    assert stop.value.code == 75
    assert capsys.readouterr().err == "pal-ds: stopped before the end\n"


def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    first, second = ValueError("one"), ValueError("other")
    first.__cause__, second.__cause__ = second, first
    assert mendable(first) is None
    refused = UserError("no")
    refused.__cause__, first.__cause__ = first, second
    assert mendable(refused) is refused
