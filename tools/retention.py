"""`pal-ds retention` under the name that scripts know: what a model forgot.

python tools/retention.py BEFORE AFTER NAME,.. [--out FOLDER]
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("retention", arguments)


if __name__ == "__main__":
    main()
