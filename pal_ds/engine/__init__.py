"""The only package that imports deepspeed: processes, sharded training, checkpoints, consolidation."""
