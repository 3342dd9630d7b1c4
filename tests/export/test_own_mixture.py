"""A head whose users' points depend on its weights: each command has the trained ones."""

import json
from pathlib import Path

import pytest
import torch

from pal_ds import Run, consolidate, train
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.runs.run_dir import RunDirectory
from tests.tiny_run import TinyRun

HEAD = '''"""Users' points are tilted by what the head learns."""

import torch
from torch import nn

from pal_ds.heads.base import Features, Head, UserState


class Tilted(Head):
    """Mixes K linear rewards."""

    needs = frozenset({"logits"})
    num_prototypes = 3

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_size, 3)
        self.tilt = nn.Parameter(torch.zeros(3))

    def mixture_weights(self, user: UserState) -> torch.Tensor:
        """The user's point."""
        if user.mixture is not None:
            return user.mixture
        return (user.logits.float() + self.tilt.float()).softmax(-1)

    def reward(self, features: Features, user: UserState) -> torch.Tensor:
        """One reward each."""
        each = self.map(features.response).float()[features.response_index]
        return torch.einsum("brtk,bk->brt", each, self.mixture_weights(user))
'''


def test_users_are_listed_and_exported_where_the_trained_head_puts_them(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tilted_head.py").write_text(HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {
        "data": {"path": str(tiny_run.data)},
        "backbone": {"path": str(tiny_run.base), "tuning": "frozen"},
        "head": {"class_path": "tilted_head.Tilted"},
        "optim": {"learning_rate": 0.3, "warmup_fraction": 0.0},
        "train": {"stop_after": 3, "batch_pairs": 8, "ds_config": "zero0"},
    }
    run = Run(train(recipe, tmp_path / "run").path, trust_code=True)
    restored = restore(RunDirectory(run.path), trust_code=True)
    assert restored.model.head.state_dict()["tilt"].abs().max() > 0.1
    trained = user_mixtures(restored.model.head, restored.users)[:-1]
    listed = torch.tensor([*run.users().values()])
    torch.testing.assert_close(listed, trained)
    ids = [*restored.users.ids][:2]
    consolidate(run, tmp_path / "out", user_ids=ids)
    names = json.loads((tmp_path / "out/users.json").read_text())
    for user, point in zip(ids, trained.tolist(), strict=False):
        config = json.loads((tmp_path / "out" / names[user] / "config.json").read_text())
        assert config["mixture"] == pytest.approx(point, abs=1e-6)
