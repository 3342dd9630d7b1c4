"""A few damaged files for each reader; `make fuzz` tries them for minutes."""

from pathlib import Path

import pytest

from tests.fuzz.fuzz import Fuzzer, fuzz
from tests.fuzz.targets import TARGETS

EXAMPLES = {
    "records": 60,
    "prepared": 60,
    "users": 80,
    "recipes": 12,
    "run": 60,
    "export": 15,
    "shards": 60,
    "cache": 80,
}


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_in_words_or_harmless(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAL_DS_CACHE", str(tmp_path / "marks"))
    fuzzer = Fuzzer(name, tmp_path)
    fuzz(fuzzer, EXAMPLES[name])
    assert fuzzer.outcomes["refused"] > EXAMPLES[name] / 10
