"""`pal-ds import-reference` under the name that scripts know: a checkpoint of the PAL reference -> reward model folder.

python tools/import_reference.py CHECKPOINT OUT --config PREFLEARNER.yaml --backbone FOLDER [--users_out U]
    [--user ID | --mixture w1,..,wK | --population]
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("import-reference", arguments)


if __name__ == "__main__":
    main()
