"""From raw preference data to batches: sources, preparation, prepared tables."""
