"""Every command of the README and of docs/ runs, or parses and says why it does not run.

The README's commands run first, on 60 made-up comparisons. Each page of docs/ goes on from what they left:
`pairs.jsonl`, `recipe.yaml`, `runs/mine`.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import read_blocks
from tests.docs.commands import our_commands, parse
from tests.spawn import ROOT
from tests.warm import WarmParent

PAGES = sorted(ROOT.glob("docs/**/*.md"))
README = ROOT / "README.md"
INCLUDED = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")]
TASKS = ("boil an egg", "mend a flat tyre", "sort a list", "grow basil", "write a cover letter")
NUM_OWN_COMPARISONS = 60


def write_own_data(path: Path) -> None:
    """60 comparisons of three users: two prefer the short answer, one the long one."""
    with open(path, "w") as file:
        for number in range(NUM_OWN_COMPARISONS):
            user = ("alice", "bob", "carol")[number % 3]
            task = TASKS[number // 3 % 5]
            short = f"Start small and practise: so you {task}."
            long = f"Thanks for asking! To {task}, read up on it first, then gather all that you need, and go on."
            chosen, rejected = (long, short) if user == "bob" else (short, long)
            prompt = f"How do I {task}, question {number // 15}?"
            record = {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, warm: WarmParent) -> Path:
    """The folder in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    write_own_data(folder / "pairs.jsonl")
    failures = warm("tests.docs.commands:run_page", folder, README, "README.md")
    assert not failures, "\n\n".join(failures)
    return folder


def test_readme_runs(after_readme: Path) -> None:
    assert (after_readme / "runs" / "mine" / "latest.json").is_file()


@pytest.mark.parametrize("page", [*INCLUDED, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, after_readme: Path, tmp_path: Path, warm: WarmParent) -> None:
    folder = tmp_path / "page"
    # Relative links lead from one exported folder to another.
    shutil.copytree(after_readme, folder, symlinks=True)
    name = str(page.relative_to(ROOT))
    failures = warm("tests.docs.commands:run_page", folder, page, name)
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize(
    "page", [README, *INCLUDED, *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_block_says_whether_it_runs(page: Path) -> None:
    blocks = read_blocks(page, str(page.relative_to(ROOT)))
    mistakes = [block.mistake for block in blocks if block.mistake]
    assert not mistakes, "\n".join(mistakes)
    for block in blocks:
        if block.language == "python":
            compile(block.code, block.where, "exec")


def test_the_manual_runs_commands() -> None:
    """Marks alone would let every page pass: most commands of ours do run."""
    blocks = [block for page in [README, *PAGES] for block in read_blocks(page, page.name)]
    shell = [block for block in blocks if block.language == "sh"]
    assert sum(block.runs for block in shell) >= 20
    assert "run" in next(block for block in shell if "pal-ds train" in block.code).marks


UNMARKED = "Text\n\n```sh\npal-ds train --help\n```\n"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (UNMARKED, "say `<!-- run -->`"),
        (UNMARKED.replace("```sh\n", "<!-- not run: no time -->\n```sh\n"), "begins with none of"),
        (UNMARKED.replace("```sh\n", "<!-- run -->\n```sh\n"), None),
        (UNMARKED.replace("```sh\n", "```\n"), "language ''"),
    ],
)
def test_unmarked_blocks_are_found(text: str, mistake: str | None, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    [block] = read_blocks(tmp_path / "page.md", "page.md")
    assert block.mistake is None if mistake is None else mistake in (block.mistake or "")


@pytest.mark.parametrize("text", ["Text\n\n    pal-ds train\n", "```sh\npal-ds train\n"])
def test_code_that_is_no_block_is_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md:"):
        read_blocks(tmp_path / "page.md", "page.md")


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("pal-ds train --config quickstart --head PalA --data.path d --run_dir r", None),
        (
            "torchrun --nproc_per_node 8 -m pal_ds train --config quickstart --run_dirr r",
            "--run_di",
        ),
        ("job=$(sbatch --nodes=4 slurm/evaluate.sbatch RUN --splits dev)", "splits"),
        ("pal-ds users --list", "run_dir"),
    ],
)
def test_a_wrong_option_is_found(line: str, refused: str | None) -> None:
    [words] = our_commands(line)
    message = parse(words)
    assert message is None if refused is None else refused in (message or "")
