"""Rows of a benchmark: parity before speed, contestants interleaved, medians with spread, ratios with an interval."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Contestant = Callable[[], list[Tensor]]
"""Runs once and returns what is compared: a loss and its gradients, or scores."""
LEAST_ROUNDS = 7
COPY_BYTES = 2**30


def row(
    name: str,
    contestants: dict[str, Contestant],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Parity, then interleaved timing; prints the row and returns median seconds."""
    results = {x: run() for x, run in contestants.items()}
    first = next(iter(results))
    for x, result in results.items():
        for made, wanted in zip(result, results[first], strict=True):
            tolerance = 2e-2 if made.dtype == torch.bfloat16 else 2e-4
            error = float(
                (made.float() - wanted.float()).abs().max() / wanted.abs().max().clamp(min=1e-30)
            )
            if not error <= tolerance:
                print(f"{name}: NOT MEASURED, {x} differs from {first} by {error:.1e}")
                return {}
    times: dict[str, list[float]] = {x: [] for x in contestants}
    for _ in range(max(rounds, LEAST_ROUNDS)):
        for x, run in contestants.items():
            times[x].append(seconds_of(run, clock))
    print(name)
    for x, measured in times.items():
        low, middle, high = (1e3 * float(q) for q in np.percentile(measured, (20, 50, 80)))
        line = f"  {x:20s} {middle:10.4f} ms ({low:.4f} to {high:.4f})"
        if x != first:
            line += "  {:.3g}x ({:.3g} to {:.3g})".format(*ratio(times[first], measured))
        print(line, flush=True)
    return {x: float(np.median(measured)) for x, measured in times.items()}


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Ratio of medians with a 95% interval: rounds are drawn together, for they were run together."""
    a, b = np.asarray(slow), np.asarray(fast)
    draws = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    ratios = np.median(a[draws], 1) / np.median(b[draws], 1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(a) / np.median(b)), float(low), float(high)


def seconds_of(run: Contestant, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run: repeated for at least 5 ms on a CPU; on a GPU 20 runs, each after its L2 was flushed."""
    if not torch.cuda.is_available():
        count, begin = 0, clock()
        while count == 0 or clock() - begin < 5e-3:
            run()
            count += 1
        return (clock() - begin) / count
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    spent = []
    for _ in range(20):
        flush.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        run()
        marks[1].record()
        torch.cuda.synchronize()
        spent.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return float(np.median(spent))


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, read and write counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: [target.copy_(source)])


def peak_memory(run: Contestant) -> int:
    """Bytes above what is held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
