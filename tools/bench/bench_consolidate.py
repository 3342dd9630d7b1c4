"""A large random decoder under ZeRO-3 on two ranks: bytes per rank; consolidation's memory, and its speed beside cp.

    python tools/bench/bench_consolidate.py [--hidden_size 1024 --num_layers 24] [--out runs/bench_consolidate]
        [--rounds 5] [--clock wall] [--keep]

Needs about 20 GB of memory and 12 GB of disk at the default 400M parameters, and as much disk again for copies.
Figures: parameter bytes per rank over the whole model's (bound 0.55); in rounds, `cp -r` of the step directory with
fsync, `cp` of the exported weights with fsync, and a consolidation (manifest verified, result scored against the run,
fsync), each from a warm page cache; the exporter's peak resident memory above its own imports, against two shards.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GIB = 2**30
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
}
"""Processor seconds leave out what a disk is waited for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_consolidate"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: beside other work")
    parser.add_argument("--keep", action="store_true", help="take the run that lies in --out")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.keep and not any((options.out / "run" / "checkpoints").glob("step_*")):
        parser.error(f"--keep: no run lies in {options.out}; leave it out to make one.")
    if not options.keep:
        shutil.rmtree(options.out, ignore_errors=True)
        options.out.mkdir(parents=True)
        write_inputs(options)
        figures |= train_one_update(options.out)
    figures |= race(options.out, options.rounds, options.clock)
    from tools.bench.environment import describe_environment
    from tools.bench.interleaved import ratio

    print(json.dumps({"environment": describe_environment(), **figures}, indent=1))
    if "parameter_share_per_rank" in figures:
        share = figures["parameter_share_per_rank"]
        print(f"parameter bytes per rank / whole: {share:.3f} (bound 0.55)")
    print(
        f"peak memory of consolidation above its imports: {figures['peak_gib']:.2f} GiB "
        f"(two shards: {2 * figures['shard_gib']:.2f} GiB)"
    )
    for name, seconds in figures["seconds"].items():
        line = f"{name}: {figures['median_seconds'][name]:.2f} s"
        for other in ("cp of the step", "cp of the export"):
            line += ", {:.2f} ({:.2f} to {:.2f}) of the speed of ".format(
                *ratio(figures["seconds"][other], seconds)
            )
            line += other
        print(line)


def write_inputs(options: argparse.Namespace) -> None:
    """Forty synthetic comparisons and a random decoder on disk."""
    from pal_ds.backbones.config import BackboneConfig
    from pal_ds.backbones.transformer import materialise_architecture
    from pal_ds.data.prepare import DataConfig, prepare
    from pal_ds.data.sources import Synthetic

    source = Synthetic(num_users=4, num_unseen_users=2, comparisons_per_user=64, num_prompts=64)
    settings = {
        "path": str(options.out / "data"),
        "source": source,
        "max_length": 128,
        "split": "field",
    }
    data = prepare(DataConfig(**settings), quiet=True)
    architecture = {
        "model_type": "llama",
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": options.hidden_size // 64,
    }
    vocab_size = data.info["tokens"]["vocab_size"]
    materialise_architecture(
        BackboneConfig(architecture=architecture), vocab_size, 0, options.out / "base"
    )


def train_one_update(out: Path) -> dict[str, float]:
    """One update by the command line on two ranks; the share of parameter bytes that it reports for a rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "pal_ds", "train", "--head=PalA", "--head.num_prototypes=4"),
        *(
            f"--data.path={out / 'data'}",
            f"--backbone.path={out / 'base'}",
            f"--run_dir={out / 'run'}",
        ),
        *(
            "--train.ds_config=zero3_cpu",
            "--train.batch_pairs=4",
            "--train.micro_batch_pairs=2",
            "--train.stop_after=1",
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=environment, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr)
    number, share = re.findall(
        r"([\d,]+) parameters, ([\d.]+) of their bytes on this rank", done.stderr
    )[0]
    return {
        "num_parameters": int(number.replace(",", "")),
        "parameter_share_per_rank": float(share),
    }


def race(out: Path, rounds: int, clock: str) -> dict[str, Any]:
    """Copies and consolidations in turn: seconds of each, sizes, and the largest memory of a consolidation."""
    step = max((out / "run" / "checkpoints").glob("step_*"))
    shards = sorted(step.glob("engine/*optim_states.pt"))
    seconds: dict[str, list[float]] = {}
    peaks = []
    # The first is not counted: it brings the files into memory.
    for turn in range(rounds + 1):
        whole, inner, moved, peak = consolidate(out / "run", out / "exported", clock)
        taken = {
            "consolidation": whole,
            "consolidation without start": inner,
            "the same without scoring": moved,
            "cp of the step": copy(step, out / "copy", clock),
            "cp of the export": copy(out / "exported", out / "copy", clock),
        }
        peaks.append(peak)
        for name, value in taken.items() if turn else ():
            seconds.setdefault(name, []).append(value)
    return {
        "step_gib": size_of(step) / GIB,
        "export_gib": size_of(out / "exported") / GIB,
        "shard_gib": max(path.stat().st_size for path in shards) / GIB,
        "peak_gib": max(peaks) / GIB,
        "seconds": seconds,
        "median_seconds": {
            name: sorted(values)[len(values) // 2] for name, values in seconds.items()
        },
    }


CONSOLIDATE = """
import gc, json, resource, sys, time
from pathlib import Path
from pal_ds.export import ExportOptions, export, folder
from pal_ds.runs.run_dir import RunDirectory
clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
scoring, check = [], folder._check
def timed(*arguments):
    begin = clock()
    try:
        return check(*arguments)
    finally:
        scoring.append(clock() - begin)
folder._check = timed
gc.freeze()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, begin = peak(), clock()
export(RunDirectory(sys.argv[1]), Path(sys.argv[2]), ExportOptions(quiet=True))
inner = clock() - begin
print(json.dumps([inner, inner - sum(scoring), peak() - before]))
"""
"""What tools/consolidate.py does, with clocks around it and around the scoring of samples."""


def consolidate(run: Path, out: Path, clock: str) -> tuple[float, float, float, int]:
    """Seconds of a child: all of it, without its start, and without scoring too; peak bytes above its imports."""
    shutil.rmtree(out, ignore_errors=True)
    begin = CLOCKS[clock]()
    done = subprocess.run(
        [sys.executable, "-c", CONSOLIDATE, str(run), str(out), clock],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    whole = CLOCKS[clock]() - begin
    inner, moved, peak = json.loads(done.stdout.splitlines()[-1])
    return whole, inner, moved, peak


def copy(source: Path, target: Path, clock: str) -> float:
    """Seconds of `cp -r` and of an fsync of each file."""
    shutil.rmtree(target, ignore_errors=True)
    begin = CLOCKS[clock]()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    seconds = CLOCKS[clock]() - begin
    shutil.rmtree(target)
    return seconds


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
