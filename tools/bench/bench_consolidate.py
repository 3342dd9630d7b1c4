"""A large random decoder under ZeRO-3 on two ranks: bytes of parameters per rank, then peak memory of consolidation.

    python tools/bench/bench_consolidate.py [--hidden_size 1024 --num_layers 24] [--out runs/bench_consolidate]

Needs about 20 GB of memory and 12 GB of disk at the default 400M parameters. Figures: parameter bytes per rank over
the whole model's (bound 0.55), and the exporter's peak resident memory against two checkpoint shards + 1 GB.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_consolidate"))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    write_inputs(options)
    started = time.monotonic()
    figures = train_one_update(options.out)
    trained = time.monotonic()
    figures |= consolidate(options.out)
    figures |= {
        "train_seconds": trained - started,
        "consolidate_seconds": time.monotonic() - trained,
    }
    from tools.bench.environment import describe_environment

    print(json.dumps({"environment": describe_environment(), **figures}, indent=1))
    share, peak, bound = (
        figures["parameter_share_per_rank"],
        figures["peak_gib"],
        figures["peak_bound_gib"],
    )
    print(f"parameter bytes per rank / whole: {share:.3f} (bound 0.55)")
    print(f"peak memory of consolidation: {peak:.2f} GiB (bound {bound:.2f} GiB)")


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


def consolidate(out: Path) -> dict[str, float]:
    """Runs tools/consolidate.py as a child and reads that child's peak resident memory."""
    shards = sorted((out / "run" / "checkpoints").glob("step_*/engine/*optim_states.pt"))
    command = [
        sys.executable,
        str(ROOT / "tools" / "consolidate.py"),
        str(out / "run"),
        str(out / "exported"),
    ]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"consolidation failed with status {status}")
    shard = max(path.stat().st_size for path in shards)
    peak = usage.ru_maxrss * 1024
    return {
        "shard_gib": shard / GIB,
        "peak_gib": peak / GIB,
        "peak_bound_gib": (2 * shard + 1e9) / GIB,
    }


if __name__ == "__main__":
    main()
