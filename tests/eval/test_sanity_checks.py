"""Warnings are raised by numbers made to raise them, and by none that just do not."""

from typing import Any

import numpy as np

from pal_ds.eval.sanity_checks import (
    ScoredPairs,
    both_nearly_perfect,
    learnt_by_heart,
    no_better_than_surface,
    no_unit_in_use,
    training_accuracy,
    unseen_above_seen,
)


def scored_pairs(num_right: int, num_pairs: int = 100) -> ScoredPairs:
    """Each pair with a prompt of its own."""
    return ScoredPairs((np.arange(num_pairs) < num_right).astype(float), np.arange(num_pairs))


def test_unseen_above_seen_by_more_than_the_interval() -> None:
    # Half of the interval of a gap between 0.6 and 0.75 of 100 pairs each: 1.96 * 0.0657 = 0.129.
    assert unseen_above_seen(scored_pairs(60), scored_pairs(72)) == []
    (warning,) = unseen_above_seen(scored_pairs(60), scored_pairs(75))
    assert "0.750 against 0.600" in warning and "+-0.129" in warning
    assert unseen_above_seen(scored_pairs(75), scored_pairs(60)) == []
    # The same share of few prompts says little.
    few = ScoredPairs(scored_pairs(75).right, np.arange(100) // 25)
    assert unseen_above_seen(scored_pairs(60), few) == []
    empty = ScoredPairs(np.empty(0), np.empty(0))
    assert (
        unseen_above_seen(empty, scored_pairs(75))
        == unseen_above_seen(scored_pairs(60), empty)
        == []
    )


def test_train_and_held_out_nearly_perfect_on_real_data() -> None:
    real: dict[str, Any] = {"source": {"class": "Jsonl"}}
    (warning,) = both_nearly_perfect(0.97, scored_pairs(96), real)
    assert "0.970" in warning and "0.960" in warning
    assert both_nearly_perfect(0.97, scored_pairs(95), real) == []
    assert both_nearly_perfect(0.95, scored_pairs(96), real) == []
    assert both_nearly_perfect(None, scored_pairs(96), real) == []
    assert (
        both_nearly_perfect(0.97, scored_pairs(96), {**real, "bayes_accuracy": {"test": 0.99}})
        == []
    )


def test_baselines_that_do_not_read() -> None:
    model, prompts = scored_pairs(80), scored_pairs(80).prompts
    # Right on 60 of the model's 80 and on no other: behind by 20 points, 1.96 * 0.040 of which are noise.
    behind = (np.arange(100) < 60).astype(float)
    assert no_better_than_surface(model, behind, behind) == []
    level = (np.arange(100) >= 22).astype(float)
    (length,) = no_better_than_surface(model, level, None)
    assert "the longer one wins: 0.780" in length and "accuracy 0.800" in length
    (short,) = no_better_than_surface(model, 1 - level, None)
    assert "the shorter one wins: 0.780" in short
    (form,) = no_better_than_surface(model, None, level)
    assert "first and last token: 0.780" in form
    assert no_better_than_surface(model, None, None) == []
    # Ahead on every pair that they judge differently: no noise in that.
    assert (
        no_better_than_surface(ScoredPairs(np.ones(100), prompts), np.ones(100) - 0.1, None) == []
    )


def test_accuracy_in_training_is_of_the_end() -> None:
    rows = [
        {"step": 1, "epoch": 0.5, "accuracy": 0.1},
        {"step": 2, "epoch": 1.0, "accuracy": 0.6},
        {"step": 2, "dev_accuracy": 0.3},
        {"step": 3, "epoch": 1.2, "accuracy": 0.8},
        {"step": 4, "epoch": 1.3, "accuracy": None},
        {"step": 5, "epoch": 2.0, "accuracy": 1.0},
    ]
    assert training_accuracy(rows, 4) == 0.7
    assert training_accuracy(rows, 5) == 1.0
    assert training_accuracy(rows, 0) is None


def test_pairs_of_one_prompt_have_no_interval() -> None:
    """Clustered by prompt that of one is 0, and any difference at all more than that."""
    one = ScoredPairs(scored_pairs(75).right, np.zeros(100))
    assert one.half_width is None
    assert (
        unseen_above_seen(scored_pairs(60), one) == unseen_above_seen(one, scored_pairs(90)) == []
    )
    (warning,) = no_better_than_surface(one, scored_pairs(80).right, None)
    assert "there is no interval, as all are of one prompt" in warning
    assert "+-" not in warning
    assert no_better_than_surface(one, scored_pairs(70).right, None) == []


def test_learnt_by_heart() -> None:
    (warning,) = learnt_by_heart(0.985, scored_pairs(55))
    assert "(0.985)" in warning and "(0.550)" in warning and "part by 43 points" in warning
    assert learnt_by_heart(0.75, scored_pairs(55)) == learnt_by_heart(0.5, scored_pairs(80)) == []
    assert learnt_by_heart(None, scored_pairs(55)) == []
    # Four pairs, of which two are right: the interval is as wide as the gap. And of one prompt there is none.
    assert learnt_by_heart(0.95, scored_pairs(2, 4)) == []
    # All wrong leaves no interval, and is chance where there are few.
    assert (
        learnt_by_heart(0.95, scored_pairs(0, 4))
        == learnt_by_heart(0.95, scored_pairs(0, 29))
        == []
    )
    assert learnt_by_heart(0.95, scored_pairs(0, 30))
    assert learnt_by_heart(0.95, ScoredPairs(scored_pairs(50).right, np.zeros(100))) == []


def test_collapsed_units() -> None:
    (warning,) = no_unit_in_use(0.0)
    assert "no latent unit varies over users" in warning
    assert no_unit_in_use(0.25) == no_unit_in_use(None) == []
