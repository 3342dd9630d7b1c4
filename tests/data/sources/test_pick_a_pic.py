"""Pick-a-Pic and Pick-a-Filter: rows joined with embeddings, and filters that do not tell the choice."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Value
from safetensors.numpy import save_file

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import PickAFilter, PickAPic
from pal_ds.errors import UserError
from tests.data.sources.choices import preferred

TEXT, BOOL, FLOAT, INT = Value("string"), Value("bool"), Value("float64"), Value("int64")
FEATURES = {
    "are_different": BOOL,
    "best_image_uid": TEXT,
    "caption": TEXT,
    "created_at": Value("timestamp[ns]"),
    "has_label": BOOL,
    **dict.fromkeys(("image_0_uid", "image_0_url", "image_1_uid", "image_1_url"), TEXT),
    **dict.fromkeys(("label_0", "label_1"), FLOAT),
    **dict.fromkeys(("model_0", "model_1"), TEXT),
    **dict.fromkeys(("ranking_id", "user_id", "num_example_per_prompt"), INT),
    "__index_level_0__": INT,
}
SIZE, CAPTIONS, IMAGES = 4, ("cap 0", "cap 1", "cap 2"), ("a", "b", "c", "d")


def row(user, caption, images="ab", label=1.0, **fields):
    first, second = images
    return {
        **dict.fromkeys(FEATURES),
        "are_different": True,
        "has_label": True,
        "caption": caption,
        "image_0_uid": first,
        "image_1_uid": second,
        "label_0": label,
        "label_1": 1.0 - label,
        "user_id": user,
        "ranking_id": 1,
        **fields,
    }


TRAIN = [
    *(row(7, "cap 0", label=float(i % 2)) for i in range(6)),
    *(row(8, "cap 1", "cd") for _ in range(4)),
    row(8, "cap 0", label=0.5),
    row(8, "cap 0", has_label=False),
    row(8, "cap 0", are_different=False),
    row(9, "cap 0", "ax"),
    row(9, "a caption without a vector"),
]
TEST = [row(7, "cap 2", "da")] * 4 + [row(7, "cap 0")]


def embeddings(tmp_path, name, ids, seed, suffix="npy"):
    vectors = np.random.default_rng(seed).standard_normal((len(ids), SIZE)).astype(np.float16)
    path = tmp_path / f"{name}.{suffix}"
    if suffix == "npy":
        np.save(path, vectors)
    else:
        save_file({"vectors": vectors}, path)
    (tmp_path / f"{name}.ids.json").write_text(json.dumps(list(ids)))
    return str(path), dict(zip(ids, map(tuple, vectors.astype(np.float64).tolist()), strict=True))


@pytest.fixture
def paths(write_parquet):
    assert len(TRAIN) + len(TEST) == 20
    return {
        "train": write_parquet(TRAIN, FEATURES, "train.parquet"),
        "test": write_parquet(TEST, FEATURES, "test.parquet"),
    }


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_exact_counts_and_vectors(paths, tmp_path, suffix):
    images, vector_of = embeddings(tmp_path, "images", IMAGES, 0, suffix)
    captions, caption_of = embeddings(tmp_path, "captions", CAPTIONS, 1, suffix)
    source = PickAPic(images, captions, paths)
    records = list(source.records())
    assert Counter((r.user_id, r.split) for r in records) == {
        ("7", "train"): 6,
        ("8", "train"): 4,
        ("7", "test"): 4,
    }
    assert source.dropped == {
        "tie": 1,
        "no_label": 1,
        "same_image": 1,
        "no_image_features": 1,
        "no_caption_features": 1,
        "prompt_in_two_splits": 1,
    }
    assert [preferred(r) for r in records[:2]] == [vector_of["b"], vector_of["a"]]
    assert records[6].response_features == (vector_of["c"], vector_of["d"])
    assert records[-1].prompt_features == caption_of["cap 2"]
    data = prepare(DataConfig(path=str(tmp_path / "D"), source=source, split="field"), quiet=True)
    counts = data.info["counts"]["splits"]
    assert (counts["train"], counts["test"], data.info["counts"]["comparisons"]) == (10, 4, 14)
    assert data.info["vector_size"] == SIZE


def test_filters_follow_the_group_and_do_not_tell_the_choice(write_parquet, tmp_path):
    rows = [
        row(i % 40, f"cap {i % 3}", "abcd"[i % 3 :][:2], label=float(i % 2)) for i in range(2000)
    ]
    path = write_parquet(rows, FEATURES)
    files = {
        name: embeddings(tmp_path, name, IMAGES, seed)
        for seed, name in enumerate(("plain", "blue", "red"))
    }
    captions, _ = embeddings(tmp_path, "captions", CAPTIONS, 9)
    version_of = {vector: name for name, (_, table) in files.items() for vector in table.values()}
    given = [file for file, _ in files.values()]
    source = PickAFilter(*given, captions, mixture_ratio=0.6, path=path)
    records = list(source.records())
    assert len(records) == 2000 and list(source.records()) == records
    assert all(record.group == source.group_of(record.user_id) for record in records)
    seen = Counter()
    for record in records:
        first, second = (version_of[vector] for vector in record.response_features)
        chosen, rejected = (first, second) if record.label == -1 else (second, first)
        seen[chosen, rejected] += 1
        other = "red" if record.group == "blue" else "blue"
        assert (chosen, rejected) in {("plain", "plain"), (record.group, "plain"), ("plain", other)}
    # Binomial(2000, p): within 4.5 standard deviations.
    assert abs(seen["plain", "plain"] - 800) < 100
    chosen_filtered = seen["blue", "plain"] + seen["red", "plain"]
    assert abs(chosen_filtered - 600) < 95
    assert {record.group for record in records} == {"blue", "red"}
    untouched = PickAFilter(*given, captions, mixture_ratio=0.0, path=path)
    shown = {version_of[v] for r in untouched.records() for v in r.response_features}
    assert shown == {"plain"}


def test_embeddings_that_cannot_be_read(paths, tmp_path):
    images, _ = embeddings(tmp_path, "images", IMAGES, 0)
    captions, _ = embeddings(tmp_path, "captions", CAPTIONS, 1)

    def message(images=images, captions=captions):
        with pytest.raises(UserError) as caught:
            list(PickAPic(images, captions, paths).records())
        return str(caught.value)

    assert "pickles" in message(images="images.pt")
    assert "none.npy: no such file" in message(images=str(tmp_path / "none.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "objects.ids.json").write_text('["a"]')
    assert "cannot be read as one matrix" in message(images=str(tmp_path / "objects.npy"))
    np.save(tmp_path / "wide.npy", np.zeros((1, SIZE + 1)))
    (tmp_path / "wide.ids.json").write_text('["a"]')
    assert "vectors of size 5, but those of captions" in message(images=str(tmp_path / "wide.npy"))
    (tmp_path / "captions.ids.json").write_text('["a", "a", "b"]')
    assert "3 ids, 2 of them distinct, for 3 rows" in message()
    (tmp_path / "captions.ids.json").unlink()
    assert "captions.ids.json: no such file" in message()
    with pytest.raises(UserError, match="mixture_ratio is 2"):
        PickAFilter(images, images, images, captions, mixture_ratio=2)


def test_a_copy_in_csv_keeps_ids_and_reads_numbers(tmp_path):
    """Every cell of CSV is text, "False" too."""
    import pandas

    from pal_ds.data.sources.pick_a_pic import COLUMNS

    images, _ = embeddings(tmp_path, "images", IMAGES, 0)
    captions, _ = embeddings(tmp_path, "captions", CAPTIONS, 1)
    rows = [
        row("007", "cap 0"),
        row("7", "cap 0", label=0.0),
        row("7", "cap 0", has_label=False),
    ]
    path = tmp_path / "train.csv"
    pandas.DataFrame([{name: one[name] for name in COLUMNS} for one in rows]).to_csv(
        path, index=False
    )
    source = PickAPic(images, captions, {"train": str(path)})
    assert [(r.user_id, r.label) for r in source.records()] == [("007", -1), ("7", 1)]
    assert source.dropped == {"no_label": 1}
