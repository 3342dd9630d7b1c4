"""`pal-ds reshard` under the name that scripts know: a checkpoint for another number of ranks.

python tools/reshard.py RUN --world_size W [--step N|latest|best] [--trust_checkpoint]
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("reshard", arguments)


if __name__ == "__main__":
    main()
