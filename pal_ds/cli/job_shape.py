"""The size of a job for SLURM as a person asks for it: nodes, tasks, GPUs and the array."""

import re

from jsonargparse import Namespace

from pal_ds.errors import UserError


def check_shape(options: Namespace) -> None:
    """Fills what is left out. Raises UserError where tasks and GPUs do not match."""
    gpus, tasks = options.gpus_per_node, options.ntasks_per_node
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1)):
        value = options[name]
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")
    if tasks is not None and tasks < 1:
        raise UserError(f"--ntasks_per_node is {tasks}; it must be at least 1.")
    if gpus and tasks not in (None, gpus):
        raise UserError(
            f"--ntasks_per_node {tasks} with --gpus_per_node {gpus}: a rank drives one GPU. Leave "
            "--ntasks_per_node out, or set --gpus_per_node 0 to train on CPUs."
        )
    options.ntasks_per_node = tasks or gpus or 1
    if options.array is None and options.job in ("adapt", "sweep"):
        options.array = "0-0"
    if options.array is not None and not re.fullmatch(r"\d+(-\d+)?(%\d+)?", options.array):
        raise UserError(f"--array {options.array}: give a range such as 0-7, or 0-7%2.")


def array_bounds(array: str) -> tuple[int, int]:
    """First and last index of `0-7%2`."""
    first, _, last = array.partition("%")[0].partition("-")
    return int(first), int(last or first)
