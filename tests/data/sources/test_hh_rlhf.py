"""HH-RLHF: the cut at the last answer, subsets as users, and every reason to drop, on 20 rows."""

import gzip
import json
from collections import Counter

import pytest

from pal_ds.data.sources import HhRlhf
from pal_ds.errors import UserError


def row(prompt, chosen, rejected, other_prompt=None):
    first = f"\n\nHuman: {prompt}\n\nAssistant:{chosen}"
    return {
        "chosen": first,
        "rejected": f"\n\nHuman: {other_prompt or prompt}\n\nAssistant:{rejected}",
    }


TALK = "hi\n\nAssistant: hello\n\nHuman: how are you?"
ROWS = {
    "helpful-base/train": [row(f"q{i}", " good", " bad") for i in range(8)]
    + [row(TALK, " x", " y")],
    "helpful-base/test": [row("t0", " good", " bad"), row("q1", " good", " bad")],
    "harmless-base/train": [
        *(row(f"r{i}", " no", " yes") for i in range(4)),
        row("r4", " no", " yes", other_prompt="r5"),
        row("r6", " no", " "),
        {"chosen": "no marker", "rejected": "here"},
    ],
    "harmless-base/test": [row("t1", " no", " yes"), row("q0", " no", " yes")],
}


@pytest.fixture
def folder(tmp_path):
    assert sum(map(len, ROWS.values())) == 20
    for name, rows in ROWS.items():
        path = tmp_path / "hh" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(item) + "\n" for item in rows)
    return str(tmp_path / "hh")


def test_exact_counts_cut_and_groups(folder):
    source = HhRlhf(folder)
    records = list(source.records())
    # Both test rows whose prompt is in a train split are left out.
    assert Counter((record.group, record.split) for record in records) == {
        ("helpful", "train"): 9,
        ("helpful", "test"): 1,
        ("harmless", "train"): 4,
        ("harmless", "test"): 1,
    }
    assert source.dropped == {
        "prompt_differs": 1,
        "empty_response": 1,
        "no_response_marker": 1,
        "prompt_in_two_splits": 2,
    }
    assert len(records) + source.dropped.total() == 20 == source.num_records()
    talk = records[8]
    assert talk.prompt == f"Human: {TALK}" and talk.responses == ("x", "y") and talk.label == -1
    assert {record.user_id for record in records} == {"population"}
    assert {len(v["files"]) for v in source.describe()["subsets"].values()} == {2}


def test_objectives_as_users_and_one_subset(folder):
    records = list(HhRlhf(folder, users="objective").records())
    assert all(record.user_id == record.group for record in records)
    assert len(list(HhRlhf(folder, subsets=("harmless-base",)).records())) == 6
    with pytest.raises(UserError, match=r"no subset 'harmless' \(did you mean 'harmless-base'"):
        HhRlhf(folder, subsets=("harmless",))
