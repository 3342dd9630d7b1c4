"""Best of n by hand and against scipy, and where its lists come from; of runs in `test_evaluate.py`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from pal_ds.data.tables import COMPARISON_DTYPE
from pal_ds.errors import UserError
from pal_ds.eval.best_of_n import compared_candidates, paired, read_lists
from pal_ds.eval.best_of_n_metrics import FIGURES, Lists, best_of_n_figures


def lists_of(*utilities: list[float], users: str | None = None, prompts: list[int] | None = None):
    first = np.cumsum([0, *map(len, utilities)])
    names = np.asarray(list(users or "a" * len(utilities)), str)
    owners = np.arange(len(utilities)) if prompts is None else np.asarray(prompts)
    return Lists(first, np.concatenate(utilities).astype(float), names, owners)


def test_one_list_by_hand() -> None:
    """Utilities 3, 1, 2, 2; the model chooses the third."""
    lists, scores = lists_of([3, 1, 2, 2]), np.array([0.5, -1.0, 0.9, 0.1])
    found = best_of_n_figures(lists, scores, lengths=np.array([10.0, 30, 20, 30]))
    assert (found["lists"], found["indifferent"], found["candidates_mean"]) == (1, 0, 4)
    assert (found["top1"], found["regret"], found["regret_normalised"]) == (0, 1, 0.5)
    # Of the six pairs one is tied in utility; 3 > 1, 2 > 1, 2 > 1 and 3 > 2 (the last) agree, 3 > 2 does not.
    assert found["kendall_tau_b"] == pytest.approx((4 - 1) / np.sqrt(6 * 5))
    random = found["baselines"]["random"]
    assert random == {"top1": 0.25, "regret": 1.0, "regret_normalised": 0.5, "kendall_tau_b": 0.0}
    # The two longest are tied: one of utility 1 and one of utility 2.
    longest = found["baselines"]["longest"]
    assert (longest["top1"], longest["regret"], longest["regret_normalised"]) == (0, 1.5, 0.75)
    assert found["users"] == {"a": {"lists": 1, **{name: found[name] for name in FIGURES}}}


def test_equal_scores_choose_at_random_and_several_favourites_are_all_right() -> None:
    lists = lists_of([1, 0, 1], [0, 2, 1])
    found = best_of_n_figures(lists, np.array([5.0, 5, 0, 1, 1, 1]))
    assert found["top1"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["regret"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["regret_normalised"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_who_likes_all_alike_is_counted_apart() -> None:
    lists = lists_of([1, 1, 1], [0, 1], users="ab")
    found = best_of_n_figures(lists, np.array([3.0, 2, 1, 0, 1]))
    assert (found["lists"], found["indifferent"]) == (1, 1)
    assert found["top1"] == 1 and set(found["users"]) == {"b"}
    nothing = best_of_n_figures(lists_of([2, 2]), np.zeros(2))
    assert nothing == {**dict.fromkeys(found), "lists": 0, "indifferent": 1, "users": {}}


def test_users_and_intervals_clustered_by_prompt() -> None:
    """Two lists of prompt 0, one each of 1 and 2: top1 is 1, 1, 0 and 1."""
    lists = lists_of([1, 0], [1, 0], [1, 0], [1, 0], users="abba", prompts=[0, 0, 1, 2])
    found = best_of_n_figures(lists, np.array([1.0, 0, 1, 0, 0, 1, 1, 0]))
    assert found["top1"] == 0.75
    assert {user: row["top1"] for user, row in found["users"].items()} == {"a": 1, "b": 0.5}
    assert found["users"]["b"]["kendall_tau_b"] == 0
    # Sums of residuals per prompt: 1/2, -3/4, 1/4; times C / (C - 1) = 3 / 2.
    half = 1.96 * np.sqrt(1.5 * (0.25 + 0.5625 + 0.0625)) / 4
    assert found["top1_ci95"] == pytest.approx([0.75 - half, 1.0])
    assert found["kendall_tau_b_ci95"] == pytest.approx([0.5 - 2 * half, 1.0])
    assert found["regret_ci95"] == pytest.approx([0.0, 0.25 + half])


def test_kendall_like_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties on both sides, lists of several sizes, and blocks smaller than one size has lists."""
    monkeypatch.setattr("pal_ds.eval.best_of_n_metrics.PAIRS_AT_ONCE", 40)
    generator = np.random.default_rng(0)
    utilities = [
        generator.integers(0, 4, size).astype(float) for size in generator.integers(2, 9, 200)
    ]
    lists = lists_of(*(list(u) for u in utilities), users="".join(chr(500 + i) for i in range(200)))
    scores = generator.integers(0, 5, len(lists.utility)).astype(float)
    found = best_of_n_figures(lists, scores)["users"]
    for index, utility in enumerate(utilities):
        if np.ptp(utility) == 0:
            continue
        own = scores[lists.first[index] : lists.first[index + 1]]
        expected = np.nan_to_num(kendalltau(own, utility).statistic)
        assert found[lists.user_ids[index]]["kendall_tau_b"] == pytest.approx(expected, abs=1e-12)


def test_a_score_that_is_no_number_is_never_chosen() -> None:
    found = best_of_n_figures(lists_of([2, 1, 0]), np.array([np.nan, -5.0, np.nan]))
    assert (found["top1"], found["regret"]) == (0, 1)
    # 1 > 0 agrees, 2 > 1 does not, and the two others are tied.
    assert found["kendall_tau_b"] == 0


def test_lists_of_a_split_are_what_one_user_compared_for_one_prompt() -> None:
    """User 1 compared responses 0, 1 and 2 of prompt 0 (one pair twice); everyone else compared two."""
    rows = [(1, 0, 1, -1), (1, 2, 1, 1), (1, 1, 0, 1), (1, 2, 0, -1)]
    rows += [(2, 0, 1, 1), (1, 3, 4, 1), (2, 4, 3, 1)]
    table = np.zeros(len(rows), COMPARISON_DTYPE)
    for name, column in zip(("user", "a", "b", "label"), np.asarray(rows).T, strict=True):
        table[name] = column
    data: Any = SimpleNamespace(comparisons=table, response_prompt=np.array([0, 0, 0, 1, 1]))
    found = compared_candidates(data, np.arange(len(rows)))
    assert found.first.tolist() == [0, 3] and found.user.tolist() == [1]
    assert found.response.tolist() == [0, 1, 2]
    # Response 0 won both against 1 and lost to 2; 1 won against 2 only; 2 won one of two.
    assert found.utility == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert len(compared_candidates(data, np.arange(4, 7)).user) == 0


def test_every_text_is_in_a_pair() -> None:
    assert paired(4) == [(0, 1), (2, 3)]
    assert paired(5) == [(0, 1), (2, 3), (4, 0)]
    assert paired(2) == [(0, 1)]


GOOD = {"user_id": "a", "prompt": "p", "responses": ["x", "y", "x"], "scores": [1, 0, 1]}


def test_a_line_names_each_text_once(tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps(GOOD))
    (line,) = read_lists(file)
    assert (line.distinct, line.place, line.scores) == (["x", "y"], [0, 1, 0], [1.0, 0.0, 1.0])
    (record,) = line.records(7)
    assert (record.user_id, record.responses, record.group) == ("a", ("x", "y"), "7")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": [1]}, "unknown key 'score'"),
        ({"responses": ["x"]}, "two or more candidates"),
        ({"scores": [1, 2]}, "a list of 3 numbers"),
        ({"scores": [1, 2, "3"]}, "holds '3'"),
        ({"scores": [1, 2, float("nan")]}, "holds nan"),
    ],
)
def test_a_line_that_is_no_list_is_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(UserError, match=f"lists.jsonl:2: .*{match}"):
        read_lists(file)
