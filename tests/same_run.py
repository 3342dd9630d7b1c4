"""Whether two runs are the same to the bit: what their checkpoints and metrics hold, without what a clock wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pal_ds.engine.checkpoint.verify import verify_checkpoint


def figures(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "pairs_per_second"} for row in rows]


def assert_same_step(one: Path, other: Path, *, tensors_only: bool = False) -> int:
    """Two `step_N` directories hold equal weights, moments, step counts, rates and user rows.

    `tensors_only` leaves rates out, which two updates of one run do not share.

    Returns the number of tensors compared.
    """
    wanted, found = verify_checkpoint(one), verify_checkpoint(other)
    assert found["files"].keys() == wanted["files"].keys()
    num_tensors = 0
    for name in wanted["files"]:
        if name.endswith(("optim_states.pt", "model_states.pt")):
            for a, b in leaves(trained(load(one / name)), trained(load(other / name))):
                num_tensors += isinstance(a, torch.Tensor)
                if isinstance(a, torch.Tensor):
                    assert torch.equal(a, b), name
                else:
                    assert tensors_only or a == b, name
    for key, rows in load_file(one / "users.safetensors").items():
        num_tensors += 1
        assert torch.equal(rows, load_file(other / "users.safetensors")[key]), key
    return num_tensors


def trained(shard: dict[str, Any]) -> dict[str, Any]:
    """What training changes of a shard: a model file also counts steps and names versions."""
    kept = {key: shard[key] for key in ("module", "optimizer") if shard.get(key) is not None}
    return kept if "module" in shard else shard


def load(path: Path) -> Any:
    """What the tests themselves have just written."""
    return torch.load(path, weights_only=False)


def leaves(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Tensors and numbers at the same place of two nested states."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            yield from leaves(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            yield from leaves(x, y)
    elif isinstance(a, torch.Tensor | int | float):
        yield a, b
