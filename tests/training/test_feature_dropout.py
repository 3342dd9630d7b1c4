"""Dropout on what heads read: for every head, in training alone, and alike for all who read a text."""

import logging
from collections import namedtuple
from typing import Any, cast

import pytest
import torch
from torch import nn

from pal_ds.config.run_config import RunConfig, TrainConfig
from pal_ds.errors import UserError
from pal_ds.heads import BradleyTerry, Features, PalA, PalB, UserState
from pal_ds.heads.projector import has_inert_dropout
from pal_ds.model import RewardModel
from pal_ds.training.setup import check_before_loading

H = 64
_Batch = namedtuple("_Batch", ["target"])


class Given(nn.Module):
    """States of ones: what a head sees of them says what was dropped."""

    def forward(self, batch: object) -> Features:
        index = torch.tensor([[0, 1], [0, 2]])
        prompt = torch.ones(2, 1, H)
        return Features(torch.ones(3, 1, H), index, prompt, index % 2, torch.ones(2).long())


class Recording(BradleyTerry):  # pyright: ignore[reportGeneralTypeIssues]
    """Keeps the features that it was given."""

    def compare(self, features: Features, user: UserState):
        self.seen = features
        return super().compare(features, user)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_share_of_each_state(share: float) -> None:
    head = Recording(H)
    model = RewardModel(Given(), head, feature_dropout=share).train()
    torch.manual_seed(0)
    model(cast(Any, _Batch(None)), UserState())
    for states in (head.seen.response, head.seen.prompt):
        assert states is not None
        values = set(states.unique().tolist())
        assert sorted(values) == pytest.approx([0.0, 1 / (1 - share)])
        assert float((states == 0).float().mean()) == pytest.approx(share, abs=0.15)
    first = head.seen.response
    torch.manual_seed(0)
    model(cast(Any, _Batch(None)), UserState())
    assert torch.equal(first, head.seen.response)
    model.eval()
    model(cast(Any, _Batch(None)), UserState())
    assert torch.equal(head.seen.response, torch.ones(3, 1, H))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(UserError, match=r"train\.feature_dropout"):
        TrainConfig(feature_dropout=share)


def test_dropout_that_does_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert not has_inert_dropout(PalA(H, num_layers=2, dropout=0.2))
    assert not has_inert_dropout(PalA(H, num_layers=1))
    assert has_inert_dropout(PalB(H, num_layers=1, dropout=0.2))
    parts = namedtuple("Parts", ["head", "needs_store"])(PalA(H, num_layers=1, dropout=0.2), True)
    config = namedtuple("Config", ["train", "loss", "wandb", "trackers"])
    with caplog.at_level(logging.WARNING):
        run = RunConfig.__dataclass_fields__
        others = (run[name].default_factory() for name in ("loss", "wandb", "trackers"))
        given = config(TrainConfig(), *others)
        check_before_loading(cast(Any, given), cast(Any, parts), cast(Any, None))
    assert "num_layers: 1 has none" in caplog.text
