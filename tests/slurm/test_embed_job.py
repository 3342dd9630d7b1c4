"""Two nodes fill a cache; a training that waits for them reads it and loads no weights."""

import json
from pathlib import Path

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.prepare import prepare
from pal_ds.recipe import load_recipe
from tests.slurm.cluster import Cluster
from tests.spawn import ROOT
from tests.tiny import LLAMA, data_keys


def write_recipe(folder: Path) -> Path:
    """A recipe on a frozen decoder, its weights and its prepared data."""
    content = {
        "data": data_keys(folder, 40),
        "backbone": {
            "path": str(folder / "base"),
            "tuning": "frozen",
            "cache": str(folder / "cache"),
        },
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "train": {"ds_config": "zero3_cpu", "batch_pairs": 16, "log_every": 1},
    }
    path = folder / "embed.yaml"
    path.write_text(json.dumps(content))
    data = prepare(load_recipe(path).data, quiet=True)
    architecture = BackboneConfig(architecture=LLAMA)
    materialise_architecture(architecture, data.info["tokens"]["vocab_size"], 0, folder / "base")
    return path


def test_embed_on_two_nodes_then_train(cluster: Cluster) -> None:
    folder = cluster.folder / "embed"
    folder.mkdir()
    recipe = write_recipe(folder)
    shape = ("--cpus-per-task=1", "--time=10")
    embed = cluster.sbatch("--nodes=2", *shape, ROOT / "slurm" / "embed.sbatch", recipe)
    waits = f"--dependency=afterok:{embed}"
    words = ("--run_dir", folder / "run")
    train = cluster.sbatch(waits, *shape, ROOT / "slurm" / "train.sbatch", recipe, *words)
    cluster.wait(embed, train)
    shards = list((folder / "cache").glob("responses_*/*.safetensors"))
    assert len(shards) == 2, "one of each rank"
    assert "texts are here, 0 of the" in cluster.logs(train)
    status = json.loads((folder / "run" / "status.json").read_text())
    assert status["state"] == "finished"
