"""Figures reach every tracker, a resumed run goes on under its id, and no tracker ends a run."""

import csv
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pal_ds.config.run_config import RunConfig, TrackersConfig, WandbConfig
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.trackers import Trackers, check_trackers

LINE = {"step": 1, "epoch": 0.5, "loss": 0.7, "grad_norm": None}
EVALUATION = {"step": 2, "dev_accuracy": 0.6}


def config_of(wandb: WandbConfig | None = None, **trackers: Any) -> RunConfig:
    parts = {"wandb": wandb or WandbConfig(), "trackers": TrackersConfig(**trackers)}
    return cast(RunConfig, SimpleNamespace(**parts))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.write_config("optim: {learning_rate: 0.5}\ntrain: {epochs: 2}\n")
    return run


def log(trackers: Trackers, run: RunDirectory, *rows: Any) -> None:
    for row in rows:
        run.append_metrics(row)
        trackers.log(row)


def test_csv_and_tensorboard_after_a_resume(run: RunDirectory) -> None:
    both = config_of(csv=True, tensorboard=True)
    first = Trackers(run, both, 0)
    log(first, run, LINE, EVALUATION, {"step": 3, "loss": 9.0})
    first.close()
    run.drop_metrics_after(2)
    second = Trackers(run, both, 2)
    log(second, run, {"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.4})
    second.close()
    with open(run.path / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["loss"], row["dev_accuracy"]) for row in rows] == [
        ("1", "0.7", ""),
        ("2", "", "0.6"),
        ("3", "0.5", ""),
        ("4", "0.4", ""),
    ]
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("loss")] == [
        (1, 0.7),
        (3, 0.5),
        (4, 0.4),
    ]
    assert [e.step for e in events.Scalars("dev_accuracy")] == [2]
    assert "grad_norm" not in events.Tags()["scalars"]


def test_wandb_goes_on_under_its_id(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment says where to send, as the recipe does not."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(WandbConfig(project="p", group="g", tags=["t"], entity="e"))
    for step in (0, 1):
        trackers = Trackers(run, config, step)
        import wandb

        assert wandb.run is not None and wandb.run.settings._offline
        found = wandb.run.id, wandb.run.group, wandb.run.tags, wandb.run.entity
        assert wandb.run.config["optim"] == {"learning_rate": 0.5}
        log(trackers, run, {**LINE, "step": step + 1})
        trackers.close()
        assert found == (run.tracker_ids()["wandb"], "g", ("t",), "e")
    # offline-run-<time>-<id>, and a number behind it where two began within one second.
    assert len({p.name.split("-")[3] for p in run.path.glob("wandb/offline-run-*")}) == 1
    named = Trackers(run, config_of(WandbConfig(project="p", mode="offline", id="mine")), 0)
    assert wandb.run is not None and wandb.run.id == "mine"
    named.close()


def test_what_cannot_be_opened_is_told_before_the_first_update(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HOME": str(run.path), "WANDB_BASE_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"wandb: cannot be opened .* WANDB_MODE"):
        Trackers(run, config_of(WandbConfig(project="p", mode="online")), 0)
    with pytest.raises(UserError, match=r"trackers\.trackio: trackio is not installed"):
        check_trackers(config_of(trackio="p"))
    check_trackers(config_of(csv=True, tensorboard=True))


class Recorded(ModuleType):
    """A stand-in for a library: notes what is called, and fails at the second line."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*values: Any, **options: Any) -> Any:
            self.calls.append((name, values or options))
            if [c[0] for c in self.calls].count("log_metrics") + [c[0] for c in self.calls].count(
                "log"
            ) > 1:
                raise ConnectionError("the server is gone")
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        return call


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_a_tracker_that_fails_is_left(
    name: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = Recorded(name)
    monkeypatch.setitem(sys.modules, name, library)
    chosen: dict[str, Any] = {name: "project"}
    trackers = Trackers(run, config_of(csv=True, **chosen), 0)
    with caplog.at_level(logging.WARNING):
        log(trackers, run, LINE, EVALUATION, {"step": 3, "loss": 0.1})
    trackers.close()
    assert f"trackers.{name}: gets no figures from here on (ConnectionError: the" in caplog.text
    logged = [values for called, values in library.calls if called.startswith("log")]
    assert ({"epoch": 0.5, "loss": 0.7},) in logged and len(logged) <= 3
    assert len((run.path / "metrics.csv").read_text().splitlines()) == 4
    assert list(json.loads(run.trackers_file.read_text())) == [name]
