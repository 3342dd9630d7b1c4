"""A command line as people type it, and as the parser declares it."""

from pal_ds.cli.command_table import COMMANDS

COMPLETION = "--completion SHELL"
"""The option of `pal-ds` itself that prints a completion script."""


def as_declared(words: list[str]) -> list[str]:
    """Return the words with `_` and `-` in the names of command and options as they are declared; values stay.

    What follows a `--` of its own is of another program and stays as it is.

    >>> as_declared(["few-shot", "--run-dir", "my-run", "--num-draws=3"])
    ['few_shot', '--run_dir', 'my-run', '--num_draws=3']
    >>> as_declared(["import_reference", "a-b", "--", "--a-b"])
    ['import-reference', 'a-b', '--', '--a-b']
    """
    declared = {name.replace("-", "_"): name for name in COMMANDS}
    end = words.index("--") if "--" in words else len(words)
    result = [_option(word) if word.startswith("--") else word for word in words[:end]]
    if result:
        result[0] = declared.get(result[0].replace("-", "_"), result[0])
    return [*result, *words[end:]]


def _option(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
