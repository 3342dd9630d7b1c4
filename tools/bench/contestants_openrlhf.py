"""OpenRLHF's reward trainer in `bench_step.py`: its model, loss, collation and `fit`, run from a checkout.

Its DeepSpeed strategy is replaced by plain backward, AdamW and schedule steps, and flash-attn, which cannot run
here and is imported for packing alone, by empty modules: both only make it faster. On a CPU it pads to the left.
"""

import importlib
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.contestants_trl import numbered_tokenizer
from tools.bench.step_case import Case, Contestant, Pairs, Unavailable


class OpenRlhf(Contestant):
    """`RewardModelTrainer.fit` over one batch per step."""

    def __init__(self, case: Case, weights: dict[str, Tensor], checkout: Path) -> None:
        """Starts from pal_ds's weights. Raises Unavailable where the checkout cannot be imported."""
        trainer_module, model_module, dataset_module = load_openrlhf(checkout)
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(case.backbone)
        config.normalize_reward = False
        base: Any = AutoModel._model_mapping[type(config)]
        cls = model_module._get_reward_model(base.__base__, base)
        self.model = cls.from_pretrained(case.backbone, config=config, dtype=torch.float32)
        self.model.config.use_cache = False
        with torch.no_grad():
            self.model.score.weight.copy_(weights["head.direction"][None])
        tokenizer = numbered_tokenizer(case)
        data = Namespace(is_dpo=False, tokenizer=tokenizer)
        self.collate = lambda items: dataset_module.RewardDataset.collate_fn(data, items)
        self.timed, self.parity = items_of(case.timed), items_of(case.parity)
        self.options = _options(len(case.timed))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0)
        self.trainer = trainer_module.RewardModelTrainer(
            model=self.model,
            strategy=PlainStrategy(self.options),
            optim=optimizer,
            train_dataloader=_OneBatch(self.collate, self.timed),
            eval_dataloader=None,
            scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
            tokenizer=tokenizer,
            max_epochs=1,
        )
        longest = self.collate(self.timed)
        columns = max(longest[0].shape[-1], longest[2].shape[-1])
        self.num_padded_tokens = 2 * len(case.timed) * columns

    def loss_and_gradients(self) -> dict[str, Tensor]:
        chosen, chosen_mask, rejected, rejected_mask, _ = self.collate(self.parity)
        parts = (x.squeeze(1) for x in (chosen, chosen_mask, rejected, rejected_mask))
        better, worse, _ = self.trainer.concatenated_forward(self.model, *parts)
        loss = self.trainer.loss_fn(better, worse, None)
        named = dict(self.model.named_parameters())
        made = torch.autograd.grad(loss, list(named.values()))
        gradients = dict(zip(named, made, strict=True))
        result = {"loss": loss.detach(), "head.direction": gradients.pop("score.weight")[0]}
        return result | {f"backbone.{name}": value for name, value in gradients.items()}

    def step(self) -> None:
        self.trainer.fit(self.options, num_update_steps_per_epoch=1)


class PlainStrategy:
    """The DeepSpeed strategy that the trainer expects, in plain torch."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self, options: Namespace) -> None:
        self.args = options

    def backward(self, loss: Tensor, *_: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def is_rank_0(self) -> bool:
        """No: nothing is printed."""
        return False

    def print(self, *_: Any) -> None:
        pass


class _OneBatch:
    """A loader of one batch, collated anew each time."""

    sampler = None

    def __init__(self, collate: Any, items: list[Any]) -> None:
        self.collate, self.items = collate, items

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter([self.collate(self.items)])


def items_of(pairs: Pairs) -> list[Any]:
    """Items as OpenRLHF's data set returns them."""

    def row(ids: Any) -> tuple[Tensor, Tensor]:
        tensor = torch.from_numpy(ids)[None]
        return tensor, torch.ones_like(tensor)

    chosen, rejected = pairs.chosen_and_rejected()
    return [(*row(better), *row(worse), 0) for better, worse in zip(chosen, rejected, strict=True)]


def load_openrlhf(checkout: Path) -> tuple[Any, Any, Any]:
    """(trainer module, model module, data set module)."""
    if not (checkout / "openrlhf").is_dir():
        raise Unavailable(f"{checkout} holds no openrlhf")
    stubs = {name: _stub(name, attributes) for name, attributes in _STUBS.items()}
    stubs = {name: stub for name, stub in stubs.items() if name not in sys.modules}
    sys.modules.update(stubs)
    sys.path.insert(0, str(checkout))
    try:
        names = ("trainer.rm_trainer", "models.model", "datasets.reward_dataset")
        modules = [importlib.import_module(f"openrlhf.{name}") for name in names]
    except ImportError as error:
        raise Unavailable(f"OpenRLHF cannot be imported: {error}") from None
    finally:
        sys.path.remove(str(checkout))
        # Else transformers would take flash-attn for installed.
        for name in stubs:
            del sys.modules[name]
    return modules[0], modules[1], modules[2]


_STUBS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}


def _stub(name: str, attributes: tuple[str, ...]) -> types.ModuleType:
    module = types.ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, None)
    return module


def _options(num_pairs: int) -> Namespace:
    off = Namespace(key=None)
    return Namespace(
        model=Namespace(
            aux_loss_coef=0.0, margin_loss_enable=False, compute_fp32_loss_enable=False
        ),
        ds=Namespace(packing_samples=False),
        logger=Namespace(wandb=off, tensorboard_dir=None, logging_steps=1),
        eval=Namespace(steps=-1),
        ckpt=Namespace(save_steps=-1),
        train=Namespace(batch_size=num_pairs),
    )
