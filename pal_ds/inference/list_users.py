"""List the users of a run with their mixtures."""

from pal_ds.engine.checkpoint.forget import finish_interrupted_removal
from pal_ds.engine.checkpoint.verify import refuse_strangers_code
from pal_ds.inference.load_run import open_run
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.runs.run_dir import RunDirectory


def list_users(run: RunDirectory, step: str = "latest") -> list[tuple[str, list[float] | None]]:
    """(user id, mixture as the run's head uses it in evaluation) of every user of a checkpoint.

    None for a head whose table tells nothing of its users: it knows them by comparisons or groups.

    Raises:
        UserError: the run or its data cannot be opened.
    """
    run.require_run()
    finish_interrupted_removal(run)
    # No weights are read here, and opening a run unpickles nothing that could run code; its own code is another matter.
    refuse_strangers_code(run)
    opened = open_run(run, step, trust=True)
    head = opened.parts.head
    if head.is_personal and "logits" not in head.needs:
        return [(user_id, None) for user_id in opened.users.ids]
    mixtures = user_mixtures(head, opened.users)[:-1]
    return list(zip(opened.users.ids, mixtures.tolist(), strict=True))
