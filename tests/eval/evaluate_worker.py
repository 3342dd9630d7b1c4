"""Worker of test_evaluate: evaluates a file of pairs and one of lists; stores scores and figures of rank 0."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.eval import best_of_n
from pal_ds.eval.best_of_n import rank_set
from pal_ds.eval.evaluate import evaluate_run, opened_pairs
from pal_ds.eval.results import EvalRequest, file_request
from pal_ds.inference.load_run import restore
from pal_ds.inference.readers import known_users, reader_of
from pal_ds.inference.scoring import Forwards
from pal_ds.runs.run_dir import RunDirectory


def main(run_dir: str, pairs: str, lists: str, out: str) -> None:
    run, file = RunDirectory(run_dir), Path(pairs)
    with distributed() as world:
        figures = evaluate_run(run, world, request=file_request(file, f"world{world.world_size}"))
        restored = restore(run)
        known = known_users(restored, None)
        with opened_pairs(restored, file, world) as data:
            rows = np.arange(len(data.comparisons))
            reader = reader_of(restored, data, rows, known.table_rows(data), world)
            tokens = restored.config.train.micro_batch_tokens
            forwards = Forwards(reader.model, reader.collator, 2, world, tokens)
            margins = forwards.margins(rows, known.mixtures)
            rewards = forwards.rewards(rows, known.mixtures)
        size = world.world_size
        found: dict[str, np.ndarray] = {"margins": margins, "rewards": rewards}
        kinds, score = iter(("listed", "compared")), best_of_n.score_candidates

        def recorded(*arguments: Any) -> np.ndarray:
            kind = next(kinds)
            found[f"{kind}_first"] = arguments[3].first
            found[kind] = score(*arguments)
            return found[kind]

        best_of_n.score_candidates = recorded
        ranked = [
            rank_set(restored, known, EvalRequest(f"lists{size}", "test", Path(lists)), world),
            rank_set(restored, known, EvalRequest(f"compared{size}", "train", None), world),
        ]
        if world.is_rank_zero:
            (Path(out) / f"ranked{size}.json").write_text(json.dumps(ranked))
            np.savez(Path(out) / f"scores{size}.npz", **found)
            (Path(out) / f"figures{size}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
