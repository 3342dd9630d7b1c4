"""The fenced blocks of a Markdown page, and what the comments before them say about running them.

    <!-- run -->                      the test runs the block, in the page's folder, in the page's order
    <!-- not run: needs a GPU -->     it does not, for one of REASONS; its commands are parsed all the same
    <!-- file: pairs.jsonl -->        the block is what this file holds
    <!-- suite -->                    YAML of `pal-ds compare`; other YAML is a recipe
    <!-- other: of GitHub -->         YAML that is neither

A comment stands on the line before the fence and is invisible on the page. Shell and Python blocks need one of the
first two, or they are a file. Blocks of other languages (text, json) are only shown.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHELL = ("sh", "bash", "shell", "console")
LANGUAGES = (*SHELL, "python", "yaml", "json", "text", "toml")
REASONS = (
    "needs a cluster",
    "needs a GPU",
    "needs the hub",
    "needs a published dataset",
    "needs a container runtime",
    "needs TRL",
    "needs OpenRLHF",
    "needs a checkpoint of the PAL reference",
    "needs several nodes",
    "installs",
    "takes minutes",
    "sketch",
)
"""What may keep a block from being run: a reason of a page begins with one of these."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*) *$")
_COMMENT = re.compile(r"^ *<!-- (?P<name>not run|run|file|suite|other)(?:: (?P<value>.+?))? -->$")
_OPENS_INDENTED_TEXT = re.compile(r"^ *([-*+]|\d+\.|!!!|\?\?\?\+?|===)( |$)")


@dataclass(frozen=True)
class Block:
    """One fenced block; `where` is "page:line" of its fence."""

    where: str
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether the test runs it."""
        return "run" in self.marks

    @property
    def mistake(self) -> str | None:
        """Why the test of pages refuses this block, None where it does not."""
        if self.language not in LANGUAGES:
            return f"{self.where}: language {self.language!r}; name one of {', '.join(LANGUAGES)}"
        decided = [name for name in ("run", "not run", "file") if name in self.marks]
        if len(decided) > 1:
            return f"{self.where}: is marked {' and '.join(decided)}"
        if self.language in (*SHELL, "python") and not decided:
            return (
                f"{self.where}: say `<!-- run -->` or `<!-- not run: REASON -->` before the block"
            )
        reason = self.marks.get("not run")
        if reason is not None and not reason.startswith(REASONS):
            return f"{self.where}: reason {reason!r} begins with none of {', '.join(REASONS)}"
        return None


def read_blocks(path: Path, name: str) -> list[Block]:
    """The fenced blocks of a page in order.

    Raises:
        ValueError: a fence that is not closed, or code that is set off by indentation, which has no mark.
    """
    blocks: list[Block] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    marks: dict[str, str] = {}
    blank, indented_text = True, False
    for number, line in lines:
        if (comment := _COMMENT.match(line)) is not None:
            marks[comment["name"]] = comment["value"] or ""
            continue
        if (fence := _FENCE.match(line)) is not None:
            code = "\n".join(_until_closed(lines, fence, f"{name}:{number}"))
            blocks.append(Block(f"{name}:{number}", fence["language"], code, marks))
        elif line.strip():
            if blank and line.startswith("    ") and not indented_text:
                raise ValueError(f"{name}:{number}: code by indentation; put it between fences")
            if not line.startswith(" "):
                indented_text = _OPENS_INDENTED_TEXT.match(line) is not None
        marks, blank = {}, not line.strip()
    return blocks


def _until_closed(
    lines: Iterator[tuple[int, str]], fence: re.Match[str], where: str
) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == fence["fence"]:
            return
        yield line.removeprefix(fence["indent"])
    raise ValueError(f"{where}: the fence is not closed")


def commands_of(code: str) -> list[str]:
    """The commands of a shell block, one a line; a backslash at the end joins lines, comments are left out."""
    joined = code.replace("\\\n", " ")
    lines = (line.strip() for line in joined.splitlines())
    return [line for line in lines if line and shlex.split(line, comments=True)]
