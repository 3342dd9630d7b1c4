"""Tiny runs that the export tests read: every head, tuning and kind of backbone, every ZeRO stage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.spawn import ROOT

HEADS = {
    "pal_a": {"class_path": "PalA", "init_args": {"num_prototypes": 3, "num_layers": 2}},
    "pal_a_cosine": {
        "class_path": "PalA",
        "init_args": {"num_prototypes": 3, "user_point": "f(P)w", "similarity": "cosine"},
    },
    "pal_b": {"class_path": "PalB", "init_args": {"num_prototypes": 3, "num_layers": 2}},
    "bt": {"class_path": "BradleyTerry"},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "bert": {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}
ARCHITECTURES["mistral"] = {
    **ARCHITECTURES["llama"],
    "model_type": "mistral",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
}
"""With a tokenizer that prepends a character to every text, so that no stock export can be exact, and with rotary
positions of its own, which transformers 4 reads under other names."""
SEPARATORS = {"bert": " [SEP] "}
MAX_LENGTH = 96
MIXTURE = [0.7, 0.1, 0.2]


class Case(NamedTuple):
    backbone: str
    head: str
    tuning: str
    stage: int
    pooling: str = "auto"
    truncation_side: str = "left"

    @property
    def name(self) -> str:
        other = "" if self.pooling == "auto" else f"_{self.pooling}_{self.truncation_side}"
        return f"{self.backbone}_{self.head}_{self.tuning}{other}"

    @property
    def data(self) -> str:
        """Name of the folder of its prepared data."""
        return f"data_{self.backbone}" + ("_right" if self.truncation_side == "right" else "")

    @property
    def is_stock(self) -> bool:
        plain = self.backbone not in ("bert", "mistral") and self.pooling == "auto"
        return self.head == "bt" and plain


def _matrix() -> list[Case]:
    cases = [
        (backbone, head, tuning)
        for backbone in ("llama", "bert")
        for head in ("pal_a", "pal_b", "bt")
        for tuning in ("full", "lora", "frozen")
    ]
    cases += [("gpt2", "pal_a_cosine", "full"), ("gpt2", "pal_b", "lora"), ("gpt2", "bt", "full")]
    cases += [("mistral", "bt", "full")]
    matrix = [Case(*case, stage=index % 4) for index, case in enumerate(cases)]
    return [
        *matrix,
        Case("llama", "pal_b", "full", 3, "mean_max", "right"),
        Case("llama", "bt", "lora", 2, "mean", "right"),
        Case("gpt2", "bt", "full", 1, "mean", "left"),
        Case("gpt2", "bt", "full", 0, "eos", "right"),
    ]


CASES = _matrix()


def audience_of(case: Case) -> dict[str, Any]:
    """One user, a mixture or the population: every tuning and every head meets each of them."""
    if case.head == "bt":
        return {}
    place = ("llama", "bert", "gpt2").index(case.backbone)
    place += ("full", "lora", "frozen").index(case.tuning) + int(case.head == "pal_b")
    return ({"user": "u1"}, {"mixture": MIXTURE}, {})[place % 3]


def make_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """Llama: BOS, EOS, pad apart, adds BOS only; GPT-2: one special token for all; BERT: CLS, SEP."""
    if backbone == "bert":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
        backend.train_from_iterator(
            [text for _, texts in texts_of_rows() for text in texts], trainer
        )
        pair = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=pair
        )
        names = dict(
            zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True)
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    backend = Tokenizer(models.BPE())
    if backbone == "mistral":
        steps = normalizers.Prepend("_"), normalizers.Replace(" ", "_")
        backend.normalizer = normalizers.Sequence(list(steps))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>"] if backbone == "gpt2" else ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for _, texts in texts_of_rows() for text in texts], trainer)
    if backbone == "gpt2":
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), special[0])
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts_of_rows(num_rows: int = 24) -> list[tuple[str, tuple[str, str]]]:
    """(prompt, the two responses); some prompts are longer than MAX_LENGTH leaves room for."""
    generator = np.random.default_rng(0)
    topics = ("tea", "chess", "rivers", "bread")
    rows = []
    for index in range(num_rows):
        topic = topics[index % 4]
        filler = " please" * (120 if index % 6 == 0 else index % 3)
        short = f"{topic} is fine {generator.integers(30)}."
        long = (
            f"Well, {topic} is something to talk about for hours, friend {generator.integers(30)}"
        )
        rows.append((f"Tell me about {topic}, part {index}{filler}?", (short, long)))
    return rows


def write_inputs(root: Path) -> None:
    """pairs.jsonl, a tokenizer per backbone and a recipe per case under `root`."""
    rows = texts_of_rows()
    with open(root / "pairs.jsonl", "w") as stream:
        for index, (prompt, (first, second)) in enumerate(rows):
            record = {"user_id": f"u{index % 3}", "prompt": prompt, "y": 1 if index % 2 else -1}
            record |= {"response_1": first, "response_2": second}
            stream.write(json.dumps(record) + "\n")
    for backbone in ARCHITECTURES:
        make_tokenizer(backbone).save_pretrained(root / f"tokenizer_{backbone}")
    for case in CASES:
        run = root / case.name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(recipe(case, root)))


def recipe(case: Case, root: Path) -> dict[str, Any]:
    source = {"class_path": "Jsonl", "init_args": {"path": str(root / "pairs.jsonl")}}
    data = {
        "path": str(root / case.data),
        "source": source,
        "tokenizer": str(root / f"tokenizer_{case.backbone}"),
        "max_length": MAX_LENGTH,
        "truncation_side": case.truncation_side,
        "separator": SEPARATORS.get(case.backbone, "\n\n### Response:\n"),
        "dev_fraction": 0.1,
        "test_fraction": 0.1,
    }
    return {
        "data": data,
        "head": HEADS[case.head],
        "backbone": {
            "architecture": ARCHITECTURES[case.backbone],
            "tuning": case.tuning,
            "pooling": case.pooling,
            "lora": {"rank": 4},
        },
        "users": {"learning_rate": 0.5, "init_std": 1.0},
        "optim": {"learning_rate": 0.01, "warmup_fraction": 0.0},
        "train": {
            "batch_pairs": 8,
            "micro_batch_pairs": 4,
            "stop_after": 2,
            "ds_config": str(ROOT / "tests" / "ds" / f"zero{case.stage}.json"),
        },
    }
