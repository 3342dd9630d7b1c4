"""Personalised reward models, trained at scale with DeepSpeed."""

__version__ = "0.1.0"
"""The one place that says it: pyproject.toml reads it from here."""
