"""The examples in docstrings are right: every module of the package that holds `>>>` is run by doctest."""

import doctest
import importlib

from tests.spawn import ROOT

FEWEST_EXAMPLES = 10


def test_examples_in_docstrings() -> None:
    paths = [path for path in (ROOT / "pal_ds").rglob("*.py") if ">>>" in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)]
    results = {
        name: doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
        for name in names
    }
    failed = {name: result.failed for name, result in results.items() if result.failed}
    assert not failed, failed
    silent = [name for name, result in results.items() if not result.attempted]
    assert not silent, f"doctest finds none of the examples of {silent}"
    assert sum(result.attempted for result in results.values()) >= FEWEST_EXAMPLES
