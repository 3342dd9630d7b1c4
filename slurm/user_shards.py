"""Cuts a file of comparisons into shards that hold each user whole, and puts the fitted users together again.

python slurm/user_shards.py cut PAIRS.jsonl SHARD COUNT FILE   # the lines of that shard, to FILE
python slurm/user_shards.py merge OUT                          # OUT/shards/*/ -> OUT/users.*, OUT/report.json
"""

import json
import os
import sys
from pathlib import Path

import xxhash

EVERYONE = "population"
"""The user of a line that names none, as `prepare` reads it."""


def cut(pairs: Path, shard: int, count: int, file: Path) -> None:
    """Writes the lines whose user's hash falls into the shard; a line that is no record goes to the first, to be
    refused there with its number."""
    with open(pairs, encoding="utf-8") as stream, open(file, "w", encoding="utf-8") as target:
        for line in filter(str.strip, stream):
            try:
                user = json.loads(line).get("user_id") or EVERYONE
            except (ValueError, AttributeError):
                user = None
            home = 0 if user is None else xxhash.xxh3_64_intdigest(str(user).encode()) % count
            if home == shard:
                target.write(line if line.endswith("\n") else line + "\n")


def merge(out: Path) -> None:
    """Writes the table and the report of all shards, as `adapt` would have written them of the whole file."""
    import torch

    from pal_ds.adaptation.result import read_report
    from pal_ds.eval.results import write_user_figures
    from pal_ds.inference.fitted_to import read_record, write_record
    from pal_ds.inference.posterior_file import read_posterior, write_posterior
    from pal_ds.users import UserTable

    folders = sorted(
        (path for path in (out / "shards").iterdir() if (path / "report.json").is_file()),
        key=lambda path: int(path.name),
    )
    records = [read_record(folder) for folder in folders]
    if apart := [folder for folder, one in zip(folders, records, strict=True) if one != records[0]]:
        print(
            f"{apart[0]}: its users were fitted to another run or step than those of {folders[0]}. Delete it, and "
            f"submit its number again (--array={apart[0].name}) with the run and --step of the others.",
            file=sys.stderr,
        )
        sys.exit(2)
    tables = [UserTable.load(folder) for folder in folders]
    merged = UserTable(tables[0].num_prototypes)
    states = [table.state_dict() for table in tables]
    tensors = {
        name: torch.cat([state[name] for state in states])
        for name, value in states[0].items()
        if isinstance(value, torch.Tensor)
    }
    merged.load_state_dict(
        {"ids": [i for table in tables for i in table.ids], "seed": tables[0].seed, **tensors}
    )
    # Beside their names first: another task may be doing the same.
    part = out / f"merge.{os.getpid()}"
    merged.save(part)
    stored = [
        read_posterior(folder, len(table.ids), table.num_prototypes)
        for folder, table in zip(folders, tables, strict=True)
    ]
    known = [one.covariance for one in stored if one is not None]
    if len(known) == len(folders):
        write_posterior(part, torch.cat(known))
    if records[0] is not None:
        write_record(part, records[0])
    for path in part.iterdir():
        path.replace(out / path.name)
    part.rmdir()
    reports = [read_report(folder) for folder in folders]
    num_pairs = sum(report["pairs"] for report in reports)
    right = sum(report["accuracy_on_these_pairs"] * report["pairs"] for report in reports)
    users = {user: entry for report in reports for user, entry in report["users"].items()}
    figures = {"step": reports[0]["step"], "pairs": num_pairs}
    write_user_figures(
        out / "report.json",
        {**figures, "accuracy_on_these_pairs": right / num_pairs, "users": users},
    )
    print(f"{len(users)} users from {num_pairs} pairs in {len(folders)} shards -> {out}")


if __name__ == "__main__":
    if sys.argv[1] == "cut":
        cut(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        merge(Path(sys.argv[2]))
