"""TRL's RewardTrainer in `bench_step.py`: its collator, `training_step` and optimizer on a Llama with a score head."""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from tools.bench.step_case import END, PAD, Case, Contestant, Pairs, Unavailable


class Trl(Contestant):
    """Right-padded chosen and rejected in one forward, fp32, nothing recomputed, no clipping."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        """Starts from pal_ds's weights. Raises Unavailable where TRL is not installed."""
        if importlib.util.find_spec("trl") is None:
            raise Unavailable("trl is not installed")
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        model = AutoModelForSequenceClassification.from_pretrained(
            case.backbone, num_labels=1, pad_token_id=PAD, dtype=torch.float32
        )
        with torch.no_grad():
            model.score.weight.copy_(weights["head.direction"][None])
        self.timed, self.parity = examples_of(case.timed), examples_of(case.parity)
        settings = RewardConfig(
            output_dir=str(case.scratch / "trl"),
            per_device_train_batch_size=len(case.timed),
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            report_to=[],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer: Any = RewardTrainer(
                model=model,
                args=settings,
                train_dataset=Dataset.from_list(self.timed),
                processing_class=numbered_tokenizer(case),
            )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model.train()
        self.num_padded_tokens = self.trainer.data_collator(self.timed)["input_ids"].numel()

    def loss_and_gradients(self) -> dict[str, Tensor]:
        loss = self.trainer.compute_loss(self.model, self.trainer.data_collator(self.parity))
        named = dict(self.model.named_parameters())
        made = torch.autograd.grad(loss, list(named.values()))
        gradients = dict(zip(named, made, strict=True))
        result = {"loss": loss.detach(), "head.direction": gradients.pop("score.weight")[0]}
        return result | {f"backbone.{name}": value for name, value in gradients.items()}

    def step(self) -> None:
        trainer = self.trainer
        trainer.training_step(self.model, trainer.data_collator(self.timed))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()


def examples_of(pairs: Pairs) -> list[dict[str, list[int]]]:
    """Tokenised examples as TRL's collator takes them."""
    chosen, rejected = pairs.chosen_and_rejected()
    return [
        {"chosen_ids": better.tolist(), "rejected_ids": worse.tolist()}
        for better, worse in zip(chosen, rejected, strict=True)
    ]


def numbered_tokenizer(case: Case) -> Any:
    """A tokenizer whose token i is `t` and the number i: trainers ask theirs for the pad token alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index}": index for index in range(case.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")),
        pad_token=f"t{PAD}",
        eos_token=f"t{END}",
    )
