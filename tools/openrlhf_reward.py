"""Rewards of an exported folder for OpenRLHF: `--reward.remote_url /path/to/openrlhf_reward.py`.

Copy this file and set FOLDER; it needs torch and transformers alone. FOLDER is what tools/consolidate.py
wrote. With `--users FILE` it holds many users: then `--data.label_key user_id` scores each prompt for the
user of its row, and a row without one for the population. OpenRLHF imports the file once in every vLLM
engine, calls it from several threads, and only logs what it raises.
"""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path("OUT")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_users: dict[str, str] = {}
if (FOLDER / "users.json").is_file():
    _users = json.loads((FOLDER / "users.json").read_text(encoding="utf-8"))
_weights = FOLDER / "_shared" if _users else FOLDER
_model: Any = AutoModelForSequenceClassification.from_pretrained(_weights, trust_remote_code=True)
_model = _model.to(DEVICE).eval()
_tokenizer: Any = AutoTokenizer.from_pretrained(_weights, trust_remote_code=True)
_population = getattr(_model.config, "mixture", None)
_lock = threading.Lock()


def reward_func(
    queries: list[str], prompts: list[str], labels: list[str], **_: Any
) -> dict[str, Any]:
    """Rewards [n] of `queries`, each a prompt and its response in the policy's own text."""
    scores = [_score(query, label) for query, label in zip(queries, labels, strict=True)]
    rewards = torch.tensor(scores)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def _score(query: str, user_id: str) -> float:
    batch = _tokenizer(
        [query], add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
    )
    mixture = _mixture(user_id)
    with _lock, torch.no_grad():
        _model.config.mixture = mixture
        return _model(**batch.to(DEVICE)).logits[0, 0].item()


def _mixture(user_id: str) -> list[float] | None:
    if not _users or not user_id:
        return _population
    config = FOLDER / _users[user_id] / "config.json"
    return json.loads(config.read_text())["mixture"]
