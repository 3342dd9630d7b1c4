"""Packed attention by variable-length flash attention: every prompt and every response is a sequence of one call."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from pal_ds.backbones.token_copies import Gather, copies, owner_and_column, shared_copies
from pal_ds.data.packing import Packing
from pal_ds.heads.jaxtyping_fallback import Float, Int

VarlenKernel = Callable[..., Tensor]
"""(query [S, h, D], key [n, g, D], value [n, g, D], spans, dropout, scaling, window) -> [S, h, D]; where it is causal,
the last query of a sequence stands at its last key."""


class Spans(NamedTuple):
    """A packed row as sequences of queries and keys: a prompt looks at itself, a response at its prompt and itself."""

    kernel: VarlenKernel
    causal: bool
    keys: Gather
    query_start: Int[Tensor, "N+1"]
    """int32, as the kernels want it."""
    key_start: Int[Tensor, "N+1"]
    longest_query: int
    longest_key: int

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Begins and longest lengths of sequences, in the order of both kernels' arguments."""
        return self.query_start, self.key_start, self.longest_query, self.longest_key

    def attend(
        self,
        query: Float[Tensor, "h S D"],
        key: Float[Tensor, "g S D"],
        value: Float[Tensor, "g S D"],
        dropout: float,
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "h S D"]:
        """Call the kernel once; its deterministic backward aside, the sums over copies have a fixed order."""
        states = (query, copies(key, self.keys), copies(value, self.keys))
        in_order = (part.transpose(0, 1) for part in states)
        return self.kernel(*in_order, self, dropout, scaling, window).transpose(0, 1)


def spans_of(packing: Packing, kernel: VarlenKernel, *, causal: bool = True) -> Spans:
    """Index tensors of the sequences, on the packing's device and without waiting for it."""
    assert causal or packing.num_prompts == 0, "texts that see all of themselves share no prefix"
    start, slot = packing.sequence_start, packing.prompt_of_response
    num_prompts, num_keys = packing.num_prompts, packing.num_keys
    before = torch.cat([start.new_zeros(num_prompts), packing.num_before])
    key_start = torch.cat([start.new_zeros(1), (before + start.diff()).cumsum(0)])
    owner, column = owner_and_column(packing)
    sequences = torch.arange(len(before), device=start.device)
    of_key = torch.repeat_interleave(sequences, key_start.diff(), output_size=num_keys)
    place = torch.arange(num_keys, device=start.device) - key_start[of_key]
    prompt_start = torch.cat([start[:num_prompts], start[slot]])[of_key]
    token = torch.where(
        place < before[of_key], prompt_start + place, start[of_key] - before[of_key] + place
    )
    shared = shared_copies(packing, owner, column, key_start[num_prompts:-1], num_keys)
    first_copy = key_start[owner] + before[owner] + column
    return Spans(
        kernel,
        causal,
        Gather(token, first_copy, shared),
        start.to(torch.int32),
        key_start.to(torch.int32),
        packing.longest,
        packing.longest_keys,
    )


def varlen_kernel(*, dropout: bool) -> tuple[VarlenKernel | None, str]:
    """(kernel, why): flash-attn where it is installed, else torch's own, else None. For half precision on a GPU."""
    if is_flash_attn_2_available():
        return _flash_attn, "flash-attn is installed"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, "neither flash-attn nor a torch with variable-length attention is installed"
    missing = "flash-attn is not installed, and"
    if not {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None, f"{missing} this torch's variable-length attention has no windows"
    if dropout:
        return None, f"{missing} torch's own has no dropout, which this model has"
    return _torch_varlen, "torch's own, as flash-attn is not installed"


def _window(spans: Spans, window: int | None) -> tuple[int, int]:
    """Keys to the left and to the right of a query's own that it sees; -1 for all."""
    assert spans.causal or window is None, "windows are made for causal attention"
    return (-1 if window is None else window - 1, 0) if spans.causal else (-1, -1)


def _flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        *spans.bounds,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=spans.causal,
        window_size=_window(spans, window),
        deterministic=True,
    )


def _torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0, "torch's variable-length attention has no dropout"
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    options["window_size"] = _window(spans, window)
    output = varlen_attn(query, key, value, *spans.bounds, **options)
    assert isinstance(output, Tensor), "nothing but the states was asked for"
    return output
