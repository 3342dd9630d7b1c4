"""Personalised reward models, trained at scale with DeepSpeed."""
