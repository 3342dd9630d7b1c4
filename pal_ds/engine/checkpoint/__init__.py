"""Sharded checkpoints: write, verify, read without DeepSpeed, reshard, delete."""
