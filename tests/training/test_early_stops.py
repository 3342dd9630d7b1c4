"""A stop that is asked for before the first update: no rank waits for the others, no status says "running" for ever."""

import signal
from pathlib import Path

import pytest

from tests.warm import WarmParent

CASE = "tests.training.stop_cases:stopped_at"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("early_stops")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_while_data_are_prepared(warm: WarmParent, folder: Path, number: int) -> None:
    """All ranks end with the code that says: start again."""
    told = warm(CASE, folder, "update: prepare", number, 0, 1)
    assert told["codes"] == [75, 75], told["said"]
    assert told["left"] == [] and told["status"] is None
    assert told["said"].count("stopped while the data were being prepared") == 1
    assert told["again"] == [0, 0] and told["status_again"]["state"] == "finished"


@pytest.mark.parametrize(
    ("moment", "number", "rank"),
    [
        ("update: prepare", signal.SIGTERM, 1),
        ("update: load weights", signal.SIGINT, 0),
        ("update: start the engine", signal.SIGHUP, 1),
    ],
)
def test_before_the_first_update(
    warm: WarmParent, folder: Path, moment: str, number: int, rank: int
) -> None:
    told = warm(CASE, folder, moment, number, rank, 1)
    assert told["codes"] == [0, 0], told["said"]
    status = told["status"]
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 0, "signal")
    assert told["again"] == [0, 0] and told["status_again"]["state"] == "finished"


def test_a_second_ctrl_c_ends_at_once(warm: WarmParent, folder: Path) -> None:
    told = warm(CASE, folder, "update: load weights", signal.SIGINT, 0, 2)
    # The command line makes 130 of what is raised here, as of what the others hear of it.
    assert "KeyboardInterrupt" in told["said"] and told["codes"][1] == 130, told["said"]
    assert told["status"] is None or told["status"]["state"] == "stopped"
    assert told["again"] == [0, 0] and told["status_again"]["state"] == "finished"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_ctrl_c_ends_native_code(warm: WarmParent, folder: Path, num_ranks: int) -> None:
    """The main thread of rank 0 never runs Python again; the first Ctrl-C alone would wait for it."""
    ranks = warm("tests.training.stop_cases:interrupted_in_native_code", folder, num_ranks)
    said = "".join(text for _, text in ranks)
    assert [code for code, _ in ranks] == [130] * num_ranks, said
    assert said.count("Ctrl-C again ends at once") == 1
    assert said.count("interrupted; the same command goes on from what is saved") == 1, said
