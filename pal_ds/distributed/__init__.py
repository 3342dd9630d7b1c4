"""Ranks: what they share, how they watch each other, how they stop, and what SLURM tells them."""
