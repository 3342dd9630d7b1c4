"""Breaches of the contract of heads and losses by somebody's own are told in words, before weights are read."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pal_ds.api import train
from pal_ds.errors import UserError
from pal_ds.heads import HEADS
from pal_ds.heads.base import Features, Head, UserState
from pal_ds.losses import MarginLoss
from pal_ds.modeling.own_classes import try_head, try_loss, warn_of_no_bound
from tests.tiny_run import TinyRun

H, T = 8, 3


class Sound(Head):
    """Mixes K linear rewards; `spoil` makes of its rewards what a test wants."""

    needs = frozenset({"logits"})
    num_prototypes = 3

    def __init__(self, hidden_size: int, spoil: Any = None) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_size, 3)
        self.spoil = spoil

    def mixture_weights(self, user: UserState) -> Tensor:
        """The user's point."""
        if user.mixture is not None:
            return user.mixture
        assert user.logits is not None
        return user.logits.softmax(-1)

    def reward(self, features: Features, user: UserState) -> Tensor:
        """One reward each."""
        each = self.map(features.response)[features.response_index]
        reward = torch.einsum("brtk,bk->brt", each, self.mixture_weights(user))
        return reward if self.spoil is None else self.spoil(reward)


class ForAll(Sound):
    """One reward for everyone, which says that it reads logits."""

    def reward(self, features: Features, user: UserState) -> Tensor:
        """One reward each."""
        return self.map(features.response)[features.response_index].sum(-1)


class Deaf(Sound):
    """Takes no notice of a mixture that it is given."""

    def mixture_weights(self, user: UserState) -> Tensor:
        """The same point for all whose logits are not there."""
        given = torch.zeros(3, 3) if user.logits is None else user.logits
        return given.softmax(-1)


class Wide(Sound):
    """Points of another width."""

    def mixture_weights(self, user: UserState) -> Tensor:
        """One number too many."""
        point = super().mixture_weights(user)
        return torch.cat([point, point[:, :1]], 1) if user.logits is not None else point

    def reward(self, features: Features, user: UserState) -> Tensor:
        """One reward each."""
        point = self.mixture_weights(user)[:, :3]
        return super().reward(features, UserState(mixture=point))


class Uninitialised(Sound):
    """Forgets nn.Module."""

    def __init__(self, hidden_size: int) -> None:  # pylint: disable=super-init-not-called
        self.size = hidden_size


def raising(_: Tensor) -> Tensor:
    raise KeyError("theme")


BREACHES = [
    (lambda r: r.sum(-1), r"reward\(\) returns the shape \[3, 2\] where it must be \[3, 2, 3\]"),
    (lambda r: r[:1], r"the shape \[1, 2, 3\]"),
    (lambda r: r.half(), "returns torch.float16; it must be torch.float32"),
    (lambda r: None, r"reward\(\) returns None"),
    (lambda r: (r, r), r"reward\(\) returns a tuple"),
    (lambda r: r.detach(), "its rewards have no gradient"),
    (lambda r: r / 0, "numbers that are not finite"),
    (lambda r: r + torch.randn_like(r), "other rewards each time, in eval mode"),
    (raising, r"raised KeyError \('theme'\) at .*test_own_classes.py:\d+"),
]


@pytest.mark.parametrize(("spoil", "words"), BREACHES)
def test_rewards_that_break_the_contract(spoil: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"head: {__name__}.Sound.*{words}"):
        try_head(Sound(H, spoil), H, T)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (ForAll, "needs has logits, and its rewards do not depend on user.logits"),
        (Deaf, "other rewards where user.mixture"),
        (Wide, r"mixture_weights\(\) returns the shape \[3, 4\] where it must be \[3, 3\]"),
        (Uninitialised, r"does not call super\(\).__init__\(\) first"),
    ],
)
def test_heads_that_break_the_contract(cls: type[Head], words: str) -> None:
    with pytest.raises(UserError, match=words):
        try_head(cls(H), H, T)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("needs", ["logits"], "it must be a frozenset of what the head reads"),
        ("needs", frozenset({"logit"}), r"needs is frozenset\(\{'logit'\}\)"),
        ("num_prototypes", 0, "num_prototypes is 0; it must be a number of 1 or more"),
        ("num_prototypes", None, "num_prototypes is None"),
    ],
)
def test_what_a_head_says_of_itself(name: str, value: object, words: str) -> None:
    head = Sound(H)
    setattr(head, name, value)
    with pytest.raises(UserError, match=words):
        try_head(head, H, T)


def test_a_sound_head_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    head, before = Sound(H), torch.random.get_rng_state()
    try_head(head, H, T)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert head.training and all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_the_contract_is_that_of_our_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pal_ds.modeling.own_classes.is_own", lambda _: True)
    for num_positions in (1, T):
        try_head(HEADS[name](H), H, num_positions)


class Shape(MarginLoss):
    """A logistic loss; `spoil` makes of it what a test wants."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def __call__(self, margin: Tensor) -> Tensor:
        """One loss each."""
        return self.spoil(nn.functional.softplus(-margin))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v: v.mean(), r"the shape \[\] where it must be \[6, 1\]: one loss for each margin"),
        (lambda v: None, "returns None"),
        (lambda v: v.detach(), "without a gradient in the margins"),
        (lambda v: v * float("nan"), "not finite"),
        (raising, r"raised KeyError \('theme'\) at .*test_own_classes.py:\d+"),
    ],
)
def test_losses_that_break_the_contract(spoil: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"loss.shape: {__name__}.Shape.*{words}"):
        try_loss(Shape(spoil))
    try_loss(Shape(lambda v: v))


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (lambda v: v, None),
        (lambda v: 0.5 * v.square() - 3, None),
        (lambda v: -torch.exp(-v), None),
        (lambda v: -v, "at a margin of -1000, and -1e+06 at -1e+06"),
        (lambda v: -torch.log1p(v), "at a margin of -1000, and -13.8 at -1e+06"),
        (lambda v: torch.log(v), "-inf at a margin of 1000, and -inf at 1e+06"),
    ],
)
def test_a_loss_without_a_lower_bound_is_warned_of(
    spoil: Any, place: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_no_bound(Shape(spoil))
    assert ("has no lower bound" in caplog.text) == (place is not None)
    assert (place or "") in caplog.text


def test_an_exit_in_a_head_of_ones_own_is_told() -> None:
    def leaving(_: Tensor) -> Tensor:
        sys.exit(3)

    with pytest.raises(UserError, match=r"raised SystemExit \(3\) at .*test_own_classes.py:\d+"):
        try_head(Sound(H, leaving), H, T)


class Unmade(Sound):
    """Its constructor fails."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        raise KeyError("weights")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (Uninitialised, "super"),
        (Unmade, r"constructor raised KeyError \('weights'\) at .*test_own_classes"),
        (functools.partial(Sound, spoil=3), "raised TypeError"),
    ],
)
def test_a_training_refuses_them_before_it_reads_weights(
    head: Any, words: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    recipe = {
        "data": {"path": str(tiny_run.data)},
        "backbone": {"path": str(tiny_run.base), "tuning": "frozen"},
        "train": {"batch_pairs": 8, "ds_config": "zero0"},
    }
    with pytest.raises(UserError, match=words):
        train(recipe, tmp_path / "run", head=head)
    assert not (tmp_path / "run/config.yaml").exists()
