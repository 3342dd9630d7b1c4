"""Every test runs on the CPU, and the shapes in signatures are checked as the code runs."""

import os

# Before torch is imported: the suite compares with CPU figures, and its two ranks would share one GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from jaxtyping import install_import_hook

install_import_hook(["pal_ds.heads", "pal_ds.losses", "pal_ds.users"], "beartype.beartype")
