"""Values of files come in as they were written: no id, answer or missing cell changes its type on the way."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from pal_ds.data.sources import HuggingFace, Jsonl, hugging_face, source_of_file
from pal_ds.data.sources.open_split import open_split
from pal_ds.errors import UserError

IDS = ("007", "7", "null", "NA", "nan", "2024-01-02", "1e3", "True", " x")
ANSWERS = ("0.50", "1e3", "0012", "3.10", "NaN", "None", "2024-01-02", "false", "-0")


def table(path: Path, delimiter: str = ",", user: str = "user_id") -> list[tuple[str, str]]:
    rows = list(zip(IDS, ANSWERS, strict=True))
    lines = [delimiter.join((user, "prompt", "chosen", "rejected"))]
    lines += [delimiter.join((who, "p", said, "other")) for who, said in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def read(source) -> list[tuple[str, str]]:
    return [(record.user_id, record.responses[0]) for record in source.records()]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_every_cell_of_a_table_is_text(tmp_path, name, delimiter):
    path = tmp_path / name
    rows = table(path, delimiter)
    assert read(HuggingFace(str(path))) == rows
    assert read(HuggingFace("csv", data_files=str(path))) == rows
    packed = path.with_name(f"{name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(source_of_file(packed)) == rows


def test_a_folder_of_tables_is_text_too(tmp_path):
    """As a repository of the hub is read: by `datasets`, which lets pandas guess."""
    folder = tmp_path / "repository"
    folder.mkdir()
    rows = table(folder / "train.csv")
    assert read(HuggingFace(str(folder))) == rows
    found = open_split(str(folder), "train")
    assert {str(feature.dtype) for feature in found.features.values()} == {"string"}


def test_types_are_not_guessed_anew_after_many_rows(tmp_path):
    """pandas types each 10,000 rows by themselves: words first, then what looks like numbers."""
    folder = tmp_path / "repository"
    folder.mkdir()
    num_rows = 20_000
    with open(folder / "train.csv", "w", encoding="utf-8") as file:
        file.write("user_id,prompt,chosen,rejected\n")
        for i in range(num_rows):
            who, said = ("012a", "seven") if i < num_rows // 2 else ("007", "0.50")
            file.write(f"{who},p,{said},other\n")
    for source in (HuggingFace(str(folder)), HuggingFace(str(folder / "train.csv"))):
        found = read(source)
        assert found[0] == ("012a", "seven") and found[-1] == ("007", "0.50")
        assert set(found) == {("012a", "seven"), ("007", "0.50")} and len(found) == num_rows


def test_numbers_are_read_where_a_number_is_meant(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "response_1,response_2,y,margin,seen\n1,2,-1,0.5,true\n1,2,1,,FALSE\n", encoding="utf-8"
    )
    first, second = HuggingFace(str(path)).records()
    assert (first.label, first.margin, first.seen) == (-1, 0.5, True)
    assert (second.label, second.margin, second.seen) == (1, 0.0, False)
    assert first.responses == ("1", "2") and first.user_id == "population"


@pytest.mark.parametrize(
    ("column", "cell", "rule"),
    [
        ("y", "two", "'y' is 'two'; it must be a finite number"),
        ("y", "2", "'y' is 2.0; it must be -1"),
        ("y", "1_0", "'y' is '1_0'; it must be a finite number, of digits"),
        ("margin", "٣", "'margin' is '٣'; it must be a finite number"),
        ("margin", "nan", "'margin' is 'nan'; it must be a finite number"),
        ("probability", "1.5", "'probability' is 1.5; it must be a finite number between 0 and 1"),
        ("seen", "maybe", "'seen' is 'maybe'; it must be true or false"),
    ],
)
def test_a_cell_that_is_no_number_names_row_column_and_rule(tmp_path, column, cell, rule):
    row = {"response_1": "a", "response_2": "b", "y": "1", column: cell}
    path = tmp_path / "a.csv"
    path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(HuggingFace(str(path)).records())
    assert f"a.csv:2: {rule}" in str(caught.value)


def test_one_missing_id_leaves_the_others_as_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user_id,chosen,rejected\n7,a,b\n,a,c\n08,a,d\n", encoding="utf-8")
    found = [record.user_id for record in HuggingFace(str(path)).records()]
    assert found == ["7", "population", "08"]


def test_ids_and_dates_of_json_stay_texts(tmp_path):
    """Arrow's reader of JSON makes times of texts that look like one."""
    rows = [{"user_id": "2024-01-02", "chosen": "2024-01-03", "rejected": "b"}, {"user_id": 7}]
    rows[1] |= {"chosen": "07", "rejected": "c"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert read(HuggingFace(str(path))) == [("2024-01-02", "2024-01-03"), ("7", "07")]


@pytest.mark.parametrize("column", ["user_id", "chosen"])
def test_a_parquet_column_of_another_type_is_told(tmp_path, column):
    path = tmp_path / "a.parquet"
    rows = {"user_id": ["a", "b"], "chosen": ["x", "y"], "rejected": ["z", "w"]}
    rows[column] = [7.0, None]  # type: ignore[list-item]  as pandas makes of whole numbers with a gap
    pq.write_table(pa.table(rows), path)
    with pytest.raises(UserError, match=rf"row 0: '{column}' is (7.0|float); (give|it must be) "):
        list(HuggingFace(str(path)).records())


def test_whole_numbers_of_parquet_are_ids(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user_id": [7], "chosen": ["x"], "rejected": ["z"]}), path)
    assert read(HuggingFace(str(path))) == [("7", "x")]


def test_rows_of_another_width_and_open_quotes_are_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("chosen,rejected\na,b,c\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a.csv:2: 3 cells under 2 columns"):
        list(HuggingFace(str(path)).records())
    path.write_text('chosen,rejected\n"a,b\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.csv:2: not valid CSV"):
        list(HuggingFace(str(path)).records())
    path.write_text("chosen,chosen\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"two columns are called 'chosen'"):
        list(HuggingFace(str(path)).records())


def test_a_cell_of_several_lines_is_one_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfuser_id,chosen,rejected\r\nu,"a\nb, c","d ""e"""\r\n')
    (record,) = HuggingFace(str(path)).records()
    assert record.responses == ("a\nb, c", 'd "e"') and record.where == f"{path}:2"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_lines_are_read_and_damage_is_told(tmp_path, kind):
    import bz2
    import lzma

    line = b'{"user_id": "a", "chosen": "x", "rejected": "y"}\n'
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packed = pack.get(kind, lambda data: pa.compress(data, "zstd", asbytes=True))(line * 300)
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed)
    assert read(Jsonl(str(path))) == [("a", "x")] * 300
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(UserError, match=r"the file is damaged or was cut off|not valid JSON"):
        list(Jsonl(str(path)).records())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1....", "is a Parquet file; read it with the source HuggingFace"),
        (b"PK\x03\x04....", "is a ZIP archive"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        ('{"chosen": "é"}\n'.encode("cp1252"), "perhaps Windows-1252 or Latin-1"),
    ],
)
def test_files_of_another_kind_are_named_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(Jsonl(str(path)).records())


def test_patterns_and_the_home_folder(tmp_path, monkeypatch, write_lines):
    for name, who in (("part-2.jsonl", "b"), ("part-1.jsonl", "a")):
        write_lines([{"user_id": who, "chosen": "x", "rejected": "y"}], name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [who for who, _ in read(Jsonl("~/part-*.jsonl"))] == ["a", "b"]
    with pytest.raises(UserError, match="no file fits this pattern"):
        list(Jsonl(str(tmp_path / "other-*.jsonl")).records())


def test_a_cause_that_datasets_hides_is_quoted(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a": [\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        open_split(str(folder), "train")
    assert "An error occurred" not in str(caught.value).partition(";")[0]
    assert "Expected object" in str(caught.value)


@pytest.mark.parametrize(
    "files",
    ["https://example.org/a.csv", ["hf://datasets/a/b/a.csv"], {"train": ["https://x.org/a.csv"]}],
)
def test_addresses_are_left_to_datasets(monkeypatch, files):
    asked = {}

    def open_in_its_place(path, split, **where):
        asked.update(where, path=path, split=split)
        return Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]})

    monkeypatch.setattr(hugging_face, "open_split", open_in_its_place)
    source = HuggingFace("csv", data_files=files)
    (record,) = source.records()
    assert record.responses == ("a", "b")
    assert asked["data_files"] == files and asked["path"] == "csv"
    assert "files" not in source.describe()


def test_several_files_of_a_split(tmp_path):
    rows = table(tmp_path / "a.csv"), table(tmp_path / "b.csv")
    names = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    source = HuggingFace("csv", data_files={"train": names})
    assert read(source) == [*rows[0], *rows[1]]
    assert [file["path"] for file in source.describe()["files"]] == names
    for name in names:
        frame = HuggingFace(name)
        pq.write_table(
            pa.table({"user_id": [r.user_id for r in frame.records()]}), f"{name}.parquet"
        )
    found = open_split(
        "parquet", "train", data_files={"train": [f"{name}.parquet" for name in names]}
    )
    assert found["user_id"][:2] == ["007", "7"] and len(found) == 2 * len(IDS)
