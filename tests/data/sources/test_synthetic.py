"""The synthetic world keeps its promises: known truth, opposite tastes, no short cut, no leak."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from pal_ds.data.sources.synthetic import Synthetic
from pal_ds.data.sources.synthetic_phrases import (
    GROUPS,
    NUM_PROMPTS_PER_TOPIC,
    TOPICS,
    TRAITS,
    group_weights,
    prompt_text,
    response_text,
)
from pal_ds.errors import UserError


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request) -> Synthetic:
    return Synthetic(seed=request.param)


@pytest.fixture(scope="module")
def records(world):
    return list(world.records())


def _select(records, split, seen=True):
    return [record for record in records if (record.split, record.seen) == (split, seen)]


def test_counts(world, records):
    assert len(records) == world.num_records()
    assert Counter((record.split, record.seen) for record in records) == {
        ("train", True): 10_000,
        ("dev", True): 400,
        ("test", True): 2_000,
        ("train", False): 1_200,
        ("test", False): 1_000,
    }
    for split, seen, per_user in (("train", True, 250), ("train", False, 60), ("test", False, 50)):
        users = Counter(record.user_id for record in _select(records, split, seen))
        assert len(users) == (40 if seen else 20) and set(users.values()) == {per_user}
    assert len({record.prompt for record in records}) <= 1200


def test_several_different_users_judge_an_item(records):
    judges = Counter(record.responses for record in _select(records, "train"))
    assert set(judges.values()) == {4}
    pairs = Counter((record.user_id, record.responses) for record in records)
    assert max(pairs.values()) == 1


def test_text_is_readable_in_length(records):
    words = [len(text.split()) for record in records for text in record.responses]
    prompt_words = [len(record.prompt.split()) for record in records]
    assert min(words) >= 12 and max(words) <= 50 and np.mean(words) < 36
    assert min(prompt_words) >= 8 and max(prompt_words) <= 20


def test_no_text_is_in_two_splits(records):
    homes: dict[str, set] = {}
    for record in records:
        for text in (record.prompt, *record.responses):
            homes.setdefault(text, set()).add(record.split)
    assert all(len(splits) == 1 for splits in homes.values())


def test_every_test_word_occurs_in_training(records):
    words = {split: set() for split in ("train", "test")}
    for split, known in words.items():
        for record in _select(records, split):
            for text in (record.prompt, *record.responses):
                known.update(text.split())
    assert words["test"] <= words["train"] and len(words["train"]) < 1000


def test_same_seed_same_records():
    settings = {"num_users": 8, "num_unseen_users": 4, "comparisons_per_user": 12}
    first, second = Synthetic(**settings, seed=1), Synthetic(**settings, seed=1)
    assert list(first.records()) == list(first.records()) == list(second.records())
    assert first.describe() == second.describe()
    assert list(first.records()) != list(Synthetic(**settings, seed=2).records())


def test_bayes_accuracy_is_known(records):
    for split, seen in (("train", True), ("test", True), ("test", False)):
        chosen = _select(records, split, seen)
        probability = np.array([record.probability for record in chosen])
        label = np.array([record.label for record in chosen])
        bayes = np.maximum(probability, 1 - probability).mean()
        assert 0.85 <= bayes <= 0.92
        assert ((probability > 0.5) == (label > 0)).mean() == pytest.approx(bayes, abs=0.03)
        assert (label > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_tastes_cancel(world):
    for topic in TOPICS:
        weights = group_weights(topic)
        assert weights.shape == (len(GROUPS), len(TRAITS))
        assert np.abs(weights.sum(axis=0)).max() == 0.0
    mixtures = np.array(list(world.mixtures().values()))
    assert np.allclose(mixtures.sum(axis=1), 1.0, atol=1e-5)
    assert np.allclose(mixtures[:40].mean(axis=0), 0.25, atol=1e-5)
    assert np.allclose(mixtures[40:].mean(axis=0), 0.25, atol=1e-5)


def test_some_tastes_depend_on_the_topic():
    careful = np.stack([group_weights(topic)[0] for topic in TOPICS])
    warm = careful[:, TRAITS.index("warm")]
    assert warm.min() < 0 < warm.max()


def test_pure_users_carry_their_group(world, records):
    groups = {record.user_id: record.group for record in records}
    assert np.mean([group is not None for group in groups.values()]) == pytest.approx(0.6)
    for user, group in groups.items():
        mixture = world.mixtures()[user]
        assert group == (GROUPS[int(np.argmax(mixture))] if max(mixture) >= 0.8 else None)
    assert {group for group in groups.values() if group} == set(GROUPS)


def test_the_longer_answer_is_no_short_cut(records):
    for measure in (len, lambda text: len(text.split())):
        right = [
            _won(measure(record.responses[1]) - measure(record.responses[0]), record.label)
            for record in _select(records, "test")
        ]
        assert np.mean(right) <= 0.55


def _won(difference: float, label: int) -> float:
    return 0.5 if difference == 0 else float((difference > 0) == (label > 0))


def test_a_bag_of_words_for_all_is_no_short_cut(records):
    assert _bag_of_words_accuracy(records) <= 0.60


def test_the_same_words_tell_one_group_apart(records):
    """The cues are in the words: for the users of one group alone the bag of words does well."""
    assert _bag_of_words_accuracy([r for r in records if r.group == "careful"]) >= 0.80


def _bag_of_words_accuracy(records) -> float:
    """One logistic regression for all users on train differences, judged on test."""
    columns: dict[str, int] = {}
    for record in _select(records, "train"):
        for text in record.responses:
            for word in text.split():
                columns.setdefault(word, len(columns))
    inputs, labels = _bags(_select(records, "train"), columns)
    weights = torch.zeros(len(columns), requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.05)
    for _ in range(60):
        fit = functional.softplus(-labels * (inputs @ weights)).mean()
        adam.zero_grad()
        (fit + 1e-3 * weights.square().sum()).backward()
        adam.step()
    inputs, labels = _bags(_select(records, "test"), columns)
    return ((inputs @ weights > 0) == (labels > 0)).double().mean().item()


def _bags(records, columns):
    """Word counts of the second response less those of the first, and labels."""
    bags = np.zeros((len(records), len(columns)), dtype=np.float32)
    for row, record in zip(bags, records, strict=True):
        for sign, text in zip((-1, 1), record.responses, strict=True):
            for word in text.split():
                if word in columns:
                    row[columns[word]] += sign
    return torch.from_numpy(bags), torch.tensor([float(record.label) for record in records])


def test_traits_show_in_the_text():
    base = -np.ones(len(TRAITS), dtype=int)
    for position in range(len(TRAITS)):
        changed = base.copy()
        changed[position] = 1
        texts = [response_text("travel", t, np.random.default_rng(0)) for t in (base, changed)]
        assert texts[0] != texts[1]


def test_prompts_are_distinct():
    texts = {prompt_text(t, i) for t in TOPICS for i in range(NUM_PROMPTS_PER_TOPIC)}
    assert len(texts) == NUM_PROMPTS_PER_TOPIC * len(TOPICS)


@pytest.mark.parametrize("num_users, annotators", [(1, 4), (3, 4), (5, 2), (7, 1)])
def test_odd_numbers_still_come_out_exact(num_users, annotators):
    world = Synthetic(
        num_users=num_users,
        num_unseen_users=2,
        comparisons_per_user=7,
        dev_comparisons_per_user=0,
        test_comparisons_per_user=3,
        unseen_comparisons_per_user=5,
        num_prompts=3,
        annotators_per_item=annotators,
    )
    records = list(world.records())
    assert len(records) == world.num_records() == num_users * 10 + 2 * 8
    assert len({(record.user_id, record.responses) for record in records}) == len(records)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_users": 0},
        {"num_prompts": 2},
        {"num_prompts": 1_000_000},
        {"annotators_per_item": 0},
        {"pure_fraction": -0.1},
        {"bayes_accuracy": 1.0},
        {"comparisons_per_user": -1},
    ],
)
def test_wrong_settings_are_named(wrong):
    name = next(iter(wrong))
    with pytest.raises(UserError, match="comparisons" if name.startswith("comp") else name):
        Synthetic(**wrong)
