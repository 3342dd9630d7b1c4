"""UF-P: ratings as users, ties both ways, and disagreement judged over the selected users, on 20 rows."""

from collections import Counter

import pytest
from datasets import Value

from pal_ds.data.sources import UltraFeedbackP
from pal_ds.errors import UserError
from tests.data.sources.choices import preferred

TEXT = Value("string")
RATED = {"Rating": TEXT, "Rationale": TEXT}
TYPED = {**RATED, "Rationale For Rating": TEXT, "Type": [TEXT]}
FEATURES = {
    "source": TEXT,
    "instruction": TEXT,
    "models": [TEXT],
    "completions": [
        {
            "annotations": {
                "helpfulness": TYPED,
                "honesty": RATED,
                "instruction_following": RATED,
                "truthfulness": TYPED,
            },
            "critique": TEXT,
            "custom_system_prompt": TEXT,
            "fine-grained_score": Value("float64"),
            "model": TEXT,
            "overall_score": Value("float64"),
            "principle": TEXT,
            "response": TEXT,
        }
    ],
    "correct_answers": [TEXT],
    "incorrect_answers": [TEXT],
}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(response, ratings):
    annotations = {
        aspect: {
            **dict.fromkeys(FEATURES["completions"][0]["annotations"][aspect]),
            "Rating": rating,
            "Rationale": "because",
        }
        for aspect, rating in zip(ASPECTS, ratings, strict=True)
    }
    return {
        **dict.fromkeys(FEATURES["completions"][0]),
        "annotations": annotations,
        "response": response,
    }


def row(instruction, *completions):
    given = [completion(*item) for item in completions]
    return {**dict.fromkeys(FEATURES), "instruction": instruction, "completions": given}


# Ratings in the order of ASPECTS; every row but the last kinds has the one pair (a, b).
DISAGREE, AGREE = (("a", "5111"), ("b", "1511")), (("a", "5555"), ("b", "1111"))
OTHERS_DISAGREE = ("a", "5551"), ("b", "1115")
ONE_TIES = ("a", "5355"), ("b", "1355")
ROWS = [
    *(row(f"disagree {i}", *DISAGREE) for i in range(6)),
    *(row(f"agree {i}", *AGREE) for i in range(5)),
    *(row(f"others {i}", *OTHERS_DISAGREE) for i in range(3)),
    *(row(f"tie {i}", *ONE_TIES) for i in range(2)),
    row("unrated", ("a", ("N/A", "1", "1", "1")), ("b", "1111")),
    row("empty answer", ("a", "5555"), (" ", "1111")),
    row("", *AGREE),
    row("four", ("a", "4111"), ("b", "3222"), ("c", "2333"), ("d", "1444")),
]
TWO, FOUR = ASPECTS[:2], ASPECTS


@pytest.fixture
def path(write_parquet):
    assert len(ROWS) == 20
    return write_parquet(ROWS, FEATURES)


def test_two_users_exact_counts(path):
    source = UltraFeedbackP(path)
    records = list(source.records())
    # 6 + 5 + 3 pairs by two users, 2 by one of them, 6 pairs of four completions by two.
    assert Counter(record.user_id for record in records) == {"helpfulness": 22, "honesty": 20}
    assert source.dropped == {"tie": 2, "no_rating": 2, "empty_response": 2, "empty_prompt": 1}
    by_prompt = {(r.prompt, r.user_id): r for r in records}
    assert preferred(by_prompt["disagree 0", "helpfulness"]) == "a"
    assert preferred(by_prompt["disagree 0", "honesty"]) == "b"
    assert preferred(by_prompt["agree 0", "honesty"]) == "a"
    assert all(record.group == record.user_id for record in records)


def test_controversial_is_judged_over_the_selected_users(path):
    def controversial(users):
        records = UltraFeedbackP(path, users=users).records()
        return Counter(r.prompt.split()[0] for r in records if r.controversial)

    assert controversial(TWO) == {"disagree": 12, "four": 12}
    # With all four, two more aspects tie on "disagree" and the fourth user objects on "others".
    assert controversial(FOUR) == {"disagree": 12, "others": 12, "four": 24}
    only = UltraFeedbackP(path, controversial_only=True)
    assert {record.controversial for record in only.records()} == {True}
    assert only.dropped["not_controversial"] == 2 * (5 + 3 + 2)


def test_ties_by_coin_are_fixed_and_never_controversial(path):
    source = UltraFeedbackP(path, ties="random")
    records = [record for record in source.records() if record.prompt.startswith("tie")]
    assert len(records) == 4 and "tie" not in source.dropped
    assert not any(record.controversial for record in records)
    tied = [record.label for record in records if record.user_id == "honesty"]
    again = [r.label for r in source.records() if (r.user_id, r.prompt[:3]) == ("honesty", "tie")]
    assert tied == again
    coins = {
        tuple(
            r.label
            for r in UltraFeedbackP(path, ties="random", seed=seed).records()
            if r.prompt.startswith("tie") and r.user_id == "honesty"
        )
        for seed in range(12)
    }
    assert len(coins) > 1


def test_one_pair_per_prompt(path):
    records = list(UltraFeedbackP(path, pairs_per_prompt=1).records())
    assert Counter(r.prompt for r in records)["four"] == 2
    pairs = {
        r.responses
        for seed in range(8)
        for r in UltraFeedbackP(path, pairs_per_prompt=1, seed=seed).records()
        if r.prompt == "four"
    }
    assert len(pairs) > 2


def test_messages(path, write_parquet):
    with pytest.raises(UserError, match=r"no user 'honest' \(did you mean 'honesty'"):
        UltraFeedbackP(path, users=("honest",))
    with pytest.raises(UserError, match="users must name one aspect or more, each once"):
        UltraFeedbackP(path, users=("honesty", "honesty"))
    with pytest.raises(UserError, match="pairs_per_prompt is 0"):
        UltraFeedbackP(path, pairs_per_prompt=0)
    bad = write_parquet(
        [row("x", ("a", ("good", "1", "1", "1")), ("b", "1111"))], FEATURES, "b.parquet"
    )
    with pytest.raises(UserError, match="row 0: the rating of helpfulness is 'good'"):
        list(UltraFeedbackP(bad).records())
