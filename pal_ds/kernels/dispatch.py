"""Choice of a kernel's implementation: by the shipped table, never by timing, and said once with its reason."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from pal_ds.kernels.dispatch_table import LIMITS, TABLE, Implementation, Row

logger = logging.getLogger(__name__)
_DTYPES = ("float32", "bfloat16", "float16")


def choose(
    kernel: str,
    tensor: Tensor,
    sizes: Mapping[str, int],
    demanded: Implementation | None = None,
    table: tuple[Row, ...] = TABLE,
) -> Implementation:
    """The implementation for a tensor's device and dtype and these sizes; `demanded` overrules the table.

    Raises ValueError where what was demanded cannot run. The choice reads nothing that differs between ranks of
    one cluster, nor anything that changes between two runs.
    """
    hardware, dtype = hardware_of(tensor.device), str(tensor.dtype).removeprefix("torch.")
    if demanded is not None:
        if demanded not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ValueError(f"implementation is {demanded!r}; it must be one of {known}.")
        obstacle = _obstacle(kernel, dtype, sizes) if demanded == "triton" else None
        if obstacle is not None:
            raise ValueError(f"{kernel}: the Triton kernel cannot run here: {obstacle}.")
        _say(kernel, hardware, dtype, demanded, "demanded by the caller")
        return demanded
    for row in table:
        if _fits(row, kernel, hardware, dtype, sizes):
            obstacle = _obstacle(kernel, dtype, sizes) if row.implementation == "triton" else None
            if obstacle is None:
                _say(kernel, hardware, dtype, row.implementation, row.evidence)
                return row.implementation
            _say(kernel, hardware, dtype, "torch", obstacle)
            return "torch"
    reason = "no row of the dispatch table covers this hardware, dtype and shape"
    _say(kernel, hardware, dtype, "torch", reason)
    return "torch"


def covers(kernel: str, device: torch.device, table: tuple[Row, ...] = TABLE) -> bool:
    """Return whether the table holds anything but the reference for a kernel on this hardware."""
    hardware = hardware_of(device)
    return any(
        (row.kernel, row.hardware) == (kernel, hardware) and row.implementation != "torch"
        for row in table
    )


def hardware_of(device: torch.device) -> str:
    """`cpu`, `sm_90` and the like, or the device's type where it has no compute capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def has_triton() -> bool:
    """Return whether triton is installed; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a reference, kept: shapes are traced as symbols so that ragged batches do not recompile."""
    return torch.compile(function, dynamic=True)


def _fits(row: Row, kernel: str, hardware: str, dtype: str, sizes: Mapping[str, int]) -> bool:
    named = (row.kernel, row.hardware, row.dtype) == (kernel, hardware, dtype)
    return named and all(low <= sizes[name] <= high for name, (low, high) in row.bounds.items())


def _obstacle(kernel: str, dtype: str, sizes: Mapping[str, int]) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if dtype not in _DTYPES:
        return f"its arithmetic is fp32 and the input is {dtype}"
    for name, largest in LIMITS[kernel].items():
        if sizes[name] > largest:
            return f"{name} is {sizes[name]} and it is written for {largest} at most"
    return None


@functools.cache
def _say(kernel: str, hardware: str, dtype: str, implementation: str, reason: str) -> None:
    """Logs a choice; the cache makes it once."""
    logger.info("kernel %s on %s, %s: %s (%s)", kernel, hardware, dtype, implementation, reason)
