"""Rank variables from SLURM's: node lists of every form, uneven nodes, and who is no rank."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal_ds.distributed.slurm import (
    FIRST_PORT,
    NUM_PORTS,
    first_host,
    rank_variables,
    tasks_on_node,
)

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,6}[a-z]", fullmatch=True)
NUMBERS = st.integers(0, 999).map(str) | st.integers(0, 99).map("{:03d}".format)
RANGES = st.tuples(NUMBERS, st.integers(1, 9)).map(
    lambda pair: f"{pair[0]}-{int(pair[0]) + pair[1]:0{len(pair[0])}d}"
)
BRACKETS = st.lists(NUMBERS | RANGES, min_size=1, max_size=4)


@st.composite
def node_lists(draw: st.DrawFn) -> tuple[str, str]:
    """A node list as SLURM writes it, and its first node."""
    text, first = draw(NAMES), None
    first = text
    for numbers in draw(st.lists(BRACKETS, max_size=2)):
        suffix = draw(st.sampled_from(["", "-ib", "x"]))
        text += f"[{','.join(numbers)}]{suffix}"
        first += numbers[0].split("-")[0] + suffix
    rest = draw(st.lists(st.sampled_from(["login", "n[7-9]", "gpu3"]), max_size=2))
    return ",".join([text, *rest]), first


@given(node_lists())
def test_first_host_of_any_node_list(case: tuple[str, str]) -> None:
    node_list, wanted = case
    assert first_host(node_list) == wanted


@pytest.mark.parametrize(
    ("node_list", "wanted"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[1-2]n[05,07]", "rack1n05"),
        ("a-b7,c[1-2]", "a-b7"),
        ("n[2-3]-ib,n9-ib", "n2-ib"),
    ],
)
def test_first_host(node_list: str, wanted: str) -> None:
    assert first_host(node_list) == wanted
    if shutil.which("scontrol"):
        words = ["scontrol", "show", "hostnames", node_list]
        done = subprocess.run(words, capture_output=True, text=True)
        # It wants a configuration, which is there only while a cluster is up.
        assert done.returncode or done.stdout.split()[0] == wanted


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), min_size=1, max_size=6))
def test_tasks_on_uneven_nodes(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)
    wanted = [count for count, times in runs for _ in range(times)]
    assert [tasks_on_node(text, node) for node in range(len(wanted))] == wanted


STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert rank_variables(STEP) == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(FIRST_PORT + 123456 % NUM_PORTS),
    }


def test_the_port_that_the_job_chose_wins() -> None:
    assert rank_variables({**STEP, "MASTER_PORT": "4242"})["MASTER_PORT"] == "4242"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**STEP, "RANK": "0"},  # torchrun inside a step
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # a shell under srun --pty
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the batch script
    ],
)
def test_who_is_no_rank(environment: dict[str, str]) -> None:
    assert rank_variables(environment) == {}
