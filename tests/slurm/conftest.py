"""One cluster for all tests that need it, gone afterwards."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, up, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes n1 to n7 in partitions test and high, where jobs of the latter preempt; two fake GPUs each."""
    if reason := why_not():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("slurm")
    running = up(folder, number=1 + os.getpid() % 250, num_nodes=7)
    yield running
    running.control("down")
