"""A tiny run with figures, an export and a frozen recipe beside it, which the tests of this folder share."""

import json

import pytest
import yaml

from tests.bad_input.conftest import Place
from tests.spawn import run_command


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("runs"))
    place.make()
    run_command("evaluate", f"--run_dir={place.run}", "--split=dev")
    run_command("consolidate", place.run, place.folder / "export")
    recipe = yaml.safe_load(place.recipe.read_text())
    recipe["backbone"] = {"path": str(place.run / "base"), "tuning": "frozen"}
    (place.folder / "frozen.yaml").write_text(yaml.safe_dump(recipe))
    lines = [{"prompt": "Tell me about tea.", "response": f"Tea is fine {n}."} for n in range(40)]
    texts = "".join(json.dumps(line) + "\n" for line in lines)
    (place.folder / "texts.jsonl").write_text(texts)
    return place
