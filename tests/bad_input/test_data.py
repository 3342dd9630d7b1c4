"""Raw and prepared data that cannot be trained on: the message names file and line, and no table is left behind."""

import json
from pathlib import Path

import pytest

from tests.bad_input.conftest import Place, Refused

GOOD = {"user_id": "u0", "prompt": "hi", "chosen": "yes", "rejected": "no"}
TRIPLE = {"prompt": "hi", "response_1": "yes", "response_2": "no"}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "raw.jsonl: the file is empty; it must hold at least one record"),
        ("\n\n", "raw.jsonl: holds no record, only blank lines"),
        (lines(GOOD) + '{"user_id": \n', "raw.jsonl:2: not valid JSON (Expecting value at column"),
        (json.dumps(GOOD, indent=1), "raw.jsonl: begins with an object of JSON over several lines"),
        (json.dumps([GOOD], indent=1), "one object a line. Write it so: jq -c '.[]' raw.jsonl"),
        ('{"user_id": \n"x"', "raw.jsonl:1: not valid JSON"),
        ("[1]\n", "raw.jsonl:1: expected an object, found list; JSON Lines hold one object a line"),
        (lines(GOOD, {"prompt": "a", "chosen": "b"}), "raw.jsonl:2: missing key 'rejected'"),
        (lines({**GOOD, "promt": "x"}), "unknown key 'promt' (did you mean 'prompt'?)"),
        (lines({**TRIPLE, "y": 2}), "raw.jsonl:1: 'y' is 2; it must be -1 (response_1 is prefer"),
        (lines({**TRIPLE, "y": "1"}), "raw.jsonl:1: 'y' is '1'; it must be -1"),
        (lines(GOOD, {**GOOD, "chosen": " "}), "raw.jsonl:2: 'chosen' is empty; every response"),
        (
            lines({**GOOD, "user_id": ""}),
            "raw.jsonl:1: 'user_id' is ''; give a text that is not blank",
        ),
        (lines({**GOOD, "prompt": 5}), "raw.jsonl:1: 'prompt' is int; it must be text or a list"),
        (lines({**GOOD, "rejected": "yes"}), "every comparison was dropped (identical 1)"),
    ],
)
def test_raw_file(
    place: Place, refused: Refused, tmp_path: Path, text: str, message: str, command: str
):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(text)
    data = [f"--data.source.path={raw}", f"--data.path={tmp_path / 'data'}"]
    if command == "train":
        assert message in refused(*place.train(*data, run=tmp_path / "new"))
    else:
        assert message in refused("prepare", f"--config={place.recipe}", *data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_raw_file_with_a_mark_of_its_encoding(
    place: Place, refused: Refused, tmp_path: Path, encoding: str
):
    raw = tmp_path / "raw.jsonl"
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    raw.write_bytes((mark + lines(GOOD)).encode(encoding))
    data = [f"--data.source.path={raw}", f"--data.path={tmp_path / 'data'}"]
    said = refused("prepare", f"--config={place.recipe}", *data)
    assert f"{raw}: is {encoding[:6].upper()}; save the file as UTF-8" in said


def test_raw_file_of_another_encoding(place: Place, refused: Refused, tmp_path: Path):
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(lines(GOOD).encode() + '{"prompt": "é"}'.encode("latin-1"))
    data = [f"--data.source.path={raw}", f"--data.path={tmp_path / 'data'}"]
    said = refused("prepare", f"--config={place.recipe}", *data)
    assert f"{raw}:2: not UTF-8" in said
    assert "save the file as UTF-8" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.source.path=nope.jsonl"], "nope.jsonl: no such file; check the path"),
        (["--data.source.path=tests"], "tests: is a folder; name the file in it"),
        (["--data.source=null"], "data/dataset.json: no such file, so"),
        (["--data.split=field"], "under data.split: field every record names one of train, dev"),
        (
            ["--data.dev_fraction=0.9", "--data.test_fraction=0.9"],
            "dev_fraction 0.9 + test_fraction 0.9 is more than 1",
        ),
        (["--data.max_length=1"], "max_length is 1; it must exceed the 0 prefix and 1 end tokens"),
        (["--data.max_length=2"], "every comparison was dropped (too_long 40)"),
        (
            ["--data.tokenizer=/no/such/tokenizer"],
            "data.tokenizer: '/no/such/tokenizer': cannot be read",
        ),
        (["--data.separator=."], "choose a sep"),
    ],
)
def test_options_of_prepare(
    place: Place, refused: Refused, tmp_path: Path, options: list[str], message: str
):
    path = f"--data.path={tmp_path / 'data'}"
    assert message in refused("prepare", f"--config={place.recipe}", path, *options)


def test_prepared_data_of_other_settings_or_of_someone_else(
    place: Place, refused: Refused, tmp_path: Path
):
    said = refused(*place.train("--data.max_length=32", run=tmp_path / "new"))
    assert (
        f"{place.data} was prepared with other settings (data.max_length: 64 then, 32 now); name another folder"
        in said
    )
    (tmp_path / "mine.txt").write_text("mine")
    said = refused("prepare", f"--config={place.recipe}", f"--data.path={tmp_path}")
    assert "holds no dataset.json; it is not ours to overwrite" in said


def test_everything_held_out(place: Place, refused: Refused, tmp_path: Path, capsys):
    """Preparing is a command of its own and may stand; the run directory is not begun."""
    from pal_ds.cli.main import main

    options = [f"--data.path={tmp_path / 'data'}", "--data.dev_fraction=1", "--data.max_length=200"]
    main(["prepare", f"--config={place.recipe}", *options])
    said = refused(*place.train(*options, run=tmp_path / "new"))
    assert "its train split is empty. Prepare with smaller dev and test fractions" in said
