"""Pets: half of the pairs controversial, the two users disagree on exactly those, splits disjoint."""

from collections import Counter

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import VplPets
from pal_ds.errors import UserError
from tests.data.sources.choices import preferred

PETS = ("bird", "dog", "cat", "rabbit")


def pet_of(sentence):
    (pet,) = (pet for pet in PETS if f" {pet} " in f" {sentence} ")
    return pet


def test_half_are_controversial_and_users_disagree_on_exactly_those():
    source = VplPets()
    records = list(source.records())
    assert len(records) == 2 * 2400 == source.num_records()
    helpful, harmless = records[::2], records[1::2]
    orders = Counter()
    for one, other in zip(helpful, harmless, strict=True):
        assert (one.user_id, other.user_id) == ("helpful", "harmless") == (one.group, other.group)
        assert (one.prompt, one.responses) == (other.prompt, other.responses)
        assert one.controversial == other.controversial == (one.label != other.label)
        best, worst = pet_of(preferred(one)), {*map(pet_of, one.responses)}
        assert one.controversial == (worst == {"dog", "cat"})
        (worst,) = worst - {best}
        orders[best, worst] += 1
    assert set(orders) == {
        ("dog", "cat"),
        *(("bird", pet) for pet in PETS[1:]),
        ("dog", "rabbit"),
        ("cat", "rabbit"),
    }
    # Binomial(2400, 1/2) and (2400, 1/10): within 4.5 standard deviations.
    assert abs(orders.pop(("dog", "cat")) - 1200) < 110
    assert all(abs(count - 240) < 66 for count in orders.values())
    # Which sentence comes first says nothing.
    assert abs(sum(record.label for record in helpful)) < 4.5 * 2400**0.5


def test_splits_share_neither_sentences_nor_prompts(tmp_path):
    source = VplPets(300, 60, 60)
    texts = {split: set() for split in ("train", "dev", "test")}
    for record in source.records():
        texts[record.split] |= {record.prompt, *record.responses}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"]
    assert source.describe()["sentences_per_animal"] == {"train": 64, "dev": 16, "test": 16}
    config = DataConfig(path=str(tmp_path / "D"), source=source, split="field", vocab_size=300)
    data = prepare(config, quiet=True)
    assert data.info["counts"]["splits"]["train"] == 600
    assert set(data.comparisons["controversial"].tolist()) == {0, 1}


def test_same_seed_same_pairs_and_messages():
    assert list(VplPets(50, 0, 0).records()) == list(VplPets(50, 0, 0).records())
    assert list(VplPets(50, 0, 0).records()) != list(VplPets(50, 0, 0, seed=1).records())
    with pytest.raises(UserError, match="none may be negative"):
        VplPets(-1)
