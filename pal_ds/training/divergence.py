"""A training whose end is no result: weights that are not finite, or updates of which most were skipped."""

import torch

from pal_ds.errors import NumericError
from pal_ds.training.state import Training
from pal_ds.users import UserTable

_REMEDY = (
    "The training diverged: see metrics.jsonl. Lower optim.learning_rate and users.learning_rate, or set "
    "train.gradient_clipping, and train in another --run_dir."
)


def refuse_lost(state: Training) -> None:
    """Look at what a training comes to, before it is saved as its end; every rank calls it.

    Raises:
        NumericError: on every rank, where a weight or a user's logit is not finite, or where all updates are made and
            most were skipped.
    """
    lost = [name for names in state.world.gather(_not_finite(state)) for name in names]
    if lost:
        raise NumericError(
            f"after update {state.step} weights are not finite numbers ({lost[0]}, and {len(lost) - 1} others): such a "
            f"model scores nothing. {_REMEDY}"
        )
    skipped = state.guard.num_skipped
    if state.step == state.num_updates and 2 * skipped > state.num_updates:
        raise NumericError(
            f"{skipped} of {state.num_updates} updates were skipped (see skipped_updates in metrics.jsonl), so hardly "
            f"anything was learnt. {_REMEDY}"
        )


@torch.no_grad()
def _not_finite(state: Training) -> list[str]:
    """Names of the trained tensors that hold something else than finite numbers, of the parts that this rank holds."""
    parts = {
        # Under ZeRO-3 a rank has a partition of each.
        name: getattr(parameter, "ds_tensor", parameter)
        for name, parameter in state.engine.module.named_parameters()
        if parameter.requires_grad
    }
    users = state.users
    held = users if isinstance(users, UserTable) else users.own
    parts["users"] = held.logits
    for name in held.scalars:
        parts[f"users ({name})"] = getattr(held, f"log_{name}")
    return [name for name, values in parts.items() if not bool(torch.isfinite(values).all())]
