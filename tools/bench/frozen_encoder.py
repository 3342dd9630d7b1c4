"""Keys of recipes that benchmarks on a frozen sentence encoder share."""

from typing import Any


def frozen_encoder_keys(encoder: str, work: str) -> dict[str, Any]:
    """Dotted keys: texts of up to 512 tokens, read by the model in the folder `encoder`, states kept in WORK/cache."""
    return {
        "data.tokenizer": encoder,
        "data.separator": " [SEP] ",
        "data.max_length": 512,
        "backbone.path": encoder,
        "backbone.tuning": "frozen",
        "backbone.cache": f"{work}/cache",
        "train.ds_config": "zero3_cpu",
        "train.batch_pairs": 128,
        "train.micro_batch_pairs": 128,
    }
