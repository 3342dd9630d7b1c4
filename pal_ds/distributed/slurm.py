"""Rank variables from SLURM's, where `srun` starts one task per rank.

    srun python -m pal_ds.distributed.slurm train --config RECIPE --run_dir D

is `python -m pal_ds train ...` with the variables set that torchrun would set. It never calls scontrol, which
containers lack. Only a step of several tasks counts: the batch script itself, and a shell under `srun --pty`, carry
SLURM's variables too, and what is started there is a world of one.
"""

import os
import re
import runpy
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Ports of jobs lie below the range from which Linux takes ports for outgoing connections."""


def first_host(node_list: str) -> str:
    """Return the first node of a SLURM node list.

    >>> first_host("gpu[03-05,9],login")
    'gpu03'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else "")


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Return the number of tasks on node number `node`, from SLURM's run-length form.

    >>> [tasks_on_node("2(x3),1", node) for node in range(4)]
    [2, 2, 2, 1]
    """
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE and so on for this task; none where a launcher set them or no step of tasks runs."""
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or num_tasks == "1":
        return {}
    tasks_per_node = environment["SLURM_STEP_TASKS_PER_NODE"]
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(tasks_per_node, int(environment["SLURM_NODEID"]))),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        # The job id keeps jobs that share a node apart; a fixed port would collide.
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


if __name__ == "__main__":
    os.environ.update(rank_variables(os.environ))
    runpy.run_module("pal_ds", run_name="__main__", alter_sys=True)
