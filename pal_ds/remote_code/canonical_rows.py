"""Brings token rows to the trainer's form before a stock transformers class scores them.

An exported model folder carries this very file.
"""

from typing import Any

from torch import Tensor

from .canonical import canonical_ids
from .rows import pad_right, token_mask
from .whole_weights import WholeWeights


class CanonicalRows(WholeWeights):
    """Mixed in before a stock `...ForSequenceClassification` that scores the last real token.

    The config's `canonical` holds {"prefix_ids", "end_ids", "max_tokens"}, and "end_variants" where
    more than the end itself may stand for it. The stock class takes
    for the last token the rightmost one that is not `pad_token_id`, so that must be no end token.
    """

    config: Any
    device: Any

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Logits [B, 1] of rows [B, L] with or without special tokens, padded on either side."""
        form = self.config.canonical
        pad = self.config.get_text_config().pad_token_id
        mask = token_mask(input_ids, attention_mask, pad, form["end_ids"])
        rows = [
            canonical_ids(
                ids[keep].tolist(),
                form["prefix_ids"],
                form["end_ids"],
                form["max_tokens"],
                form.get("end_variants"),
            )
            for ids, keep in zip(input_ids.cpu(), mask, strict=True)
        ]
        ids, mask = pad_right(rows, pad, self.device)
        for name in ("position_ids", "token_type_ids", "use_cache"):
            kwargs.pop(name, None)
        return super().forward(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)  # type: ignore[misc]
