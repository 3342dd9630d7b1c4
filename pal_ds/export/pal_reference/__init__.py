"""Import checkpoints of PAL's own repository."""
