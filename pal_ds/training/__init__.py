"""Train a run: set-up, the loop, evaluation on dev, resuming, and starting from another run."""
