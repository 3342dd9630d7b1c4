"""`--help` explains every option and every key of a recipe, and shows nothing of the program's inside."""

import re

import pytest

from pal_ds.cli.command_table import COMMANDS
from pal_ds.cli.main import main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert " object at 0x" not in printed and "<function" not in printed
    options = re.split(r"\n  (?=-|\w+  )", printed.partition("\n\n")[2])[1:]
    assert len(options) > 1
    # The name, then words; where nobody explained an option its type comes at once.
    unexplained = [text for text in options if re.match(r"\S+( \S+)*\s+\((type|required)", text)]
    assert not unexplained, "\n".join(unexplained)
