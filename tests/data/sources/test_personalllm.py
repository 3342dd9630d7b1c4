"""PersonalLLM: simulated users are keyed by (seed, user) and prefer their best answer to their worst."""

from collections import Counter

import numpy as np
import pytest
from datasets import Value

from pal_ds.data.sources import PersonalLlm
from pal_ds.data.sources.personalllm import REWARD_MODELS
from pal_ds.errors import UserError

TEXT, FLOAT = Value("string"), Value("float64")
PLACES = range(1, 9)
FEATURES = {
    "prompt": TEXT,
    "subset": TEXT,
    "prompt_id": Value("int64"),
    **{key: TEXT for i in PLACES for key in (f"response_{i}", f"response_{i}_model")},
    **{f"response_{i}_{model}": FLOAT for model in REWARD_MODELS for i in PLACES},
}


def row(number, prompt=None, **fields):
    scores = np.random.default_rng(number).standard_normal((8, 10))
    return {
        "prompt": f"prompt {number}" if prompt is None else prompt,
        "subset": "lmsys",
        "prompt_id": number,
        **{f"response_{i}": f"answer {number}.{i}" for i in PLACES},
        **{f"response_{i}_model": "some/model" for i in PLACES},
        **{
            f"response_{i}_{model}": scores[i - 1, j]
            for j, model in enumerate(REWARD_MODELS)
            for i in PLACES
        },
        **fields,
    }


ALIKE = {f"response_{i}_{model}": 1.0 for i in PLACES for model in REWARD_MODELS}
TRAIN = [
    *(row(i) for i in range(9)),
    row(9, **ALIKE),
    row(10, response_3_gemma_7b=None),
    row(11, prompt=" "),
    row(12, **{f"response_{i}": "" for i in PLACES}),
]
TEST = [*(row(20 + i) for i in range(6)), row(26, prompt="prompt 0")]
EVERYTHING = {"prompts_per_user": 13, "prompts_per_unseen_user": 13, "test_prompts_per_user": 7}


@pytest.fixture
def paths(write_parquet):
    assert len(TRAIN) + len(TEST) == 20
    return {
        "train": write_parquet(TRAIN, FEATURES, "train.parquet"),
        "test": write_parquet(TEST, FEATURES, "test.parquet"),
    }


def test_exact_counts_and_best_against_worst(paths):
    source = PersonalLlm(paths, num_users=4, num_unseen_users=2, **EVERYTHING)
    records = list(source.records())
    # Of 13 train rows 9 can be used, of 7 test rows 6; everyone judges them all.
    assert Counter((r.user_id, r.split) for r in records) == {
        (f"user_{user:04d}", split): count
        for user in range(6)
        for split, count in (("train", 9), ("test", 6))
    }
    assert source.dropped == {
        "tie": 6,
        "no_score": 6,
        "empty_prompt": 6,
        "empty_response": 6,
        "prompt_in_two_splits": 6,
    }
    assert {r.user_id for r in records if r.seen is False} == {"user_0004", "user_0005"}
    for record in records:
        number = int(record.prompt.split()[1])
        scores = np.random.default_rng(number).standard_normal((8, 10))
        rewards = scores @ source.weights(int(record.user_id[5:]))
        best, worst = rewards.argmax() + 1, rewards.argmin() + 1
        assert record.responses == (f"answer {number}.{best}", f"answer {number}.{worst}")
    assert len({r.responses for r in records if r.prompt == "prompt 3"}) > 1


def test_users_are_keyed_by_seed_and_number(paths):
    few = PersonalLlm(paths, num_users=3, num_unseen_users=0)
    many, other = PersonalLlm(paths, num_users=2000), PersonalLlm(paths, num_users=3, seed=1)
    for user in range(3):
        np.testing.assert_array_equal(few.weights(user), many.weights(user))
        assert not np.array_equal(few.weights(user), other.weights(user))
    weights = np.array([many.weights(user) for user in range(2000)])
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-12)
    # Dirichlet(0.1 x 10): mean 1/10, variance (1/10)(9/10)/(0.1 * 10 + 1) = 0.045; five standard errors.
    assert abs(weights.mean(0) - 0.1).max() < 5 * (0.045 / 2000) ** 0.5
    assert abs(weights.var() - 0.045) < 0.004


def test_how_many_prompts_each_user_judges(paths):
    options = {"num_users": 30, "num_unseen_users": 10, "test_prompts_per_user": 2}
    source = PersonalLlm(paths, **options, prompts_per_user=5, prompts_per_unseen_user=3)
    counts = Counter((r.user_id, r.split) for r in source.records())
    dropped = source.dropped.total()
    assert sum(counts.values()) + dropped == 30 * 5 + 10 * 3 + 40 * 2
    most: dict[tuple[bool, str], int] = {}
    for (user, split), count in counts.items():
        key = user < "user_0030", split
        most[key] = max(most.get(key, 0), count)
    assert most == {
        (True, "train"): 5,
        (False, "train"): 3,
        (True, "test"): 2,
        (False, "test"): 2,
    }
    with pytest.raises(UserError, match="num_users must be 1 or more"):
        PersonalLlm(paths, num_users=0)
