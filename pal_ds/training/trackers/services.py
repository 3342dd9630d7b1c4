"""Trackers that may send figures elsewhere: Weights & Biases, trackio, MLflow. Each is imported only where asked for.

Keys and addresses come from their own environment variables and files, never through a recipe.
"""

import os
import secrets
from importlib import import_module

from pal_ds.config.run_config import TrackersConfig, WandbConfig
from pal_ds.training.trackers.base import Row, Start, Tracker, flat, numbers, step_of


class Wandb(Tracker):
    """One run there for a run directory, however often it is resumed."""

    key = "wandb"
    remedy = "Log in (wandb login), set wandb.mode (or WANDB_MODE) to offline, or leave wandb.project out"

    def __init__(self, start: Start) -> None:
        import wandb

        settings = start.wandb
        own = settings.id or start.kept_id("wandb") or os.environ.get("WANDB_RUN_ID")
        its_id = own or secrets.token_hex(4)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            group=settings.group,
            tags=settings.tags,
            # None: WANDB_MODE decides.
            mode=settings.mode,
            id=its_id,
            resume="allow",
            config=dict(start.recipe),
            dir=str(start.run.path),
        )
        start.keep_id("wandb", its_id)

    @classmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """True where `wandb.project` is given."""
        return wandb.project is not None

    def log(self, row: Row) -> None:
        """Send the line, missing figures as they are."""
        self._run.log(dict(row), step=step_of(row))

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class Trackio(Tracker):
    """A run of a trackio project, by the name of the run directory."""

    key = "trackers.trackio"
    remedy = "Install it (pip install trackio), or leave trackers.trackio out"

    def __init__(self, start: Start) -> None:
        self._trackio = import_module("trackio")
        name = start.kept_id("trackio") or f"{start.run.path.name}-{secrets.token_hex(3)}"
        project = start.trackers.trackio
        self._trackio.init(project=project, name=name, config=flat(start.recipe), resume="allow")
        start.keep_id("trackio", name)

    @classmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """True where `trackers.trackio` names a project."""
        return trackers.trackio is not None

    def log(self, row: Row) -> None:
        """Send the figures."""
        self._trackio.log(numbers(row), step=step_of(row))

    def close(self) -> None:
        """Wait until all is written."""
        self._trackio.finish()


class MLflow(Tracker):
    """A run of an MLflow experiment; MLFLOW_TRACKING_URI says where."""

    key = "trackers.mlflow"
    remedy = (
        "Install it (pip install mlflow), look at MLFLOW_TRACKING_URI, or leave trackers.mlflow out"
    )

    def __init__(self, start: Start) -> None:
        self._mlflow = import_module("mlflow")
        self._mlflow.set_experiment(start.trackers.mlflow)
        kept = start.kept_id("mlflow")
        run = self._mlflow.start_run(run_id=kept, run_name=None if kept else start.run.path.name)
        if kept is None:
            start.keep_id("mlflow", run.info.run_id)
            # MLflow refuses longer values.
            values = {name: str(value)[:500] for name, value in flat(start.recipe).items()}
            self._mlflow.log_params(values)

    @classmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """True where `trackers.mlflow` names an experiment."""
        return trackers.mlflow is not None

    def log(self, row: Row) -> None:
        """Send the figures."""
        self._mlflow.log_metrics(numbers(row), step=step_of(row))

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()
