"""A tiny random member of every family of backbones that we claim."""

from typing import Any

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen": {"model_type": "qwen3", **_DECODER, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_DECODER, "head_dim": 16},
    # Its last hidden state is narrower than its layers, as in OPT-350m.
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "bert": {"model_type": "bert", **_ENCODER},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 2,
        "max_position_embeddings": 128,
    },
    "xlm_roberta": {"model_type": "xlm-roberta", **_ENCODER},
}
TUNINGS = ("full", "lora", "frozen")
