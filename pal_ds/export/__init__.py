"""A run's sharded checkpoint as a scalar reward model that transformers opens by itself."""

from pal_ds.export.folder import ExportOptions, export

__all__ = ["ExportOptions", "export"]
