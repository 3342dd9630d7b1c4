"""Shards of new users: each user whole, every line once, the same lines at every attempt."""

import json
import subprocess
import sys
from pathlib import Path

from tests.spawn import ROOT, environment

NUM_SHARDS = 3


def cut(pairs: Path, shard: int) -> list[str]:
    file = pairs.with_name(f"{shard}.jsonl")
    words = [
        sys.executable,
        ROOT / "slurm" / "user_shards.py",
        "cut",
        pairs,
        shard,
        NUM_SHARDS,
        file,
    ]
    done = subprocess.run(
        [str(word) for word in words], env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return file.read_text().splitlines()


def test_every_line_falls_into_one_shard_and_users_stay_whole(tmp_path: Path) -> None:
    users = [*(f"u{number}" for number in range(20)), "Zoë", 17, None]
    lines = [json.dumps({"user_id": user, "prompt": str(n)}) for n in range(3) for user in users]
    lines += [json.dumps({"prompt": "of nobody in particular"}), "no record"]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, ""]))
    shards = [cut(tmp_path / "pairs.jsonl", shard) for shard in range(NUM_SHARDS)]
    assert sorted(line for shard in shards for line in shard) == sorted(lines)
    # A line that is no record is refused once, by `adapt`, and not dropped here.
    assert "no record" in shards[0]
    homes: dict[object, set[int]] = {}
    for number, shard in enumerate(shards):
        for line in shard:
            if line != "no record":
                homes.setdefault(json.loads(line).get("user_id"), set()).add(number)
    assert all(len(home) == 1 for home in homes.values()) and all(shards)
