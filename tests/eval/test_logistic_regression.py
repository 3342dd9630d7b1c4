"""Regressions of many users against scipy's minimiser, comparisons left out for real, and users who do not mix."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from pal_ds.eval import logistic_regression
from pal_ds.eval.logistic_regression import (
    OwnedPairs,
    Regressions,
    fit_regressions,
    weights_of,
)

H = 6
COUNTS = (0, 1, 2, 3, 5, 6, 9, 40, 0)
"""Comparisons of the users: none, fewer than H (dual), H and more (primal)."""


def owned(counts: tuple[int, ...] = COUNTS, seed: int = 0, scale: float = 1.0) -> OwnedPairs:
    """Users of their own taste each, who err now and then; some pairs are of two users."""
    draw = np.random.default_rng(seed)
    owner = draw.permutation(np.repeat(np.arange(len(counts)), counts))
    taste = draw.standard_normal((len(counts), H))
    pool = draw.standard_normal((30, H))
    pair = draw.integers(0, 30, len(owner))
    right = draw.random(len(owner)) < expit(2 * (pool[pair] * taste[owner]).sum(1))
    differences = np.concatenate([pool, -pool])
    # Of each pair of the pool the responses are its own.
    responses = np.tile(np.arange(60).reshape(30, 2), (2, 1))
    return OwnedPairs(
        torch.from_numpy(scale * differences).float(),
        responses,
        np.where(right, pair, pair + 30),
        owner,
        len(counts),
    )


def reference(features: np.ndarray, strength: float) -> np.ndarray:
    """w of one user on features of unit root mean square, by scipy."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = features @ w
        gradient = strength * w - features.T @ expit(-margins)
        return float(strength / 2 * w @ w - log_expit(margins).sum()), gradient

    options = {"gtol": 1e-12, "ftol": 1e-16, "maxiter": 2000}
    return minimize(
        objective, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options=options
    ).x


def features_of(pairs: OwnedPairs, user: int) -> np.ndarray:
    features = pairs.differences[torch.from_numpy(pairs.pair[pairs.owner == user])].double()
    return (features / features.square().sum(1).mean().sqrt()).numpy()


def all_weights(pairs: OwnedPairs, fitted: Regressions) -> np.ndarray:
    parts = [weights for _, weights in weights_of(pairs, fitted)]
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize("strength", [30.0, 1.0, 0.01])
def test_weights_are_those_of_a_reference_solver(strength: float) -> None:
    pairs = owned(scale=7.0)
    weights = all_weights(pairs, fit_regressions(pairs, (strength,)))
    for user, count in enumerate(COUNTS):
        if count == 0:
            assert not weights[user].any()
            continue
        features = features_of(pairs, user)
        raw = pairs.differences[torch.from_numpy(pairs.pair[pairs.owner == user])].double().numpy()
        # The same margins: w is in units of the scaled features there, of the raw ones here.
        assert raw @ weights[user] == pytest.approx(
            features @ reference(features, strength), rel=1e-5, abs=1e-6
        )


def test_dual_and_primal_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs as many as features either is exact; 64 features that are 6 turned make the dual of many pairs."""
    pairs = owned(counts=(40, 17))
    turned = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((64, H)))[0])
    wide = pairs._replace(differences=pairs.differences @ turned.float().T)
    primal, dual = fit_regressions(pairs), fit_regressions(wide)
    assert torch.equal(primal.strength, dual.strength)
    assert torch.allclose(primal.coefficients, dual.coefficients, atol=1e-5)
    assert torch.allclose(primal.left_out, dual.left_out, atol=1e-4)


def test_left_out_margins_are_near_those_of_fits_without_the_pair() -> None:
    pairs = owned()
    for strength, bound in ((3.0, 0.02), (0.3, 0.12)):
        fitted = fit_regressions(pairs, (strength,))
        for user, count in enumerate(COUNTS):
            if count == 0:
                continue
            features = features_of(pairs, user)
            pair = pairs.pair[pairs.owner == user] % 30
            exact = [
                features[i] @ reference(features[pair != pair[i]], strength) for i in range(count)
            ]
            near = fitted.left_out[torch.from_numpy(pairs.owner == user)].numpy()
            assert near == pytest.approx(np.asarray(exact), abs=bound * (1 + np.abs(exact).max()))


def of_votes(num_users: int = 20, num_statements: int = 12, width: int = 24) -> OwnedPairs:
    """Users who like or dislike statements by a coin, and compare each that they like with each that they do not."""
    draw = np.random.default_rng(3)
    statements = draw.standard_normal((num_statements, width))
    responses, owner = [], []
    for user in range(num_users):
        likes = draw.permutation(num_statements) < num_statements // 2
        for pair in product(np.flatnonzero(likes), np.flatnonzero(~likes)):
            responses.append(pair)
            owner.append(user)
    liked, other = np.transpose(responses)
    differences = torch.from_numpy(statements[liked] - statements[other]).float()
    rows = np.arange(len(owner))
    return OwnedPairs(differences, np.asarray(responses), rows, np.asarray(owner), num_users)


def test_what_shares_a_response_is_left_out_with_a_pair() -> None:
    pairs = of_votes(num_users=2, num_statements=7)
    for strength, bound in ((3.0, 0.02), (0.3, 0.15)):
        fitted = fit_regressions(pairs, (strength,))
        for user in range(2):
            features, responses = features_of(pairs, user), pairs.responses[pairs.owner == user]
            exact = [
                one @ reference(features[~np.isin(responses, both).any(1)], strength)
                for one, both in zip(features, responses, strict=True)
            ]
            near = fitted.left_out[torch.from_numpy(pairs.owner == user)].numpy()
            assert near == pytest.approx(np.asarray(exact), abs=bound * np.abs(exact).max())


def test_a_taste_by_coin_is_not_taken_for_one() -> None:
    """Pairs left out one by one are implied by others of the same responses: each user would take the weakest."""
    pairs = of_votes()
    alone = pairs._replace(responses=np.arange(2 * len(pairs.pair)).reshape(-1, 2))
    assert (fit_regressions(alone).strength == logistic_regression.STRENGTHS[-1]).all()
    strengths = fit_regressions(pairs).strength
    # Half of the users seem to have a taste, by chance.
    assert (strengths == logistic_regression.STRENGTHS[0]).double().mean() > 0.3
    assert (strengths == logistic_regression.STRENGTHS[-1]).double().mean() < 0.1


def test_the_strength_is_the_users_own_choice() -> None:
    """Nobody's fit depends on who is fitted beside them, and the chosen strength has the lowest left-out loss."""
    pairs = owned()
    fitted = fit_regressions(pairs)
    assert fitted.strength.isnan().tolist() == [count == 0 for count in COUNTS]
    for user, count in enumerate(COUNTS):
        mine = pairs.owner == user
        if count == 0:
            continue
        nobody_else = np.zeros(count, np.int64)
        alone = OwnedPairs(pairs.differences, pairs.responses, pairs.pair[mine], nobody_else, 1)
        by_itself = fit_regressions(alone)
        index = torch.from_numpy(mine)
        assert by_itself.strength[0] == fitted.strength[user]
        assert torch.allclose(by_itself.coefficients, fitted.coefficients[index], rtol=1e-6)
        losses = {
            strength: float(-log_expit(fit_regressions(alone, (strength,)).left_out.numpy()).mean())
            for strength in logistic_regression.STRENGTHS
        }
        assert losses[float(by_itself.strength[0])] <= min(losses.values()) + 1e-6
    # Whose only pair is left out has nothing left: every strength is equal, and the strongest is taken.
    only = COUNTS.index(1)
    assert fitted.strength[only] == logistic_regression.STRENGTHS[0]
    assert fitted.left_out[torch.from_numpy(pairs.owner == only)].abs().max() < 1e-9


def test_small_batches_and_features_that_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = owned()
    whole = fit_regressions(pairs)
    weights = all_weights(pairs, whole)
    monkeypatch.setattr(logistic_regression, "FLOATS_PER_BATCH", 20)
    again = fit_regressions(pairs)
    assert torch.allclose(whole.coefficients, again.coefficients, rtol=1e-6)
    assert all_weights(pairs, again) == pytest.approx(weights, abs=1e-6)
    equal = pairs._replace(differences=torch.zeros_like(pairs.differences))
    assert not all_weights(equal, fit_regressions(equal)).any()
