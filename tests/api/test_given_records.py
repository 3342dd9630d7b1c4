"""Records that a caller has in memory: messages name `record 1`, no file of ours and not all of the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from pal_ds.api import adapt, evaluate, prepare, score
from pal_ds.api.run import path_or_list
from pal_ds.cli.main import main
from pal_ds.data.sources.given import GivenRecords
from pal_ds.errors import UserError
from pal_ds.eval.results import eval_requests
from tests.tiny import write_pairs
from tests.tiny_run import TinyRun

RECORD = {"user_id": "u0", "prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pal_ds.api import train

    recipe = {
        "data": {"path": str(tiny_run.data)},
        "backbone": {"path": str(tiny_run.base), "tuning": "frozen"},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 2}},
        "train": {"stop_after": 1, "batch_pairs": 8, "ds_config": "zero0"},
    }
    return train(recipe, tmp_path_factory.mktemp("given") / "run").path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in write_pairs(path, 12).read_text().splitlines()]


def test_records_in_memory_are_those_of_a_file(run: Path, tmp_path: Path) -> None:
    given = records(tmp_path / "pairs.jsonl")
    whole = evaluate(run, data=iter(given))
    assert whole["pairs"] == 12 and (run / "eval" / "records.json").is_file()
    of_file = evaluate(run, data=tmp_path / "pairs.jsonl")
    assert whole["accuracy"] == of_file["accuracy"] and whole["users"] == of_file["users"]
    one, two = (
        adapt(run, pairs, tmp_path / out).mixtures
        for pairs, out in ((given, "one"), (tmp_path / "pairs.jsonl", "two"))
    )
    assert one == two
    lists = [{"user_id": "u0", "prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]}]
    assert evaluate(run, data=lists, best_of_n=True)["lists"] == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({**RECORD, "chosen": ""}, "record 2: 'chosen' is empty"),
        ({**RECORD, "x": 1}, "record 2: unknown key 'x'"),
        ({**RECORD, "user_id": "\ud83d"}, "record 2: a text holds half of a surrogate pair"),
        ({**RECORD, "x": object()}, "record 2: holds what JSON cannot"),
        (3, "record 2: is of type int; a record is a dict"),
    ],
)
def test_a_bad_record_is_named_by_its_number(run: Path, tmp_path: Path, bad, words) -> None:
    for use in (
        lambda: evaluate(run, data=[RECORD, bad]),
        lambda: adapt(run, [RECORD, bad], tmp_path / "users"),
    ):
        with pytest.raises(UserError) as refused:
            use()
        assert str(refused.value).startswith(words) and "/" not in str(refused.value)


def test_a_bad_list_of_candidates_is_named_by_its_number(run: Path) -> None:
    bad = [{"user_id": "u0", "prompt": "a", "responses": ["b", "c"], "scores": [1]}]
    with pytest.raises(UserError, match=r"^record 1: "):
        evaluate(run, data=bad, best_of_n=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no record is given"),
        (RECORD, "is of type dict; give a list"),
        (5, "is of type int; give a list"),
        (json.dumps(RECORD) * 200, "is a text of JSON. Give a list"),
        ("x" * 5000, "no path is so long"),
    ],
)
def test_what_is_neither_records_nor_a_path(run: Path, tmp_path: Path, given, words) -> None:
    uses = [lambda: evaluate(run, data=given), lambda: adapt(run, given, tmp_path / "users")]
    for use in (*uses, lambda: score(run, given)) if given != [] else uses:
        with pytest.raises(UserError) as refused:
            use()
        assert words in str(refused.value) and len(str(refused.value)) < 200


def test_a_text_that_cannot_be_scored_is_named_by_its_number(run: Path) -> None:
    with pytest.raises(UserError, match=r"^record 2: has no 'response'"):
        score(run, [{"text": "a"}, {"prompt": "a"}])


def test_a_recipe_that_holds_the_data_is_refused_in_few_words(tmp_path: Path) -> None:
    many = [RECORD] * 500
    jsonl = {"class_path": "Jsonl", "init_args": {"path": many}}
    for source in (many, jsonl, {**jsonl, "init_args": {"paths": many}}):
        with pytest.raises(UserError) as refused:
            prepare({"data": {"path": str(tmp_path / "data"), "source": source}})
        assert len(str(refused.value)) < 2000


def test_a_recipe_in_memory_is_named_as_one(tmp_path: Path) -> None:
    twice = {"data": {"path": str(tmp_path / "data")}, "optim": {}, "optim.learning_rate": 1}
    with pytest.raises(UserError, match=r"^recipe:\d+: the key 'optim.learning_rate' stands"):
        prepare(twice)
    for wrong in ({"seeds": 1}, {"data": {"path": 3, "seed": "x"}}, {"data": 5}):
        with pytest.raises(UserError) as refused:
            prepare(wrong)
        assert "pal_ds_" not in str(refused.value)


def test_many_records_are_no_part_of_what_ranks_compare() -> None:
    assert repr(GivenRecords([RECORD] * 1000)) == "records"


def test_a_split_beside_pairs_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    file = str(write_pairs(tmp_path / "pairs.jsonl", 4))
    for words in (
        ["evaluate", "--data", file],
        ["evaluate", "--source=Jsonl", f"--source.path={file}"],
        ["adapt", f"--pairs={file}", f"--out={tmp_path / 'users'}"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, f"--run_dir={run}", "--split=dev"])
        assert stop.value.code == 2 and "give --split, or --" in capsys.readouterr().err
    for use in (
        lambda: evaluate(run, data=file, split="test"),
        lambda: adapt(run, file, tmp_path / "users", split="unseen_train"),
    ):
        with pytest.raises(UserError, match="not both"):
            use()
    assert not (tmp_path / "users").exists()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("*.jsonl", "votes"), ("part-*.jsonl", "part"), ("[ab].jsonl", "ab"), ("p?.jsonl", "p")],
)
def test_the_result_of_a_pattern_has_a_plain_name(pattern: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "votes"
    (request,) = eval_requests("test", [folder / pattern], None)
    assert request.name == name
    folder.mkdir()
    (folder / pattern).touch()
    (request,) = eval_requests("test", [folder / pattern], None)
    assert request.name == Path(pattern).stem, "a file of this very name is no pattern"


@pytest.mark.parametrize(
    ("split", "files", "name", "whose"),
    [
        ("dev", [], "test", "own split test"),
        ("test", [], "few_shot", "held-out users"),
        ("test", [], "best_of_n_test", "choices in the run's own split test"),
        ("test", ["few_shot.jsonl"], None, "held-out users"),
        ("test", ["best_of_n_dev.jsonl"], None, "choices in the run's own split dev"),
    ],
)
def test_no_result_takes_the_name_of_another(
    split: str, files: list[str], name: str | None, whose: str
) -> None:
    with pytest.raises(UserError, match=f"{whose} belong. Give another --name"):
        eval_requests(split, [Path(file) for file in files], name)
    assert eval_requests("test", [], "test")[0].name == "test"


def test_candidates_in_memory_have_a_result_of_their_own(run: Path) -> None:
    lists = [{"user_id": "u0", "prompt": "p", "responses": ["a", "b c", "d"], "scores": [1, 3, 2]}]
    assert evaluate(run, data=lists, best_of_n=True)["lists"] == 1
    assert "regret" in json.loads((run / "eval/best_of_n_records.json").read_text())


def test_a_table_of_pandas_is_named_with_its_remedy() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"data: is a DataFrame.*data\.to_dict\('records'\)"):
        path_or_list(table, "data")
