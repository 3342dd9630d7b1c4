"""Texts in, hidden states out: transformers models, stored states and given vectors behind one forward."""
