"""A frozen backbone of which one layer is kept, trained with in a warm parent, for test_num_layers."""

import json
from pathlib import Path

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.tables import PreparedData
from tests.engine.kills import command
from tests.tiny import LLAMA, data_keys
from tests.warm import fork_ranks, wait_for


def train_on_one_layer(folder: str) -> list[int]:
    """Prepared data, a Llama of two layers in `base`, and a run in `run` that keeps the first; the exit codes."""
    place = Path(folder)
    place.mkdir()
    recipe = {
        "data": data_keys(place, 64, dev_fraction=0.2, test_fraction=0.2),
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3, "num_layers": 2}},
        "backbone": {"path": str(place / "base"), "tuning": "frozen", "num_layers": 1},
        "train": {
            "ds_config": "tests/ds/zero3.json",
            "batch_pairs": 16,
            "micro_batch_pairs": 16,
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))

    command("prepare", f"--config={place / 'recipe.yaml'}")()
    vocab_size = PreparedData.open(place / "data").info["tokens"]["vocab_size"]
    materialise_architecture(BackboneConfig(architecture=LLAMA), vocab_size, 0, place / "base")
    work = command("train", f"--config={place / 'recipe.yaml'}", f"--run_dir={place / 'run'}")
    return wait_for(fork_ranks(1, work, place / "log"))
