"""Two nodes fill a cache, preempted or not; a training that waits for them reads it and loads no weights."""

import json
import time
from pathlib import Path

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.config.recipe import recipe_from_arguments
from pal_ds.data.prepare import prepare
from tests.slurm.cluster import Cluster, rows, until
from tests.spawn import ROOT
from tests.tiny import LLAMA, data_keys


def write_recipe(folder: Path, num_pairs: int = 40, **backbone: int) -> Path:
    """A recipe on a frozen decoder, its weights and its prepared data."""
    content = {
        "data": data_keys(folder, num_pairs),
        "backbone": {
            "path": str(folder / "base"),
            "tuning": "frozen",
            "cache": str(folder / "cache"),
            **backbone,
        },
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "train": {"ds_config": "zero3_cpu", "batch_pairs": 16, "log_every": 1},
    }
    path = folder / "embed.yaml"
    path.write_text(json.dumps(content))
    data = prepare(recipe_from_arguments([f"--config={path}"]).data, quiet=True)
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


def test_a_preempted_embed_is_not_taken_for_done(cluster: Cluster) -> None:
    """SLURM's TERM meets the ranks in the middle of the work: they leave early, and what waits does not begin."""
    folder = cluster.folder / "preempted"
    folder.mkdir()
    # One text per forward: seconds of work.
    recipe = write_recipe(folder, 900, encode_batch_texts=1)
    shape = ("--cpus-per-task=1", "--time=10")
    embed = cluster.sbatch("--nodes=2", *shape, ROOT / "slurm" / "embed.sbatch", recipe)
    waits = f"--dependency=afterok:{embed}"
    train = cluster.sbatch(waits, "--output=/dev/null", *shape, "--wrap=true")
    # The folder is made when the first text is about to be encoded.
    until(lambda: list((folder / "cache").glob("responses_*")), "texts are being encoded")
    # What a rank has encoded is written when it is told to leave: each should have something by then.
    time.sleep(1)
    nodes = f"--nodelist={cluster.facts(embed)['NodeList']}"
    wanted = ("--partition=high", "--nodes=2", "--exclusive", nodes, "--output=/dev/null")
    cluster.sbatch(*wanted, "--wrap=true")
    starts = folder / "cache" / "slurm" / "starts.jsonl"
    until(lambda: len(rows(starts)) == 2, "the job is started anew")
    assert cluster.states(train) == ["PENDING"]
    cluster.wait(embed, train)
    assert [row["saved"] for row in rows(starts)] == ["0", "2"], "one shard of each rank"
    log = cluster.logs(embed)
    assert log.count(": done") == 1 and "stopped before every text was encoded" in log
    assert not (folder / "cache" / "slurm" / "failures").exists()
