"""Loading of what a run took over (D/init, see `copy.py`) into a fresh head and a fresh user table."""

from safetensors.torch import load_file

from pal_ds.config.run_config import RunConfig
from pal_ds.heads.base import Head
from pal_ds.runs.run_dir import OriginFacts, RunDirectory
from pal_ds.users import USER_FILES, StoredUsers, TrainedUsers

HEAD_FILE = "head.safetensors"


def load_taken_over(
    config: RunConfig, run: RunDirectory, head: Head, users: TrainedUsers
) -> OriginFacts | None:
    """Load the head and users that D/init holds; return what the run came from (origin.json).

    None for a run without `train.init_from`.

    Raises:
        UserError: D/init is missing, or its table lacks a user who was removed from the run.
    """
    if config.train.init_from is None:
        return None
    facts = run.origin_facts()
    if (run.init / HEAD_FILE).is_file():
        head.load_state_dict(load_file(run.init / HEAD_FILE))
    if (run.init / USER_FILES[0]).is_file():
        stored = StoredUsers(run.init)
        # Here, too: the checkpoint's table is held against this one.
        stored.refuse_removed(users.ids)
        users.restore(stored)
    return facts
