"""What the manual says of the tree is true: paths, packages, the picture of the layers, the README's length."""

import re
from pathlib import Path

import pytest
import yaml

import pal_ds
from docs.draw_layers import draw, read_layers
from pal_ds.data.sources import SOURCES
from pal_ds.heads import HEADS
from tests.docs.commands import COMMANDS
from tests.spawn import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
MAX_TERMS = 25
PLACEHOLDER = re.compile(r"/NAME|^slurm/(JOB|starts|jobs)")
"""Files that a reader is to make, and those of a run directory."""


def test_readme_has_its_length() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150 and len(text.split()) <= 1300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.])(?:pal_ds|tests|tools|slurm|docs|containers)/[\w./*-]*\w", page.read_text()
    )
    missing = [path for path in named if not PLACEHOLDER.search(path) and not list(ROOT.glob(path))]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", ["architecture.md", "heads.md"])
def test_files_named_without_their_folder_exist(page: str) -> None:
    """Those pages name files of one package after the other by their last part alone."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.M | re.S)
    names = set(re.findall(r"`(?:[\w]+/)*(\w+\.py)`", text))
    files = {
        path.name
        for folder in ("pal_ds", "tests", "docs")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert names and not names - files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    """Where people read the pages, too; `mkdocs build --strict` looks at the links of the site."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_package_has_a_row_in_architecture() -> None:
    text = (DOCS / "architecture.md").read_text()
    packages = [
        name for names in read_layers() for name in names if (ROOT / "pal_ds" / name).is_dir()
    ]
    assert [name for name in packages if f"| `{name}` |" not in text] == []


def test_the_picture_of_the_layers_is_drawn_from_them() -> None:
    assert (DOCS / "layers.svg").read_text() == draw(read_layers()), (
        "run python docs/draw_layers.py"
    )


def test_tables_are_whole() -> None:
    """Every command, head and source that there is has a row."""
    commands, training = (DOCS / "commands.md").read_text(), (DOCS / "training.md").read_text()
    data = (DOCS / "data.md").read_text()
    assert [name for name in COMMANDS if f"| `{name} " not in commands] == []
    assert [name for name in HEADS if f"`{name}`" not in training] == []
    assert [cls.__name__ for cls in SOURCES.values() if f"`{cls.__name__}`" not in data] == []


def test_the_source_of_the_manual_is_the_example() -> None:
    example = (ROOT / "examples" / "my_source.py").read_text()
    assert f"```python\n{example}```" in (DOCS / "data.md").read_text()


def test_glossary_is_short() -> None:
    rows = re.findall(r"^\| \*\*", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    assert 15 <= len(rows) <= MAX_TERMS


def test_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pal_ds.__version__
    assert f"## [{pal_ds.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_and_make_name_the_same_checks() -> None:
    """A check that .ci/run forgets would rot."""
    made = (ROOT / ".ci" / "run").read_text()
    for target in ("test", "spell", "types", "docs", "containers"):
        assert re.search(rf"^make .*\b{target}\b", made, flags=re.MULTILINE), target
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), (
            target
        )
