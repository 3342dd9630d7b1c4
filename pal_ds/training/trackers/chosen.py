"""The trackers that a recipe asks for: opened before the first update, given each line, and never the end of a run."""

import logging
from importlib.util import find_spec

import yaml

from pal_ds.config.run_config import RunConfig
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.trackers.base import Row, Start, Tracker
from pal_ds.training.trackers.files import Csv, TensorBoard
from pal_ds.training.trackers.services import MLflow, Trackio, Wandb

logger = logging.getLogger(__name__)

KINDS: tuple[type[Tracker], ...] = (Csv, TensorBoard, Wandb, Trackio, MLflow)
_LIBRARIES = {Wandb: "wandb", Trackio: "trackio", MLflow: "mlflow", TensorBoard: "tensorboard"}


def check_trackers(config: RunConfig) -> None:
    """Raise UserError where the library of a tracker that the recipe asks for is not installed."""
    for kind, library in _LIBRARIES.items():
        if kind.is_wanted(config.wandb, config.trackers) and find_spec(library) is None:
            raise UserError(f"{kind.key}: {library} is not installed. {kind.remedy}.")


class Trackers:
    """All of them; on rank 0 only."""

    def __init__(self, run: RunDirectory, config: RunConfig, step: int) -> None:
        """Open them. Raises UserError where one cannot be."""
        recipe = yaml.safe_load(run.config_file.read_text()) if run.config_file.is_file() else {}
        start = Start(run, step, recipe, config.wandb, config.trackers)
        self._open: list[Tracker] = []
        for kind in KINDS:
            if kind.is_wanted(config.wandb, config.trackers):
                try:
                    self._open.append(kind(start))
                # Each library has exceptions of its own, and passes on those of the network.
                except Exception as error:
                    self.close()
                    raise UserError(
                        f"{kind.key}: cannot be opened ({_reason(error)}). {kind.remedy}."
                    ) from error

    def log(self, row: Row) -> None:
        """Give each a line; one that fails is told of and left."""
        for tracker in list(self._open):
            try:
                tracker.log(row)
            except Exception as error:
                self._open.remove(tracker)
                logger.warning(
                    "%s: gets no figures from here on (%s); metrics.jsonl has them all",
                    tracker.key,
                    _reason(error),
                )

    def close(self) -> None:
        """Close each; one that fails is told of."""
        while self._open:
            tracker = self._open.pop()
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s: was not closed in order (%s)", tracker.key, _reason(error))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
