"""`pal-ds submit` under the name that scripts know: checks a job for SLURM and hands it to sbatch.

python tools/submit.py train RECIPE --run_dir D --nodes 4 --gpus_per_node 8 [-- --KEY VALUE ...]
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("submit", arguments)


if __name__ == "__main__":
    main()
