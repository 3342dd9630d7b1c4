"""Another version of transformers opens exported folders and scores as the trainer did, or is refused by its name.

The older version is that of the python which PAL_DS_OLDER_PYTHON names (`.ci/run` makes one).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from pal_ds.export.parity import PROBE_LENGTHS
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification
from pal_ds.runs.run_dir import RunDirectory
from tests.export.cases import CASES, Case, audience_of
from tests.export.test_folder import (
    EVERY_WAY,
    SHORT,
    assert_close,
    raw_texts,
    read_as_stranger,
    trainer_rewards,
)

PYTHON = os.environ.get("PAL_DS_OLDER_PYTHON")
RIGHT = [way for way in EVERY_WAY if way["side"] == "right"]
FULL = [case for case in CASES if case.tuning == "full"]


@pytest.mark.skipif(
    PYTHON is None, reason="PAL_DS_OLDER_PYTHON names no python with transformers 4"
)
def test_an_older_version_scores_the_same(runs: Path, exported: dict, tmp_path: Path) -> None:
    def job(case: Case, **changes: Any) -> dict[str, Any]:
        texts = raw_texts(case)[SHORT]
        usual = {"texts": texts, "trust": True, "mixture": None, "ways": EVERY_WAY[:6]}
        return {"folder": str(exported[case.name][0]), **usual, "pipeline": True, **changes}

    # Without trust first: a class that code registered is found from then on.
    stock = [case for case in FULL if case.is_stock]
    jobs = [job(case, trust=False, ways=RIGHT) for case in stock] + [job(case) for case in FULL]
    results = read_as_stranger(jobs, tmp_path, str(PYTHON))
    assert {result["transformers"] for result in results} != {transformers.__version__}
    for case, result in zip([*stock, *FULL], results, strict=True):
        expected = trainer_rewards(RunDirectory(runs / case.name), audience_of(case))
        assert_close(result, expected.ravel()[SHORT])


def as_if_from(version: str, folder: Path, out: Path, **changes: Any) -> Path:
    """A copy of a folder that another version of transformers exported."""
    shutil.copytree(folder, out)
    file = out / "config.json"
    content = json.loads(file.read_text())
    content["probe"] |= {"transformers": version, **changes}
    content["transformers_version"] = version
    file.write_text(json.dumps(content))
    return out


def test_other_scores_are_refused_by_the_version(exported: dict, tmp_path: Path) -> None:
    folder = exported["llama_pal_a_full"][0]
    scores = json.loads((folder / "config.json").read_text())["probe"]["scores"]
    assert len(set(scores)) == len(scores)
    same = as_if_from("4.57.6", folder, tmp_path / "same")
    # The probe is for the folder's own user, whoever is asked for.
    model = PalForSequenceClassification.from_pretrained(same, mixture=[0.0, 1.0, 0.0])
    assert model.config.mixture == [0.0, 1.0, 0.0]
    other = as_if_from("4.57.6", folder, tmp_path / "other", scores=[scores[0] + 1e-3, *scores[1:]])
    with pytest.raises(
        ValueError, match=f"transformers {transformers.__version__} computes .*4.57.6"
    ):
        PalForSequenceClassification.from_pretrained(other)


def test_an_unknown_backbone_is_refused_by_the_version(exported: dict, tmp_path: Path) -> None:
    folder = as_if_from("6.1.0", exported["llama_pal_a_full"][0], tmp_path / "newer")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"llama7"'))
    with pytest.raises(ValueError, match=r"knows no backbone 'llama7'.*6\.1\.0"):
        PalForSequenceClassification.from_pretrained(folder)


def test_a_probe_holds_no_text_of_the_data(exported: dict) -> None:
    folder, facts = exported["bert_pal_b_full"]
    content = json.loads((folder / "config.json").read_text())
    probe, tokens = content["probe"], facts["tokens"]
    draws = np.random.default_rng(0)
    for ids, length in zip(probe["ids"], PROBE_LENGTHS, strict=False):
        drawn = draws.integers(content["text_config"]["vocab_size"], size=length).tolist()
        assert ids == [*tokens["prefix_ids"], *drawn, *tokens["end_ids"]]
