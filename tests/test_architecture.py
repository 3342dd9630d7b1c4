"""The countable rules of the house: who may import what, sizes, docstrings, no head named outside heads/."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pal_ds.cli.command_table import COMMANDS
from pal_ds.heads import HEADS
from tests.spawn import ROOT

PACKAGE = ROOT / "pal_ds"
MODULES = sorted(
    path
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "slurm").rglob("*.py"),
    ]
)
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in it: in functions and under TYPE_CHECKING too."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                names.add(whole if whole in modules else base)
    return names & modules - {module_name(path)}


def inside(path: Path, folder: str) -> bool:
    return path.is_relative_to(PACKAGE / folder)


IMPORTS = {
    module_name(path): imports_of(path, {module_name(path) for path in SOURCES}) for path in SOURCES
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_docstrings(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES, f"{path} is longer than {MAX_FILE_LINES} lines"
    assert ast.get_docstring(tree(path)), f"{path} does not say what it is for"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_engine_imports_deepspeed(path: Path) -> None:
    if not inside(path, "engine"):
        assert not any(name.split(".")[0] == "deepspeed" for name in imported(path))


def test_heads_and_exported_files_need_torch_alone() -> None:
    """They travel in exported folders: no pal_ds beyond siblings, no jaxtyping but through its fallback."""
    for path in [*(PACKAGE / "heads").glob("*.py"), *(PACKAGE / "remote_code").glob("*.py")]:
        if path.name in ("__init__.py", "exported_head.py"):
            continue
        roots = {name.split(".")[0] for name in imported(path)}
        assert "pal_ds" not in roots, path
        if inside(path, "heads") and path.name != "jaxtyping_fallback.py":
            assert not roots & {"jaxtyping", "transformers", "numpy"}, path


def test_packages_import_one_way() -> None:
    """A package imports only what stands below it in the layers of pyproject.toml, lazily or for types too."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pal_ds"]["layers"]
    level = {room: level for level, rooms in enumerate(layers) for room in rooms}
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    rooms -= {"__init__", "__pycache__", "recipes", "suites", "py"}
    assert rooms == set(level), "pyproject.toml lists the packages and top-level modules"
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if "." in module
        and "." in other
        and room_of(module) != room_of(other)
        and level[room_of(other)] >= level[room_of(module)]
    ]
    assert not upward, upward


def test_no_circle_of_imports() -> None:
    """Modules have an order in which each could be imported after all that it names."""
    TopologicalSorter(IMPORTS).prepare()


UNREACHED = {
    "pal_ds.kernels.collapse",
    "pal_ds.kernels.mix",
    "pal_ds.kernels.mix_triton",
    "pal_ds.kernels.score_all",
    "pal_ds.kernels.score_all_triton",
}
"""Kernels that no command uses yet: they are wired in or deleted once a GPU has timed them."""


def test_every_module_is_reached() -> None:
    """A command, a tool, a SLURM script or a module that one of these imports names each module of the package."""
    names = {module_name(path) for path in SOURCES}
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "slurm").glob("*.py")]
    shell = "".join(path.read_text() for path in (ROOT / "slurm").iterdir() if path.is_file())
    ahead = {name for name in names if name in shell}
    # The table of commands names its modules in strings, so that `--help` imports none.
    ahead |= {f"pal_ds.cli.{entry.location.partition(':')[0]}" for entry in COMMANDS.values()}
    ahead |= {"pal_ds", "pal_ds.__main__"}.union(*(imports_of(path, names) for path in scripts))
    reached: set[str] = set()
    while ahead:
        name = ahead.pop()
        reached.add(name)
        # Importing a module runs the packages that hold it.
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        ahead |= (IMPORTS[name] | parents) - reached
    assert names - reached == UNREACHED


def test_few_modules_lie_loose() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_head_is_named_outside_heads() -> None:
    """The loop, losses, metrics and export never know which head runs."""
    for path in PACKAGE.rglob("*.py"):
        if inside(path, "heads"):
            continue
        names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        names |= {
            node.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not names & set(HEADS), f"{path} names {names & set(HEADS)}"


AVOIDED = {"told", "asked", "looks", "judge", "judged", "Judge", "Judged"}
"""Words that the glossary replaces by the field's."""
MAX_FOUND = 20
"""`found` says nothing of a value; so many bindings of it remain."""


def bound_names(path: Path) -> list[str]:
    """Names that a file defines, assigns or takes as parameters."""
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) or (
            isinstance(node, ast.ExceptHandler) and node.name
        ):
            names.append(node.name)
    return names


def test_names_are_the_fields_terms() -> None:
    names = {path: bound_names(path) for path in MODULES}
    avoided = {
        f"{path}: {name}"
        for path, bound in names.items()
        for name in bound
        if AVOIDED & set(name.split("_"))
    }
    assert not avoided, avoided
    assert sum(bound.count("found") for bound in names.values()) <= MAX_FOUND


def test_no_call_takes_a_starred_tuple() -> None:
    """A starred tuple hides what binds to what: keywords say it."""
    starred = [
        f"{path}:{node.lineno}"
        for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List)
    ]
    assert not starred, starred


MAX_UNTYPED_DICTS, MAX_ANY = 90, 60
"""So many uses of `dict[str, Any]`, and of Any as a parameter's or result's type (ruff ANN401), remain."""


def test_schemas_are_typed() -> None:
    assert sum(path.read_text().count("dict[str, Any]") for path in SOURCES) <= MAX_UNTYPED_DICTS
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "ANN401"]
    command = [*ruff, "--output-format", "concise", str(PACKAGE)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert 0 < sum("ANN401" in line for line in lines) <= MAX_ANY


RELATIVE = re.compile(r"(Of|What|Whether|As|The same|Those)\b")
"""A docstring that begins like this is read as the end of a sentence that stands elsewhere."""


def test_docstrings_stand_alone() -> None:
    beginnings = [
        f"{path}: {docstring[:60]}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (docstring := ast.get_docstring(node))
        and RELATIVE.match(docstring)
    ]
    assert not beginnings, "\n".join(beginnings)
