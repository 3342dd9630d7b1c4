"""What DeepSpeed prints while ranks meet goes into the log, which `--quiet` silences, and not among results."""

import logging

import pytest

from pal_ds.engine.process_group import prints_as_log_lines


def test_prints_are_log_lines(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pal_ds")
    with pytest.raises(KeyError), prints_as_log_lines():
        print("DeepSpeed built successfully")
        raise KeyError
    assert capsys.readouterr().out == ""
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "DeepSpeed built successfully")
    ]
