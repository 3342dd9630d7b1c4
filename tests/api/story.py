"""The Python API from its first call to its last in one process, or in one per rank: what it returned, as JSON.

python -m tests.api.story FOLDER      # FOLDER holds my_head.py and its neighbours, my_head.yaml and votes.jsonl
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pal_ds
from pal_ds import UserError
from tests.api.votes import new_users

TEXTS = [
    {"prompt": "What of tea, 3?", "response": "tea is fine 2."},
    {"prompt": "What of tea, 3?", "response": "tea is a matter one may speak of for long 2."},
]


def refused(call: functools.partial) -> str:
    """What a UserError said."""
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def trainings(report: dict[str, Any]) -> tuple[pal_ds.Run, pal_ds.Run]:
    """Stopped, refused, resumed, and another: four groups of ranks come and go."""
    recipe = Path("my_head.yaml")
    # Its recipe is a file, and names classes of our own.
    report["without leave"] = refused(functools.partial(pal_ds.train, recipe, "runs/x"))
    train = functools.partial(pal_ds.train, trust_code=True)
    first = train(recipe, "runs/first", **{"train.stop_after": 5})
    report["stopped"] = first.status
    faster = {"optim.learning_rate": 5.0}
    report["refused"] = refused(functools.partial(train, recipe, "runs/first", **faster))
    report["no such key"] = refused(functools.partial(train, recipe, "runs/x", **{"optim.rate": 1}))
    first = train(recipe, "runs/first")
    report["read without leave"] = refused(functools.partial(pal_ds.evaluate, first.path))
    report["finished"] = first.status
    report["figures"] = pal_ds.evaluate(first)
    sys.path.append(str(Path.cwd()))
    from my_head import Centred  # pyright: ignore
    from my_loss import Focal  # pyright: ignore

    head = functools.partial(Centred, num_prototypes=2, dim=8)
    second = train([recipe, {"loss": {"shape": Focal(gamma=0.5)}}], "runs/second", head=head)
    report["same metrics"] = pal_ds.evaluate(second)["users"] == report["figures"]["users"]
    report["metrics"] = first.metrics
    return first, second


def after_training(report: dict[str, Any], run: pal_ds.Run) -> None:
    """New users, scores and a folder; one process."""
    report["users"] = run.users()
    adapted = pal_ds.adapt(run, new_users(), "adapted")
    report["mixtures"] = adapted.mixtures
    figures = pal_ds.evaluate(run, data=new_users(), users=adapted)
    report["of new users"] = {
        name: figures[name] for name in ("accuracy", "pairs", "adapted_users")
    }
    report["scores"] = pal_ds.score(run, TEXTS, user="n1", users=adapted)
    report["facts"] = pal_ds.consolidate(run, "out", user="n1", users=adapted)
    report["exported"] = pal_ds.score("out", TEXTS)
    pal_ds.consolidate(run, "each", users=adapted)
    report["each"] = [pal_ds.score(f"each/{user}", TEXTS) for user in ("n0", "n1")]
    report["ids as a folder"] = refused(
        functools.partial(pal_ds.consolidate, run, "o", users=["n0", "n1"])
    )
    report["a folder as ids"] = refused(
        functools.partial(pal_ds.consolidate, run, "o", user_ids="n0,n1")
    )
    report["by its own code"] = pal_ds.score("out", TEXTS, trust_remote_code=True)
    report["no such option"] = refused(functools.partial(pal_ds.consolidate, run, "o", dtyp="bf16"))


def main(folder: str) -> None:
    os.chdir(folder)
    report: dict[str, Any] = {}
    first, _ = trainings(report)
    alone = "RANK" not in os.environ
    if alone:
        after_training(report, first)
    if os.environ.get("RANK", "0") == "0":
        report["variables left"] = [name for name in ("RANK", "MASTER_PORT") if name in os.environ]
        Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
