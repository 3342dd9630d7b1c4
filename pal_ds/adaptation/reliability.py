"""The reliability of new users: the factor exp(r) of their margins under which their comparisons are likeliest.

r_u minimises  sum_i loss(label_i exp(r) margin_i) + r^2 / (2 sigma^2)  over the user's comparisons, at given margins.
`fit.py` takes turns: points under the reliability so far, then the reliability under these points.
"""

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.losses import PreferenceLoss

NUM_TURNS = 3
"""By then the objective of a user falls by less than a hundredth of a nat a turn."""
REACH = 4.0
"""Standard deviations of the prior within which r is sought."""
NUM_PLACES = 17
"""Places tried at a time; then as many between the neighbours of the best. For one number that is cheap, needs no
derivative and finds the lowest of several minima."""
NUM_ZOOMS = 4


@torch.no_grad()
def most_likely_reliability(
    margin: Float[Tensor, "B T"],
    comparisons: UserComparisons,
    num_users: int,
    *,
    loss: PreferenceLoss,
    variance: float,
) -> Float[Tensor, "U"]:
    """r of each user, to a thousandth of the prior's standard deviation, fp32.

    A user without comparisons, or with margins that are no numbers, has r = 0.

    Args:
        margin: of each comparison at its user's point, before any factor.
        comparisons: whose each is, and what the user said.
        num_users: U.
        loss: of the run.
        variance: sigma^2 of the prior.
    """
    owner, facts = comparisons.user, comparisons.facts
    best = margin.new_zeros(num_users)
    reach = REACH * variance**0.5
    places = torch.linspace(-1, 1, NUM_PLACES, device=margin.device)
    for _ in range(NUM_ZOOMS):
        tried = best + reach * places[:, None]
        cost = tried.square() / (2 * variance)
        for place, r in enumerate(tried):
            each = loss(
                margin * r[owner].exp()[:, None],
                facts.label,
                facts.start,
                facts.end,
                facts.required_margin,
                target=facts.target,
                threshold=comparisons.threshold,
            )
            cost[place].index_add_(0, owner, facts.weight * each)
        best = tried.gather(0, cost.argmin(0, keepdim=True))[0]
        best = torch.where(cost.isfinite().all(0), best, 0.0)
        reach *= 2 / (NUM_PLACES - 1)
    return best
