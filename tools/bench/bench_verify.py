"""Seconds to verify prepared data, a checkpoint and an exported folder of 10 GB, each by one process.

    python tools/bench/bench_verify.py [--gigabytes 10] [--out /tmp/bench_verify] [--rounds 1]

The files hold random bytes, so that no file system stores less; all three listings name the same ones (hard links), and
they are deleted afterwards. `cold`: the page cache was told to let go of them; what a disk under them kept is its own
affair. Prepared data and checkpoints are hashed with xxh3, exports with sha256. Ranks share files out among themselves.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GB = 10**9
NUM_FILES = 8
BLOCK = os.urandom(1 << 26)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench_verify"))
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    from tools.bench.environment import describe_environment

    if options.out.exists():
        parser.error(f"--out {options.out}: exists, and it would be deleted.")
    try:
        cases = write_cases(options.out, int(options.gigabytes * GB / NUM_FILES))
        print(
            json.dumps({"environment": describe_environment(), "cores": os.cpu_count()}, indent=1)
        )
        print("| what | cold s | GB/s | warm s | GB/s | processor s |\n|---|---|---|---|---|---|")
        for name, verify in cases.items():
            cold = min(timed(verify, options.out, cold=True)[0] for _ in range(options.rounds))
            warm, busy = min(timed(verify, options.out, cold=False) for _ in range(options.rounds))
            size = options.gigabytes
            print(
                f"| {name} | {cold:.1f} | {size / cold:.2f} | {warm:.1f} | {size / warm:.2f} | {busy:.1f} |"
            )
    finally:
        shutil.rmtree(options.out, ignore_errors=True)


def write_cases(out: Path, size: int) -> dict[str, Callable[[], object]]:
    """Write the files and a listing of each kind; returns how each is verified."""
    import torch

    from pal_ds.data.verification import verify_content
    from pal_ds.distributed.world import World
    from pal_ds.engine.checkpoint.manifest import write_manifest
    from pal_ds.engine.checkpoint.verify import verify_checkpoint
    from pal_ds.export.contents import verify_export, write_facts
    from pal_ds.io.sealed import list_files

    os.environ["PAL_DS_CACHE"] = str(out / "marks")
    data, step, export = (out / name for name in ("data", "step_00000001", "export"))
    for folder in (data, step, export):
        folder.mkdir(parents=True)
    for number in range(NUM_FILES):
        name = f"{number}.safetensors"
        with open(data / name, "wb") as stream:
            for begin in range(0, size, len(BLOCK)):
                stream.write(BLOCK[: size - begin])
        for folder in (step, export):
            os.link(data / name, folder / name)
    files: Any = list_files(data, without="dataset.json")
    (data / "dataset.json").write_text("{}")
    facts = {"step": 1, "world_size": 1, "num_threads": 1, "dataset_hash": "", "files": files}
    write_manifest(step, facts)  # pyright: ignore[reportArgumentType]
    tokens = json.loads((ROOT / "tests/artefacts/kept/exported/pal_a/export.json").read_text())
    facts = {**tokens, "format_version": 2}
    write_facts(export, facts)  # pyright: ignore[reportArgumentType]
    alone = World(0, 1, torch.device("cpu"))
    return {
        "prepared data": lambda: verify_content(data, {"files": files}, alone),
        "checkpoint": lambda: verify_checkpoint(step),
        "export": lambda: verify_export(export, whole=True),
    }


def timed(verify: Callable[[], object], out: Path, *, cold: bool) -> tuple[float, float]:
    """(seconds, seconds of the processor) of one verification."""
    for file in out.rglob("*.safetensors") if cold else ():
        with open(file, "rb") as stream, contextlib.suppress(OSError):
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, busy = time.perf_counter(), time.process_time()
    verify()
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()
