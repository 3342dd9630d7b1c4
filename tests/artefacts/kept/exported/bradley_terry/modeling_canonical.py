"""LlamaForSequenceClassification, scoring every text in the form that the trainer scored."""

from transformers import LlamaForSequenceClassification

from .canonical_rows import CanonicalRows


class CanonicalLlamaForSequenceClassification(CanonicalRows, LlamaForSequenceClassification):
    """Ids of any tokenizer call in, the trainer's score out; weights are those of LlamaForSequenceClassification."""


__all__ = ["CanonicalLlamaForSequenceClassification"]
