"""The same work asked for by several processes at once is done once, and all of them end with what was made."""

import json
from pathlib import Path

from tests.bad_input.conftest import Place
from tests.spawn import outcome_of, run_command


def test_of_three_preparations_one_works(place: Place, tmp_path: Path) -> None:
    # Left by one that was killed on another machine.
    (tmp_path / "d.tmp-other_host-7").mkdir()
    words = ("prepare", f"--config={place.recipe}", f"--data.path={tmp_path / 'd'}")
    outcome = outcome_of("pal_ds", *words, num_ranks=3)
    said = [text for _, text in outcome]
    assert [code for code, _ in outcome] == [0, 0, 0], said
    assert sum("comparisons, train" in text for text in said) == 1
    assert sum("reusing it" in text for text in said) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_of_two_adaptations_one_works(place: Place, tmp_path: Path) -> None:
    words = ("adapt", f"--run_dir={place.run}", f"--pairs={place.pairs}", f"--out={tmp_path / 'a'}")
    outcome = outcome_of("pal_ds", *words, num_ranks=2)
    said = [text for _, text in outcome]
    assert [code for code, _ in outcome] == [0, 0], said
    assert sum("fitting users" in text for text in said) == 1
    assert sum("reusing them" in text for text in said) == 1
    names = {path.name for path in (tmp_path / "a").iterdir()}
    table = {"users.arrow", "users.safetensors", "posterior.safetensors"}
    assert names == {"fitted_to.json", "report.json"} | table


def test_figures_of_a_run_go_elsewhere(place: Place, tmp_path: Path) -> None:
    before = sorted(place.run.rglob("*"))
    words = (f"--run_dir={place.run}", f"--data={place.pairs}", f"--out={tmp_path / 'out'}")
    run_command("evaluate", *words, "--name=own")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["own.json"]
    assert json.loads((tmp_path / "out" / "own.json").read_text())["pairs"] == 40
    assert sorted(place.run.rglob("*")) == before
