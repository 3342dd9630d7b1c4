"""Files that an exported folder carries as they are: torch, transformers and siblings alone."""
