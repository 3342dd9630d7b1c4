"""metrics.jsonl: appended durably, read around what a kill or a foreign hand left in it."""

from pathlib import Path

import pytest

from pal_ds.runs.run_dir import RunDirectory


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "lo', "", "null", "[]", '{"loss": 1}', '{"step": "2"}', "\x00", "[" * 5000],
)
def test_a_foreign_line_is_passed_over(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1, "loss": 0.5})
    with open(run.metrics_file, "a") as stream:
        stream.write(line + "\n")
    run.append_metrics({"step": 3, "loss": 0.25})
    assert [row["step"] for row in run.read_metrics()] == [1, 3]
    assert "metrics.jsonl:2: no line of ours; passed over" in caplog.text
    run.drop_metrics_after(2)
    assert run.metrics_file.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_file.write_bytes(b'\xff\xfe\n{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
