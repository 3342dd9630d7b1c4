"""Files that an exported model's folder carries as they are: torch, transformers and their siblings, nothing of pal_ds."""
