"""Entropies and distances of prototypes against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from pal_ds.eval.diagnostics import context_flip, diagnose, diagnose_latent
from pal_ds.heads import HEADS


def head_with(points: list[list[float]]):
    """An ideal-point head whose users are mixtures of these very points."""
    made = HEADS["PalA"](2, num_prototypes=len(points), dim=2, user_point="Pw")
    with torch.no_grad():
        made.prototypes.copy_(torch.tensor(points))
    return made


def test_users_of_one_prototype_each() -> None:
    head = head_with([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    found = diagnose(head, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    assert found["users"] == 2 and found["prototypes"] == 3
    assert found["user_entropy_mean"] == 0.0
    assert found["effective_prototypes"] == pytest.approx(2.0)
    assert found["effective_prototypes_per_user"] == pytest.approx(1.0)
    assert found["prototype_shares"] == [0.5, 0.5, 0.0]
    rows = torch.tensor(found["prototype_distances"])
    torch.testing.assert_close(rows, torch.tensor([[0.0, 5, 10], [5, 0, 5], [10, 5, 0]]))
    assert found["distance_min"] == pytest.approx(5.0)
    assert found["distance_mean"] == pytest.approx(20 / 3)
    assert found["cosine_max"] == pytest.approx(1.0)


def test_mixed_users() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    found = diagnose(head_with([[1.0, 0.0], [0.0, 2.0]]), weights)
    one, other = math.log(2), -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    mean = -0.65 * math.log(0.65) - 0.35 * math.log(0.35)
    assert found["user_entropy_mean"] == pytest.approx((one + other) / 2, rel=1e-6)
    assert found["effective_prototypes"] == pytest.approx(math.exp(mean), rel=1e-6)
    per_user = (2 + math.exp(other)) / 2
    assert found["effective_prototypes_per_user"] == pytest.approx(per_user, rel=1e-6)
    assert found["distance_min"] == pytest.approx(math.sqrt(5))
    assert found["cosine_max"] == pytest.approx(0.0, abs=1e-12)


def test_distances_are_those_of_the_points_users_have_not_of_what_is_stored() -> None:
    """For `f(Pw)` prototype k is f(p_k)."""
    torch.manual_seed(0)
    head = HEADS["PalA"](4, num_prototypes=3, dim=5, dropout=0.5).train()
    found = diagnose(head, torch.full((2, 3), 1 / 3))
    with torch.no_grad():
        points = head.eval().projector(head.prototypes).double()
    expected = torch.cdist(points, points)
    torch.testing.assert_close(
        torch.tensor(found["prototype_distances"], dtype=torch.float64),
        expected,
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_every_key(name: str) -> None:
    head = HEADS[name](4)
    nobody = diagnose(head, torch.empty(0, head.num_prototypes))
    assert nobody.keys() == diagnose(head_with([[0.0, 0.0]]), torch.ones(1, 1)).keys()
    assert nobody["user_entropy_mean"] is None and nobody["prototype_shares"] is None


def test_active_units_are_those_that_vary_over_users() -> None:
    points = torch.tensor([[1.0, 0.0, 0.05], [-1.0, 0.0, 0.05], [0.0, 0.0, 0.0]])
    assert diagnose_latent(points) == {
        "users": 3,
        "latent_units": 3,
        "active_units": pytest.approx(1 / 3),
    }
    assert diagnose_latent(points[:1])["active_units"] is None


def test_a_context_flip_counts_the_pairs_that_turn_around() -> None:
    margins, turned = np.array([1.0, -2.0, 3.0, 4.0]), np.array([-0.1, -2.0, -1.0, -4.0])
    known, disputed = np.array([True, True, True, False]), np.array([True, False, False, True])
    found = context_flip(margins, turned, known, disputed)
    assert found == {"all": pytest.approx(2 / 3), "controversial": 1.0}
    assert context_flip(margins, turned, ~known, ~disputed)["controversial"] is None
