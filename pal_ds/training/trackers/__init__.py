"""Where the figures of metrics.jsonl also go: Weights & Biases, TensorBoard, CSV, trackio, MLflow."""

from pal_ds.training.trackers.chosen import Trackers, check_trackers

__all__ = ["Trackers", "check_trackers"]
