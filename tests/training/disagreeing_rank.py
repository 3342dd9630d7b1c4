"""`python -m pal_ds` for a rank of two, of which rank 1 was started with something else: `CASE [WORDS...]`."""

import importlib.metadata
import os
import sys

from pal_ds.cli.main import main
from pal_ds.distributed import agreement

CHANGED_WORDS = {
    "learning rate": "--optim.learning_rate=0.5",
    "seed": "--train.seed=5",
    "micro-batch": "--train.micro_batch_pairs=2",
    "epochs": "--train.epochs=3",
    "head": "--head.init_args.num_prototypes=2",
    "engine": "--train.ds_config=zero3",
    "allow": "--allow_change=optim.learning_rate",
}


def differ(case: str) -> list[str]:
    """Make this rank another one; return the words that it gets beyond those of all."""
    if case in ("none", "run directory"):
        return []
    if case in CHANGED_WORDS:
        return [CHANGED_WORDS[case]]
    if case == "code":
        agreement._own_sources = lambda: "0" * 32
    elif case == "library":
        true = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.0.1" if name == "torch" else true(name)
    else:
        # The recipe names its files from here.
        os.chdir(case)
    return []


if __name__ == "__main__":
    case, *words = sys.argv[1:]
    if case == "run directory" and os.environ["RANK"] == "1":
        words, case = [f"{w}_other" if w.startswith("--run_dir") else w for w in words], "none"
    main([*words, *(differ(case) if os.environ["RANK"] == "1" else [])])
