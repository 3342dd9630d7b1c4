"""A trained run in memory, and how it scores comparisons and texts."""
