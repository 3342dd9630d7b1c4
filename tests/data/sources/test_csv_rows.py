"""CSV in which a line is broken: it costs itself, and no part of a cell is taken for a row."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.records import Record
from pal_ds.data.sources import HuggingFace
from pal_ds.data.sources.csv_rows import CsvRows
from pal_ds.errors import UserError

HEADER = "prompt,chosen,rejected\n"


def rows_of(path: Path, text: str | bytes) -> tuple[list[str], list[int]]:
    """(prompts of the rows that are read, lines of the bad ones)."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    prompts, bad = [], []
    for where, row in CsvRows(path, ","):
        if isinstance(row, UserError):
            assert str(row).startswith(str(path))
            bad.append(int(where.rpartition(":")[2]))
        else:
            prompts.append(str(row["prompt"]))
    return prompts, bad


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (b'"p" x,yes,no\n', "not valid CSV (',' expected after '\"')"),
        (b'p,"yes,no\n', "not valid CSV (unexpected end of data)"),
        (b"p,ol\xe9,no\n", "not UTF-8"),
        (b"p,yes\rmore,no\n", "not valid CSV (a carriage return outside of quotes"),
        (b"p,yes,no,more\n", "4 cells under 3 columns"),
    ],
)
def test_one_bad_line_of_300_is_left_out_and_named(tmp_path, caplog, bad, rule):
    lines = [f"p {i},yes,no\n".encode() for i in range(299)]
    lines.insert(170, bad)
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER.encode() + b"".join(lines))
    config = DataConfig(path=str(tmp_path / "D"), source=HuggingFace(str(path)), vocab_size=300)
    with caplog.at_level(logging.WARNING):
        data = prepare(config, quiet=True)
    assert data.info["dropped"] == {"bad_row": 1} and len(data.comparisons) == 299
    assert "1 of 300 rows are bad" in caplog.text
    assert f"a.csv:172: {rule}" in caplog.text


def test_lines_behind_an_open_quote_are_rows_where_all_of_them_look_so(tmp_path):
    path = tmp_path / "a.csv"
    text = HEADER + 'a,"open,no\nb,yes,no\n\nc,"two\nlines",no\nd,"x",y\ne,yes,no\n'
    assert rows_of(path, text) == (["b", "c", "d", "e"], [2])
    two = HEADER + 'a,"open,no\nb,yes,no\nc,"open,no\nd,yes,no\n'
    assert rows_of(path, two) == (["b", "d"], [2, 4])


@pytest.mark.parametrize(
    "cell",
    [
        '"Dear all,\nyes, we, do\nand "more" so"',  # a quote inside, and a line of three cells
        '"Dear all,\nyes\nand more" so',
        '"Dear all,\nyes, we" do',
    ],
)
def test_lines_of_a_cell_are_never_rows(tmp_path, cell):
    path = tmp_path / "a.csv"
    text = HEADER + f"a,yes,no\nb,{cell},no\nc,yes,no\n"
    num_lines = cell.count("\n") + 1
    assert rows_of(path, text) == (["a", "c"], [*range(3, 3 + num_lines)])


def test_many_open_quotes_take_no_time_of_the_square(tmp_path):
    """Each opens a cell to the end of the file: only so many are looked for."""
    path = tmp_path / "a.csv"
    prompts, bad = rows_of(path, HEADER + 'a,"x""y,no\n' * 3000)
    assert prompts == [] and bad == [*range(2, 3002)]


def test_columns_of_one_name_matter_where_they_are_read(tmp_path):
    """pandas writes an index without a name; written twice, there are two."""
    path = tmp_path / "a.csv"
    path.write_text(",,prompt,chosen,rejected\n0,0,p,yes,no\n")
    (record,) = HuggingFace(str(path)).records()
    assert record.responses == ("yes", "no")
    path.write_text("prompt,note,note,chosen,rejected\np,1,2,yes,no\n")
    assert len(list(HuggingFace(str(path)).records())) == 1
    with pytest.raises(UserError, match=r"a.csv:1: two columns are called 'note'; rename one"):
        list(HuggingFace(str(path), columns={"user_id": "note"}).records())


ROWS = "user_id,prompt,chosen,rejected\n007,p,yes,no\n7,p,NA,no\n,p,yes,no\n"
WAYS = ["{folder}", "{file}", "csv {file}", "{folder} {name}", "csv {folder}/*"]


def written(place: Path, name: str, text: str) -> Path:
    """A folder with nothing but one file: the cache of `datasets` lies beside it."""
    (place / "repository").mkdir()
    (place / "repository" / name).write_text(text)
    return place / "repository"


def source_of(way: str, folder: Path, name: str) -> HuggingFace:
    path, _, files = way.format(folder=folder, file=folder / name, name=name).partition(" ")
    return HuggingFace(path, data_files=files or None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_cells_are_text_whichever_way_a_file_is_named(tmp_path, way, name):
    text = ROWS.replace(",", "\t") if name.endswith("tsv") else ROWS
    records = list(source_of(way, written(tmp_path, name, text), name).records())
    assert [record.user_id for record in records] == ["007", "7", "population"]
    answers = [record.responses[0] for record in records if record.responses]
    assert answers == ["yes", "NA", "yes"]


@pytest.mark.parametrize("way", [*WAYS, "tsv {file}"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ROWS.replace(",", ";"), "its columns seem to be separated by semicolons"),
        (ROWS.replace(",", "|"), "its columns seem to be separated by bars"),
        (ROWS.partition("\n")[0].replace(",", "\t") + "\n", "no row"),
    ],
)
def test_another_delimiter_and_a_header_alone_are_named(tmp_path, way, text, words):
    folder = written(tmp_path, "train.tsv", text)
    with pytest.raises(UserError) as refused:
        list(source_of(way, folder, "train.tsv").records())
    assert words in str(refused.value) and str(tmp_path) in str(refused.value)


def test_tabs_and_lines_of_json_under_any_name(tmp_path):
    (tmp_path / "a.txt").write_text(ROWS.replace(",", "\t"))
    (record, *_) = HuggingFace("tsv", data_files=str(tmp_path / "a.txt")).records()
    assert record.user_id == "007"
    (tmp_path / "a.json").write_text('{"user_id": "007", "chosen": "a", "rejected": "b"}\n')
    (record,) = HuggingFace("jsonl", data_files=str(tmp_path / "a.json")).records()
    assert record.user_id == "007"
    for kind in ("tsv", "jsonl"):
        with pytest.raises(UserError, match=f"path: {kind} says how files are read; name them"):
            list(HuggingFace(kind).records())


def records_of(path: Path, kind: str = "csv") -> list[Record]:
    source = HuggingFace(path=kind, data_files=str(path))
    source.bad_rows.largest_share = 1.0
    return list(source.records())


def test_ties_and_lists_are_read_from_tables(tmp_path: Path) -> None:
    ties, lists = tmp_path / "ties.csv", tmp_path / "lists.csv"
    ties.write_text(
        "user_id,prompt,response_1,response_2,y,tie\na,p,x,z,,true\na,p,x,z,1,FALSE\na,p,x,z,0,\n"
    )
    assert [record.label for record in records_of(ties)] == [0, 1, 0]
    lists.write_text('prompt,responses,scores\np,"[""x"",""y"",""z""]","[1,2,2]"\n')
    expected = [(("x", "y"), 1), (("x", "z"), 1)]
    assert [(r.responses, r.label) for r in records_of(lists)] == expected
    table = pa.table({"prompt": ["p"], "responses": [["x", "y", "z"]], "scores": [[1.0, 2.0, 2.0]]})
    pq.write_table(table, tmp_path / "lists.parquet")
    found = records_of(tmp_path / "lists.parquet", "parquet")
    assert [(r.responses, r.label) for r in found] == expected
    # Beside a comparison they are columns like any other.
    pq.write_table(
        table.append_column("chosen", [["a"]]).append_column("rejected", [["b"]]),
        tmp_path / "pairs.parquet",
    )
    found = records_of(tmp_path / "pairs.parquet", "parquet")
    assert [(r.responses, r.label) for r in found] == [(("a", "b"), -1)]


def test_lines_that_end_in_carriage_returns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_bytes(b"prompt,chosen,rejected\rp,x,y\r")
    with pytest.raises(
        UserError, match=r"old.csv:1: .* a line ends in a carriage return alone: save"
    ):
        records_of(path)
