"""Writes the raw comparisons: pairs.jsonl to train on, new_users.jsonl to fit, texts.jsonl to score."""

import json
import random

TOPICS = ("tea", "chess", "bread", "trains")
random.seed(7)


def pair(user: str, prompt: int) -> dict[str, str]:
    topic = TOPICS[prompt % 4]
    short = f"{topic} is fine {random.randrange(9)}."
    long = f"{topic} is a matter one may speak of for long {random.randrange(9)}."
    likes_short = int(user[1:]) % 2 == 0
    chosen, rejected = (short, long) if likes_short != (random.random() < 0.1) else (long, short)
    row = {"user_id": user, "prompt": f"What of {topic}, {prompt}?"}
    return {**row, "chosen": chosen, "rejected": rejected}


def write(name: str, rows: list[dict[str, str]]) -> None:
    with open(name, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


write("pairs.jsonl", [pair(f"u{i % 6}", random.randrange(20)) for i in range(120)])
write("new_users.jsonl", [pair(f"n{i % 2}", 20 + i) for i in range(12)])
texts = [pair("u0", 40 + i) for i in range(3)]
write(
    "texts.jsonl",
    [{"prompt": t["prompt"], "response": t[k]} for t in texts for k in ("chosen", "rejected")],
)
