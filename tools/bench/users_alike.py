"""Give each entry of a TextScore file to one of NUM users at random: users who do not differ.

    python tools/bench/users_alike.py helpful.test.json OUT [--num_users 40] [--seed 0]

The suite `hh_users_alike` reads OUT: what a personal head loses to one reward for all on it is learnt from noise.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_users", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    entries = json.loads(arguments.entries.read_text(encoding="utf-8"))
    users = [draw.randrange(arguments.num_users) for _ in entries]
    given = [entry | {"user_id": f"user_{u:02d}"} for entry, u in zip(entries, users, strict=True)]
    arguments.out.write_text(json.dumps(given), encoding="utf-8")


if __name__ == "__main__":
    main()
