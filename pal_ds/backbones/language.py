"""The language-model loss of preferred answers: a decoder's own output embedding, cross-entropy token by token.

Logits exist for the tokens of preferred answers alone, a chunk at a time; they are made again for the backward pass.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from pal_ds.data.batch import Answers
from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float, Int

CHUNK_LOGITS = 1 << 27
"""Logits at a time, 512 MiB in fp32; at least those of one token."""
STATE_PREFIX = "backbone.language."
"""Prefix of the language head's parameters in a checkpoint; what scores never reads them."""


class LanguageHead(nn.Module):
    """Logits (h W^T + b) * scale; W is the input embedding itself where the model ties the two.

    One module with one forward whatever the number of tokens: under ZeRO-3 each call gathers W once on every rank.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, hidden: Float[Tensor, "n H"], target: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """-log softmax(logits)[target] of each token, fp32."""
        return _TokenLosses.apply(hidden, self.weight, self.bias, target, self.scale)  # pyright: ignore[reportReturnType]

    def mean_losses(self, hidden: Float[Tensor, "N S H"], answers: Answers) -> Float[Tensor, "B"]:
        """Mean over the tokens of each comparison's preferred response, fp32."""
        states = hidden.flatten(0, 1)[answers.state_index]
        losses = self(states, answers.target)
        # In the order of tokens; the lengths are right by construction, and checking them would wait.
        sums = torch.segment_reduce(losses, "sum", lengths=answers.lengths, unsafe=True, initial=0)
        return (sums / answers.lengths.clamp(min=1))[answers.answer_index]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float
    ) -> Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        log_sums = torch.empty_like(losses)
        for part in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[part], weight, bias, scale)
            log_sums[part] = logits.logsumexp(-1)
            losses[part] = log_sums[part] - logits.gather(1, target[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, target, log_sums)
        ctx.scale = scale
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_sums = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden)
        # In fp32 over the chunks: a sum of many is longer than bf16 can hold.
        for_weight, for_bias = (
            torch.zeros_like(parameter, dtype=torch.float32) if needed else None
            for parameter, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for part in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[part], weight, bias, ctx.scale)
            share = logits.sub_(log_sums[part, None]).exp_()
            share.scatter_add_(1, target[part, None], -torch.ones_like(share[:, :1]))
            share.mul_(gradients[0][part, None] * ctx.scale)
            if for_bias is not None:
                for_bias += share.sum(0)
            share = share.to(hidden.dtype)
            for_hidden[part] = share @ weight
            if for_weight is not None:
                for_weight += share.t() @ hidden[part]
        for_layer = (g if g is None else g.to(weight.dtype) for g in (for_weight, for_bias))
        return for_hidden, *for_layer, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """fp32 [c, V], a new tensor."""
    logits = torch.mm(hidden, weight.t())
    if bias is not None:
        logits = logits + bias
    # A copy also in fp32: the caller writes into it, and it may not be the product that autograd knows.
    return logits.float() * scale


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    for begin in range(0, num_tokens, size):
        yield slice(begin, min(begin + size, num_tokens))


def with_language_head(path: str, **options: Any) -> tuple[PreTrainedModel | Any, LanguageHead]:
    """(the model without its output layer, as AutoModel would load it, that layer) of a causal language model.

    Raises:
        UserError: the folder holds no weights of an output layer, and the model does not tie it to its embedding.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    whole, loading_info = loaded
    layer = whole.get_output_embeddings()
    names = [name for name, module in whole.named_modules() if module is layer]
    if missing := [key for key in loading_info["missing_keys"] if key.startswith(tuple(names))]:
        raise UserError(
            f"loss.lm_weight: {path} holds no {missing[0]}, the output layer of a language model. Give weights that "
            "have one in backbone.path, or set loss.lm_weight to 0."
        )
    scale = logit_scale(whole.config.get_text_config())
    return text_part(whole.base_model), LanguageHead(layer.weight, layer.bias, scale)


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text: the model itself, or the decoder of one that reads images, too.

    Raises:
        UserError: transformers has no model for that part alone, which an export would be opened with.
    """
    text = model.config.get_text_config()
    if text is model.config:
        return model
    part: Any = model.get_decoder()
    if type(part) is not MODEL_MAPPING.get(type(text), None):
        raise UserError(
            f"backbone.path: transformers has no model for the text part of {type(model).__name__} "
            f"({text.model_type}) by itself. Give a model of text alone."
        )
    return part


def output_layer_of(path: str, config: PretrainedConfig) -> dict[str, Path]:
    """File (safetensors) of each tensor of the output layer that lies beside a backbone's weights, by its full name.

    Empty where the model ties it to its embedding, has none, or its weights lie in no safetensors of this machine.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(whole, "all_tied_weights_keys", None) or ())
    prefix = f"{whole.base_model_prefix}."
    wanted = [n for n in whole.state_dict() if not n.startswith(prefix) and n not in tied]
    file_of = {}
    for file in _weight_files(path):
        with safe_open(str(file), "pt") as stream:
            file_of |= dict.fromkeys(set(wanted) & set(stream.keys()), file)
    return file_of if file_of.keys() == set(wanted) else {}


def _weight_files(path: str) -> list[Path]:
    """The safetensors of a folder, or of a hub id that was downloaded before."""
    options: dict[str, Any] = {
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        single = cached_file(path, SAFE_WEIGHTS_NAME, **options)
        return [] if single is None else [Path(single)]
    names = set(json.loads(Path(index).read_text())["weight_map"].values())
    return [Path(index).with_name(name) for name in sorted(names)]


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor by which a family multiplies its logits."""
    multiplier, divisor = (getattr(config, n, None) for n in ("logit_scale", "logits_scaling"))
    return float(multiplier or 1.0) / float(divisor or 1.0)
