"""`pal-ds consolidate` under the name that scripts know: sharded checkpoint -> scalar reward model.

python tools/consolidate.py RUN OUT [--step N|latest|best] [--user ID | --group NAME |
    --mixture w1,..,wK | --population] [--users U] [--with_users] [--dtype fp32|bf16]
python tools/consolidate.py RUN OUT --users FILE [--users U]      # OUT/USER for every id in FILE
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("consolidate", arguments)


if __name__ == "__main__":
    main()
