"""Rounds, table and picture of `bench_step.py`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.bench.interleaved import LEAST_ROUNDS, ratio
from tools.bench.step_case import Contestant, Pairs

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Processor seconds of this process tell more than the wall's where other work shares the machine."""


class Timed(NamedTuple):
    """One contestant's measurements."""

    name: str
    seconds: list[float]
    num_padded_tokens: int
    error: float | None
    """Of loss and gradients against the contestant it was held against; None for that one itself."""


def interleave(
    contestants: dict[str, Contestant], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each step, in rounds ABCABC... after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(max(rounds, LEAST_ROUNDS) + 1):
        for name, contestant in contestants.items():
            begin = clock()
            contestant.step()
            if turn:
                times[name].append(clock() - begin)
    return times


def print_row(timed: list[Timed], pairs: Pairs, bases: tuple[str, ...]) -> list[dict[str, Any]]:
    """Prints and returns the figures, slowest first, with ratios of medians against each of `bases` that is there."""
    measured = {x.name: x.seconds for x in timed}
    results = []
    for x in sorted(timed, key=lambda x: -float(np.median(x.seconds))):
        low, middle, high = (float(q) for q in np.percentile(x.seconds, (20, 50, 80)))
        others = [base for base in bases if base in measured and base != x.name]
        ratios = {base: ratio(measured[base], x.seconds) for base in others}
        result = {
            "name": x.name,
            "seconds": {"p20": low, "median": middle, "p80": high, "all": x.seconds},
            "pairs_per_second": len(pairs) / middle,
            "times": {base: {"ratio": r[0], "ci95": r[1:]} for base, r in ratios.items()},
            "tokens_per_second": {
                "padded": x.num_padded_tokens / middle,
                "real": pairs.num_real_tokens / middle,
                "unique": pairs.num_unique_tokens / middle,
            },
            "num_padded_tokens": x.num_padded_tokens,
            "parity_error": x.error,
        }
        results.append(result)
        tokens = " ".join(
            f"{name} {value:.0f}" for name, value in result["tokens_per_second"].items()
        )
        against = "".join(
            f"  {r[0]:.2f}x {base} ({r[1]:.2f} to {r[2]:.2f})" for base, r in ratios.items()
        )
        parity = "" if x.error is None else f", parity {x.error:.0e}"
        print(
            f"  {x.name:22s} {result['pairs_per_second']:7.2f} pairs/s{against}\n"
            f"  {'':22s} {middle:.3f} s ({low:.3f} to {high:.3f}), tokens/s {tokens}{parity}",
            flush=True,
        )
    return results


def draw_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """Pairs/s of each contestant over the ratio of prompt to response, and ours against the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    ratios = [row["ratio"] for row in curve]
    # Who did not pass a row's parity check has a gap there.
    speeds: dict[str, np.ndarray] = {}
    for place, row in enumerate(curve):
        for x in row["contestants"]:
            values = speeds.setdefault(x["name"], np.full(len(curve), np.nan))
            values[place] = x["pairs_per_second"]
    for name, values in sorted(speeds.items()):
        left.plot(ratios, values, marker="o", label=name)
    ours = {name: values for name, values in speeds.items() if name.startswith("pal_ds")}
    for name, values in sorted(ours.items()):
        for other in sorted(speeds.keys() - ours.keys()):
            right.plot(ratios, values / speeds[other], marker="o", label=f"{name} / {other}")
    left.set_ylabel("pairs per second")
    right.set_ylabel("times as many pairs per second")
    right.axhline(1.0, color="grey", linewidth=0.8)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(ratios, [f"{value:g}" for value in ratios])
        axis.minorticks_off()
        axis.set_xlabel("prompt length / response length")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.suptitle("Bradley-Terry on a tiny Llama, equal total length")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
