"""A whole training step beside the PAL reference's, TRL's and OpenRLHF's: same weights, same token ids, same pairs.

    python tools/bench/bench_step.py --reference PATH [--trl] [--openrlhf PATH] [--rounds 7] [--json FILE] [--png FILE]

PATH is a checkout (RamyaLab/pluralistic-alignment, OpenRLHF/OpenRLHF); a contestant that cannot run says why and is
left out. All run in one process, in rounds ABCABC..., fp32, on equal threads; a row is printed for those contestants
alone whose loss and gradients agreed before. What each contestant is: README.md, `The whole step`.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.distributed.world import World
from pal_ds.engine.process_group import distributed
from tools.bench.contestants_pal_ds import Method, PalDs
from tools.bench.environment import describe_environment
from tools.bench.step_case import Case, Contestant, Unavailable, make_case
from tools.bench.step_report import CLOCKS, Timed, draw_curve, interleave, print_row

LARGEST_ERROR = 1e-4
"""Of a gradient against its own largest entry, or 1/100 of the largest of any: the gradients of key biases, and of the
bias that moves responses and users alike, are zero in theory and noise in practice."""
RATIOS = (0.4, 1.6, 4.0, 11.0)
TOTAL_LENGTH = 416
"""Prompt and one response of the curve's pairs."""


BASES = ("reference", "trl", "openrlhf")
"""Whom the others are compared with."""


class Entry(NamedTuple):
    """A contestant of a row, built when its turn comes; it must compute what `like` (an earlier one) does."""

    make: Callable[[dict[str, Tensor]], Contestant]
    """From the weights of the first."""
    like: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", help="checkout of the PAL reference"
    )
    parser.add_argument(
        "--trl", action="store_true", help="TRL's RewardTrainer, if it is installed"
    )
    parser.add_argument("--openrlhf", type=Path, metavar="PATH", help="checkout of OpenRLHF")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[4], help="of a step against the reference"
    )
    parser.add_argument("--curve_pairs", type=int, default=8, help="of a step on the curve")
    parser.add_argument("--families", nargs="*", default=["opt", "llama"])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: beside other work, one thread"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="the curve over prompt/response ratios"
    )
    options = parser.parse_args()
    quiet()
    about = {**describe_environment(), "trl": version("trl") if find_spec("trl") else None}
    print(
        json.dumps(
            {"environment": about, "rounds": options.rounds, "clock": options.clock}, indent=1
        ),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch, distributed() as world:
        results = reference_rows(options, Path(scratch), world)
        curve = curve_rows(options, Path(scratch), world)
    if options.json:
        everything = {"environment": about, "steps": results, "curve": curve}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.png and curve:
        draw_curve(curve, options.png)


def quiet() -> None:
    """Their warnings are about settings that this benchmark chose."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "accelerate", "src", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.CRITICAL)


def reference_rows(
    options: argparse.Namespace, scratch: Path, world: World
) -> list[dict[str, Any]]:
    """TL;DR-like lengths, PAL-A and PAL-B: from the reference's step to ours, one change after the other."""
    results = []
    for num_pairs in options.pairs:
        for family in options.families:
            case = make_case(family, num_pairs, (380, 35), scratch, **_sizes(options))
            for method in ("pal_a", "pal_b"):
                name = f"{method}, {family}, B {num_pairs}, prompt 380, response 35"
                entries = ladder(case, method, options.reference, world)
                results.append(run_row(name, case, entries, options))
    return results


def ladder(case: Case, method: Method, checkout: Path | None, world: World) -> dict[str, Entry]:
    """The first computes what the reference does, and all others start from its weights."""
    same: Method = "pal_b_aligned" if method == "pal_b" else method
    first = "padded to the longest"

    def ours(method: Method, *arguments: Any) -> Callable[..., Contestant]:
        return lambda _: PalDs(case, method, world, *arguments)

    def theirs(*, vectorised: bool) -> Callable[..., Contestant]:
        def make(weights: dict[str, Tensor]) -> Contestant:
            from tools.bench.contestants_reference import Reference

            if checkout is None:
                raise Unavailable("no --reference given")
            return Reference(case, method, checkout, weights, vectorised=vectorised)

        return make

    entries = {
        first: Entry(ours(same), None),
        "reference": Entry(theirs(vectorised=False), first),
        "vectorised loss": Entry(theirs(vectorised=True), first),
        "head on the window": Entry(ours(same, "padded", 512), first),
        "packed": Entry(ours(same, "packed"), first),
    }
    if method == "pal_b":
        joint = "joint, padded"
        entries |= {
            joint: Entry(ours("pal_b"), None),
            "joint, packed": Entry(ours("pal_b", "packed"), joint),
        }
    return entries


def curve_rows(options: argparse.Namespace, scratch: Path, world: World) -> list[dict[str, Any]]:
    """Bradley-Terry on a Llama at equal total length, over the ratio of prompt to response."""
    results = []
    for ratio in RATIOS if options.trl or options.openrlhf else ():
        response = round(TOTAL_LENGTH / (1 + ratio))
        lengths = (TOTAL_LENGTH - response, response)
        case = make_case("llama", options.curve_pairs, lengths, scratch, **_sizes(options))
        name = f"bradley_terry, llama, B {options.curve_pairs}, prompt {lengths[0]}, response {lengths[1]}"
        entries = scalar_entries(case, options, world)
        results.append({"ratio": ratio, **run_row(name, case, entries, options)})
    return results


def scalar_entries(case: Case, options: argparse.Namespace, world: World) -> dict[str, Entry]:
    def trl(weights: dict[str, Tensor]) -> Contestant:
        from tools.bench.contestants_trl import Trl

        return Trl(case, weights)

    def openrlhf(weights: dict[str, Tensor]) -> Contestant:
        from tools.bench.contestants_openrlhf import OpenRlhf

        return OpenRlhf(case, weights, options.openrlhf)

    first = "pal_ds, padded"
    entries = {first: Entry(lambda _: PalDs(case, "bradley_terry", world), None)}
    if options.trl:
        entries["trl"] = Entry(trl, first)
    if options.openrlhf:
        entries["openrlhf"] = Entry(openrlhf, first)
    packed = lambda _: PalDs(case, "bradley_terry", world, "packed")  # noqa: E731
    return {**entries, "pal_ds, packed": Entry(packed, first)}


def run_row(
    name: str, case: Case, entries: dict[str, Entry], options: argparse.Namespace
) -> dict[str, Any]:
    """Builds the contestants, holds their loss and gradients against each other, and times those that agree."""
    built: dict[str, Contestant] = {}
    loss_and_gradients: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    weights: dict[str, Tensor] = {}
    print(f"\n{name}", flush=True)
    for label, entry in entries.items():
        try:
            contestant = entry.make(weights)
        except Unavailable as reason:
            print(f"  {label:24s} left out: {reason}")
            continue
        if isinstance(contestant, PalDs) and not weights:
            weights = contestant.weights()
        loss_and_gradients[label] = contestant.loss_and_gradients()
        if entry.like is not None:
            errors[label] = largest_error(loss_and_gradients[label], loss_and_gradients[entry.like])
            if not errors[label] <= LARGEST_ERROR:
                print(
                    f"  {label:24s} NOT MEASURED: differs from {entry.like} by {errors[label]:.1e}"
                )
                continue
        built[label] = contestant
    del loss_and_gradients
    timed = [
        Timed(label, seconds, built[label].num_padded_tokens, errors.get(label))
        for label, seconds in interleave(built, options.rounds, CLOCKS[options.clock]).items()
    ]
    result = print_row(timed, case.timed, BASES)
    for contestant in built.values():
        if isinstance(contestant, PalDs):
            contestant.close()
    return {"name": name, "contestants": result}


def largest_error(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of loss and gradients, each against its own scale; infinite where one lacks a gradient."""
    if made.keys() != wanted.keys():
        return float("inf")
    overall = max(float(x.abs().max()) for name, x in wanted.items() if name != "loss")
    return max(
        float((made[name].view_as(x) - x).abs().max())
        / max(float(x.abs().max()), overall / 100 if name != "loss" else 1e-30)
        for name, x in wanted.items()
    )


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("hidden_size", "num_layers", "vocab_size")}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
