"""Data of planted users and trainings on them, for tests of the numbers that users have beside a point."""

from pathlib import Path

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import run_command


def prepared(pairs: Path) -> PreparedData:
    """The comparisons of a file, two fifths of them held out, and a fifth of the users new; beside the file."""
    config = DataConfig(
        path=str(pairs.with_name("data")),
        source=Jsonl(path=str(pairs)),
        dev_fraction=0.0,
        test_fraction=0.4,
        unseen_user_fraction=0.2,
    )
    return prepare(config, quiet=True)


def trained(data: PreparedData, name: str, *words: str, epochs: int = 16) -> RunDirectory:
    """A run beside the data, with further keys."""
    folder = data.path.with_name(name)
    run_command(
        "train",
        f"--run_dir={folder}",
        f"--data.path={data.path}",
        "--optim.learning_rate=0.05",
        "--train.ds_config=zero3_cpu",
        f"--train.epochs={epochs}",
        "--train.batch_pairs=64",
        "--train.micro_batch_pairs=64",
        *words,
    )
    return RunDirectory(folder)
