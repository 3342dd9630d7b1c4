"""Users: id <-> row, mixture logits, and an Adam whose cost does not depend on their number.

The table lives outside the model and outside ZeRO-3. A step reads rows as a leaf, takes their gradients back as (row,
gradient, position in the update) and moves those rows alone, so 10 users and 10 million cost the same, and a user can
be added, moved or forgotten without touching the model. Up to a size every rank holds the whole table; beyond it each
holds a slice of the rows. Either way the same gathered gradients are applied in the same order, hence the same bits.
Needs torch and pyarrow. Axes: U users, K prototypes, n gradient rows of an update.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pal_ds.users.config import RowPriorState as RowPriorState
    from pal_ds.users.config import UsersConfig as UsersConfig
    from pal_ds.users.files import USER_FILES as USER_FILES
    from pal_ds.users.files import StoredUsers as StoredUsers
    from pal_ds.users.row_prior import RowPrior as RowPrior
    from pal_ds.users.sharded import Shard as Shard
    from pal_ds.users.sharded import ShardedUserTable as ShardedUserTable
    from pal_ds.users.sharded import TrainedUsers as TrainedUsers
    from pal_ds.users.sharded import trained_users as trained_users
    from pal_ds.users.table import UserTable as UserTable

_MODULE_OF = {
    "USER_FILES": "files",
    "RowPrior": "row_prior",
    "RowPriorState": "config",
    "Shard": "sharded",
    "ShardedUserTable": "sharded",
    "StoredUsers": "files",
    "TrainedUsers": "sharded",
    "UserTable": "table",
    "UsersConfig": "config",
    "trained_users": "sharded",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use: reading ids, as preparing data does, needs no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
