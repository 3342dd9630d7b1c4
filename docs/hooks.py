"""Pages of the manual that are made from the tree: the reference, and files that lie outside docs/.

The reference has a page for each package and for each loose module of pal_ds, with the docstrings of all of its
modules, so it follows any layout. Kernels are left out: Triton's functions have no types that a page could show.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pal_ds"
LEFT_OUT = {"kernels", "recipes", "suites", "__pycache__"}
PAGES = {
    "benchmarks.md": "tools/bench/README.md",
    "kernels.md": "pal_ds/kernels/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the manual -> file of the repository that it shows."""
PICTURES = ("tools/bench/quickstart.png", "tools/bench/step_curve.png")
_LINK_INTO_DOCS = re.compile(r"\]\((?:\.\./)*docs/")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the pages of the reference to the navigation."""
    pages: list[Any] = [{"Overview": "reference/index.md"}]
    pages += [{name: f"reference/{name}.md"} for name in reference_pages()]
    assert config.nav is not None, "mkdocs.yml has a navigation"
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for name, path in PAGES.items():
        text = _LINK_INTO_DOCS.sub("](", (ROOT / path).read_text(encoding="utf-8"))
        for other, other_path in PAGES.items():
            text = text.replace(f"]({other_path})", f"]({other})")
        files.append(File.generated(config, name, content=text))
    for path in PICTURES:
        files.append(File.generated(config, Path(path).name, abs_src_path=str(ROOT / path)))
    pages = reference_pages()
    files.append(File.generated(config, "reference/index.md", content=_overview(pages)))
    for name, modules in pages.items():
        text = "\n".join([f"# {name}", *(f"\n::: {module}" for module in modules)]) + "\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository, as somebody reads them there, into links to the pages that show them."""
    shown = {path: name for name, path in PAGES.items()}
    shown |= {path: Path(path).name for path in PICTURES}
    shown |= {f"pal_ds/{name}": f"reference/{name}.md" for name in reference_pages()}
    shown["pal_ds"] = "reference/index.md"
    for path, name in shown.items():
        markdown = markdown.replace(f"](../{path})", f"]({name})")
    return markdown


def reference_pages() -> dict[str, list[str]]:
    """Page -> modules on it, in alphabetical order."""
    pages: dict[str, list[str]] = {"pal_ds": ["pal_ds"]}
    for path in sorted(PACKAGE.iterdir()):
        if path.name in LEFT_OUT or path.name.startswith("__"):
            continue
        if path.is_dir():
            pages[path.name] = [_module(file) for file in sorted(path.rglob("*.py"))]
        elif path.suffix == ".py":
            pages[path.stem] = [_module(path)]
    return pages


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _overview(pages: dict[str, list[str]]) -> str:
    """What each page is about: the first sentence of its first module."""
    rows = [
        f"| [{name}]({name}.md) | {_first_line(modules[0])} |" for name, modules in pages.items()
    ]
    return "\n".join(
        ["# Reference", "", "From the docstrings of the code.", "", "| | |", "|---|---|", *rows, ""]
    )


def _first_line(module: str) -> str:
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    return lines[0] if lines else ""
