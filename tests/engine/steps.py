"""Checkpoints made by hand: small, of a known content, without a training."""

import json
from pathlib import Path
from typing import Any

import torch

from pal_ds.engine.checkpoint.manifest import MANIFEST, entry_of, write_manifest
from pal_ds.runs.run_dir import RunDirectory

SHARDS = {"a_model_states.pt": 10, "b_model_states.pt": 3000, "c_optim_states.pt": 500}
"""Name and number of values of each."""


def make_step(run: RunDirectory, step: int) -> Path:
    """An intact step with three shards and a user file."""
    path = run.checkpoint(step)
    (path / "engine").mkdir(parents=True)
    for name, num_values in SHARDS.items():
        torch.save({"x": torch.full((num_values,), float(step))}, path / "engine" / name)
    (path / "users.arrow").write_text(f"users of step {step}")
    names = ["users.arrow", *(f"engine/{name}" for name in SHARDS)]
    facts = {"step": step, "world_size": 2, "num_threads": 1, "dataset_hash": "x"}
    write_manifest(path, {**facts, "files": {name: entry_of(path / name) for name in names}})
    return path


def of_format(path: Path, version: int) -> None:
    """Makes a step what another version of pal_ds would have written; format 1 had no checksum."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    manifest["format_version"] = version
    if version == 1:
        del manifest["checksum"]
    else:
        manifest |= {"checksum": "a checksum of another kind", "added_later": [1, 2]}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2))
