"""Worker of test_evaluate: evaluates a file of pairs and stores margins and figures of rank 0."""

import json
import sys
from pathlib import Path

import numpy as np

from pal_ds.engine.dist import distributed, leave
from pal_ds.evaluate import predict
from pal_ds.evaluate_run import evaluate_run, known_users, opened_pairs, reader_of
from pal_ds.restore import restore
from pal_ds.run_dir import RunDirectory


def main(run_dir: str, pairs: str, out: str) -> None:
    run, file = RunDirectory(run_dir), Path(pairs)
    with distributed() as world:
        figures = evaluate_run(run, world, file=file, name=f"world{world.world_size}")
        restored = restore(run)
        known = known_users(restored, None)
        with opened_pairs(restored, file, world) as data:
            rows = np.arange(len(data.comparisons))
            reader = reader_of(restored, data, rows, known.table_rows(data), world)
            margins = predict(reader.model, reader.collator, rows, known.mixtures, 2, world)
        if world.is_rank_zero:
            np.save(Path(out) / f"margins{world.world_size}.npy", margins)
            (Path(out) / f"figures{world.world_size}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
