"""Hidden states of a frozen backbone, computed once per text and kept on disk."""
