"""Prepared data that are not what `prepare` wrote: any file cut, changed, exchanged or gone, values out of range."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.data.verification import verify_content
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from tests.tiny import change_info, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
TABLES = (
    *("comparisons", "prompt_offsets", "prompt_tokens", "response_num_chars"),
    *("response_offsets", "response_prompt", "response_tokens"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of one form, D and E."""
    folder = tmp_path_factory.mktemp("verification")
    for name, seed in (("D", 0), ("E", 1)):
        source = Jsonl(str(write_pairs(folder / f"{name}.jsonl", 40, seed=seed)))
        options = {"vocab_size": 300, "max_length": 64, "dev_fraction": 0.2}
        prepare(DataConfig(path=str(folder / name), source=source, **options), quiet=True)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "D", tmp_path / "D")
    return tmp_path / "D"


def verified(folder: Path) -> PreparedData:
    data = PreparedData.open(folder)
    verify_content(data.path, data.info, ALONE)
    return data


def files_of(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(found)


def test_every_file_is_known(made: Path) -> None:
    names = files_of(made / "D")
    assert {f"{table}.npy" for table in TABLES} | {"dataset.json", "users.arrow"} < set(names)
    assert any(name.startswith("tokenizer/") for name in names)
    assert sorted([*verified(made / "D").info["files"], "dataset.json"]) == names


def cut(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def gone(file: Path, _: Path) -> None:
    file.unlink()


def exchanged(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def changed(place: float) -> Callable[[Path, Path], None]:
    def change(file: Path, _: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        file.write_bytes(bytes(content))

    return change


@pytest.mark.parametrize(
    "damage",
    [cut, emptied, gone, exchanged, changed(0.0), changed(0.4), changed(1.0)],
    ids=["cut", "emptied", "gone", "exchanged", "first byte", "a byte", "last byte"],
)
def test_damage_of_any_file_is_found(made: Path, data: Path, damage: Callable) -> None:
    whole = verified(data).info["hash"]
    for name in files_of(data):
        file, kept = data / name, (data / name).read_bytes()
        damage(file, made / "E" / name)
        if file.is_file() and file.read_bytes() == kept:
            continue  # both datasets have this very file
        if name == "dataset.json" and damage is exchanged:
            file.write_bytes(kept)
            continue  # the other's own, and refused for the sizes of the rest: see below
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            verified(data)
        file.write_bytes(kept)
    assert verified(data).info["hash"] == whole


def test_the_list_of_another_dataset(made: Path, data: Path) -> None:
    shutil.copyfile(made / "E" / "dataset.json", data / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json says|does not match its hash"):
        verified(data)


def test_each_byte_of_the_list_counts(data: Path) -> None:
    """A flipped bit anywhere: in the version, in the checksum's own name, in a brace."""
    file = data / "dataset.json"
    kept = file.read_bytes()
    for place in range(0, len(kept), 7):
        content = bytearray(kept)
        content[place] ^= 1 << place % 8
        file.write_bytes(bytes(content))
        with pytest.raises(UserError, match=r"dataset\.json"):
            PreparedData.open(data)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/added_tokens.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/additional_chat_templates/tools.jinja",
        "prompt_vectors.npy",
    ],
)
def test_a_file_that_is_not_listed_is_refused(data: Path, name: str) -> None:
    added = data / name
    added.parent.mkdir(exist_ok=True)
    shutil.copyfile(data / "response_prompt.npy", added)
    first = added if added.parent.name == "tokenizer" or added.suffix == ".npy" else added.parent
    with pytest.raises(
        UserError, match=re.escape(f"{first}: is not among the files that dataset.")
    ):
        PreparedData.open(data)
    shutil.move(added, data / "a_note_of_mine.txt")
    if first != added:
        first.rmdir()
    verified(data)


def of_before(folder: Path) -> Path:
    """Rewrites dataset.json as format 2 had it: one hash over all tables."""
    file = folder / "dataset.json"
    info = json.loads(file.read_text())
    del info["files"], info["checksum"]
    file.write_text(json.dumps({**info, "format_version": 2}, indent=1) + "\n")
    return folder


def test_data_of_format_2(data: Path) -> None:
    assert len(verified(of_before(data)).comparisons) == 40
    table = np.load(data / "comparisons.npy")
    table["label"] *= -1
    np.save(data / "comparisons.npy", table)
    with pytest.raises(UserError, match="do not match their hash"):
        verified(data)


def unsealed(folder: Path) -> None:
    """Lists the files as they are now, so that only ranges can tell."""
    files = json.loads((folder / "dataset.json").read_text())["files"]
    for name in files:
        files[name]["size"] = (folder / name).stat().st_size
    change_info(folder, files=files)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("user", -1, "a value of 'user' outside of"),
        ("user", 3, "a value of 'user' outside of"),
        ("a", 10_000, "a value of 'a' outside of"),
        ("b", -1, "a value of 'b' outside of"),
        ("label", 0, r"1 labels 0 \(ties\), which is not what"),
        ("label", 2, "a value of 'label' outside of"),
        ("group", 0, "a value of 'group' outside of"),
        ("split", 9, "a value of 'split' outside of"),
        ("margin", np.nan, "a margin that is no finite number"),
        ("probability", 1.5, "a probability outside of"),
    ],
)
def test_values_out_of_range(data: Path, key: str, value: float, rule: str) -> None:
    table = np.load(data / "comparisons.npy")
    table[key][5] = value
    np.save(data / "comparisons.npy", table)
    unsealed(data)
    with pytest.raises(UserError, match=rf"comparisons\.npy: has {rule}"):
        PreparedData.open(data)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "table",
    [
        np.zeros(0, np.int64),
        np.zeros((3, 2), np.int64),
        np.zeros(5, np.float64),
        np.full(7, -1, np.int64),
        np.array(["text", "more"]),
    ],
    ids=["empty", "square", "floats", "negative", "texts"],
)
def test_tables_of_another_form(data: Path, name: str, table: np.ndarray) -> None:
    np.save(data / f"{name}.npy", table)
    unsealed(data)
    with pytest.raises(UserError, match=r"\.npy"):
        PreparedData.open(data)


def test_token_ids_of_format_2_are_looked_at(data: Path) -> None:
    tokens = np.load(data / "response_tokens.npy")
    tokens[3] = 300_000
    np.save(data / "response_tokens.npy", tokens)
    with pytest.raises(UserError, match="token ids outside of the vocabulary"):
        PreparedData.open(of_before(data))


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"no arrow at all" * 9])
def test_users_that_are_none(data: Path, content: bytes) -> None:
    (data / "users.arrow").write_bytes(content)
    unsealed(data)
    with pytest.raises(UserError, match=r"users\.arrow: cannot be read"):
        PreparedData.open(data)


def test_users_with_other_columns(data: Path) -> None:
    table = pa.table({"id": [1, 2, 3]})
    with pa.ipc.new_file(str(data / "users.arrow"), table.schema) as writer:
        writer.write_table(table)
    unsealed(data)
    with pytest.raises(UserError, match=r"users\.arrow: cannot be read \(its columns are id\)"):
        PreparedData.open(data)


@pytest.mark.parametrize(
    "content", ["", "[" * 5000, "[]", "null", '{"format_version": 3}', '{"format_version": 2}', "é"]
)
def test_lists_that_are_none(data: Path, content: str) -> None:
    (data / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"dataset\.json"):
        PreparedData.open(data)
