"""Clusters of points: those that are there are found, and none where there are none."""

import pytest
import torch

from pal_ds.adaptation import gaussian_mixture
from pal_ds.adaptation.gaussian_mixture import Clusters, _fit, _log_density, find_clusters, shrunk
from tests.adaptation.test_prior import CORNERS, blobs


@pytest.mark.parametrize("num_each", [6, 30, 2000])
def test_finds_the_clusters_that_are_there(num_each: int) -> None:
    found = find_clusters(blobs(num_each, 0.3))
    assert found is not None and len(found.weight) == 4
    nearest = torch.cdist(CORNERS.double(), found.mean).min(1).values
    assert nearest.max() < 0.5
    assert found.weight.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("num_points", [0, 1, 3, 7, 40, 400, 5000])
def test_a_single_gaussian_has_no_clusters(num_points: int) -> None:
    draw = torch.Generator().manual_seed(num_points)
    assert find_clusters(torch.randn(num_points, 5, generator=draw).double()) is None


@pytest.mark.parametrize("num_points", [8, 12, 16, 24])
def test_a_few_points_of_one_gaussian_have_no_clusters(num_points: int) -> None:
    """The best of their partitions is a little better than none: in a third of these draws, of 8 points."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        assert find_clusters(torch.randn(num_points, 3, generator=draw).double()) is None


@pytest.mark.parametrize("num_each", [300, 2000, 2500])
def test_users_may_come_in_a_fixed_turn_of_groups(num_each: int) -> None:
    """As user 0, 4, 8 .. of one group and 1, 5, 9 .. of another do: whoever is looked at is of all of them."""
    found = find_clusters(blobs(num_each, 0.3).view(4, num_each, 4).transpose(0, 1).reshape(-1, 4))
    assert found is not None and len(found.weight) == 4
    assert found.weight.tolist() == pytest.approx([0.25] * 4, abs=0.05)


def test_clusters_that_overlap_are_found_too() -> None:
    """Of six users each, one unit of spread and four of distance: BIC's own measure, no stricter one, tells them."""
    found = [find_clusters(blobs(6, 1.0, seed)) for seed in range(5)]
    assert all(each is not None and len(each.weight) in (4, 5) for each in found)


def test_steps_of_em_raise_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where clusters overlap, who is nearest to which centre is not the answer yet."""
    points = blobs(150, 1.5)
    ended = _fit(points, 4).log_likelihood
    monkeypatch.setattr(gaussian_mixture, "MAX_STEPS", 1)
    assert ended > _fit(points, 4).log_likelihood + 1


def test_covariances_of_few_points_are_shrunk() -> None:
    covariance = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    expected = (8 * covariance + 8 * 3 * torch.eye(2)) / 16 + 1e-3 * torch.eye(2)
    torch.testing.assert_close(shrunk(covariance, 8), expected)
    flat = shrunk(torch.zeros(2, 2).double(), 8)
    torch.testing.assert_close(flat, 0.051 * torch.eye(2).double())


def test_a_fit_that_has_not_converged_is_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gaussian_mixture, "MAX_STEPS", 1)
    found = find_clusters(blobs(30, 0.3))
    assert found is not None and len(found.weight) == 4


def test_alike_users_and_one_prototype_have_no_clusters() -> None:
    assert find_clusters(torch.zeros(50, 3).double()) is None
    assert find_clusters(torch.zeros(50, 0).double()) is None


def test_log_density_is_that_of_a_mixture_of_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=draw).double()
    covariance = root @ root.T + 0.1 * torch.eye(3)
    weight, mean = torch.tensor([0.2, 0.8]).double(), torch.randn(2, 3, generator=draw).double()
    points = torch.randn(20, 3, generator=draw).double()
    parts = torch.distributions.MultivariateNormal(mean, covariance)
    expected = parts.log_prob(points[:, None]) + weight.log()
    own = _log_density(points, Clusters(weight, mean, covariance, 0.0))
    torch.testing.assert_close(own, expected)
