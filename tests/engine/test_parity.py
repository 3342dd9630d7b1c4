"""The same updates at ZeRO 0-3, one and two ranks, with and without accumulation, against a plain torch loop."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.config.run_config import RunConfig
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.engine.optim import parameter_groups, schedule_factor
from pal_ds.heads.base import UserState
from pal_ds.model import RewardModel
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.state import seen_users
from tests.engine.parity_worker import NUM_UPDATES, recipe
from tests.spawn import run_ranks
from tests.tiny import LLAMA, write_pairs

BOUND = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant's figures; two launches make all of them."""
    folder = tmp_path_factory.mktemp("parity")
    # 49 pairs in updates of 16: every fourth update holds one pair, so one of two ranks has none.
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 49)))
    data = prepare(
        DataConfig(
            path=str(folder / "data"),
            source=source,
            max_length=64,
            vocab_size=400,
            dev_fraction=0,
            test_fraction=0,
        )
    )
    backbone = BackboneConfig(architecture=LLAMA)
    materialise_architecture(backbone, data.info["tokens"]["vocab_size"], 0, folder / "base")
    for num_ranks in (1, 2):
        run_ranks(num_ranks, "tests.engine.parity_worker", folder / "data", folder / "base", folder)
    return folder


def plain_torch_run(folder: Path) -> dict[str, np.ndarray]:
    """The same updates without DeepSpeed: padded batches, torch's AdamW and clipping, row Adam written out."""
    from pal_ds.modeling.build import assemble, load_backbone

    config: RunConfig = recipe(str(folder / "data"), str(folder / "base"), "full", 0)
    config = replace(config, backbone=replace(config.backbone, packing="padded"))
    data, run = PreparedData.open(config.data.path), RunDirectory(folder / "plain")
    parts = assemble(config, data, run)
    model = RewardModel(load_backbone(parts, config, gpu=False), parts.head)
    users, *_ = seen_users(config, data, parts.head, World(0, 1, torch.device("cpu")))
    logits = users.logits.clone()
    moments, squares, steps = (
        torch.zeros_like(logits),
        torch.zeros_like(logits),
        torch.zeros(len(logits), 1),
    )
    groups = parameter_groups(model, config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.epsilon)
    from pal_ds.data.plan import UpdatePlan

    items = data.response_prompt[data.comparisons["a"]]
    plan = UpdatePlan(data.rows("train"), items, 16, config.train.seed, data.hash)
    losses, norms, sums = [], [], []
    for update in range(NUM_UPDATES):
        rows = plan.update(*divmod(update, plan.updates_per_epoch))
        batch = parts.collator(rows, np.arange(len(rows)))
        assert batch.packing is None, "the plain loop reads each text from a row of its own"
        leaf = logits[batch.user_row].requires_grad_()
        output = model(batch, UserState(leaf))
        loss = torch.nn.functional.softplus(-batch.label * output.margin[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(
            float(
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
            )
        )
        factor = schedule_factor(config.optim, update, NUM_UPDATES)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        optimizer.step()
        total = torch.zeros_like(logits).index_add_(0, batch.user_row, leaf.grad)
        touched = batch.user_row.unique()
        steps[touched] += 1
        moments[touched] = 0.9 * moments[touched] + 0.1 * total[touched]
        squares[touched] = 0.999 * squares[touched] + 0.001 * total[touched] ** 2
        size = (squares / (1 - 0.999**steps)).sqrt() + config.users.epsilon
        logits[touched] -= (
            config.users.learning_rate * factor * moments / (1 - 0.9**steps) / size
        )[touched]
        losses.append(loss.item())
        sums.append(total)
    figures = {"loss": np.array(losses), "norm": np.array(norms), "users": logits.numpy()}
    return {**figures, "user_gradients": torch.stack(sums).numpy()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], name: str) -> None:
    for key in ("loss", "norm", "users", "user_gradients"):
        error = np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max()
        assert error <= BOUND, f"{name}: {key} is off by {error:.2g} of its largest entry"


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_variants_agree(results: Path, tuning: str) -> None:
    wanted = dict(np.load(results / f"{tuning}_zero0_world1_accumulation1.npz"))
    # A test on updates that change nothing would pass on anything.
    assert np.ptp(wanted["loss"]) > 1e-3
    assert np.abs(wanted["user_gradients"]).max() > 1e-4
    for stage, world, accumulation in itertools.product(range(4), (1, 2), (1, 2)):
        name = f"{tuning}_zero{stage}_world{world}_accumulation{accumulation}"
        assert_same(dict(np.load(results / f"{name}.npz")), wanted, name)


def test_engine_agrees_with_plain_torch(results: Path) -> None:
    wanted = plain_torch_run(results)
    # Clipping at 0.5 must be at work, or DeepSpeed's silent default of 1.0 would go unnoticed.
    assert (wanted["norm"] > 1.0).any()
    assert_same(
        dict(np.load(results / "full_zero3_world2_accumulation2.npz")), wanted, "plain torch"
    )
