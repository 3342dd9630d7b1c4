"""A run's sharded checkpoint as a scalar reward model that transformers opens by itself."""

from pal_ds.export.folder import ExportOptions, export
from pal_ds.export.per_user import export_users, read_user_list, users_of

__all__ = ["ExportOptions", "export", "export_users", "read_user_list", "users_of"]
