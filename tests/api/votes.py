"""Votes in a form of their own, which examples/my_source.py reads: even users like short answers, odd ones long."""

import shutil
from pathlib import Path
from typing import Any

from tests.spawn import ROOT

TOPICS = ("tea", "chess", "bread", "trains")


def vote(user: str, number: int) -> dict[str, Any]:
    topic, short_left = TOPICS[number % 4], number % 3 == 0
    answers = [
        f"{topic} is fine {number % 9}.",
        f"{topic} is a matter one may speak of {number % 7}.",
    ]
    left, right = answers if short_left else answers[::-1]
    prefers = "left" if short_left == (int(user[1:]) % 2 == 0) else "right"
    question = f"What of {topic}, {number}?"
    return {"who": user, "question": question, "left": left, "right": right, "prefers": prefers}


def new_users() -> list[dict[str, str]]:
    """Comparisons of n0 and n1, as pal_ds's own records."""
    rows = []
    for number in range(12):
        made = vote(f"n{number % 2}", 200 + number)
        other = {"left": "right", "right": "left"}[made["prefers"]]
        row = {"user_id": made["who"], "prompt": made["question"]}
        rows.append({**row, "chosen": made[made["prefers"]], "rejected": made[other]})
    return rows


def write_folder(folder: Path) -> Path:
    """The files of examples/, with 120 votes of six users."""
    folder.mkdir(exist_ok=True)
    for file in (*(ROOT / "examples").glob("my_*"), ROOT / "examples" / "votes.jsonl"):
        shutil.copy(file, folder)
    return folder
