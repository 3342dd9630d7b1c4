"""Commands on a finished run: wrong run, step, user or mixture, a changed recipe, damaged files."""

import json
import shutil
from pathlib import Path

import pytest

from tests.bad_input.conftest import Place, Refused, contents, pal_ds
from tests.spawn import torchrun
from tests.tiny import change_info
from tools import consolidate

MIXTURES = [
    ("0.5,0.6", "mixture sums to 1.1; its entries must sum to 1"),
    ("1", "mixture has 1 entries, the head has 2 prototypes; give 2 weights"),
    ("0.2,0.3,0.5", "mixture has 3 entries, the head has 2 prototypes"),
    ("-0.5,1.5", "mixture [-0.5, 1.5] has an entry below 0"),
    ("nan,1", "has an entry below 0 (or not a number)"),
    ("a,b", "'a,b' is no list of numbers separated by commas, as in 0.2,0.8"),
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"prompt": "Tell me about tea.", "response": "Tea is fine."}) + "\n")
    return path


@pytest.fixture
def copied_run(place: Place, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(place.run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["evaluate", "adapt", "score", "users", "consolidate"])
def test_no_run_there(place: Place, refused: Refused, tmp_path: Path, texts: Path, command: str):
    more = {"score": [f"--input={texts}"], "adapt": [f"--out={tmp_path / 'U'}"]}
    more["users"] = ["--list"]
    for run in (tmp_path / "nix", place.data):
        if command == "consolidate":
            said = refused(run, tmp_path / "out", command=consolidate.main)
        else:
            said = refused(command, f"--run_dir={run}", *more.get(command, []))
        assert f"{run}: no config.yaml here. --run_dir names a directory that `train` wrote" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split=dev", "--step=99"], "--step 99: not among the checkpoints of "),
        (["--split=dev", "--step=newest"], ": [3, 6], latest or best."),
        ([], "--split test: "),
        (["--split=val"], "no split is called 'val'; the splits are train, dev, test"),
        (["--data=none.jsonl"], "none.jsonl: no such file"),
        (["--split=dev", "--users=nowhere"], "nowhere/users.safetensors is missing; a user tab"),
        (["--split=dev", "--name=a/b"], "--name a/b: must be a plain name"),
    ],
)
def test_evaluate(place: Place, refused: Refused, arguments: list[str], message: str):
    assert message in refused("evaluate", f"--run_dir={place.run}", *arguments)


@pytest.mark.parametrize("command", ["evaluate", "adapt"])
def test_pairs_file_with_a_bad_line(place: Place, refused: Refused, tmp_path: Path, command: str):
    pairs = tmp_path / "new.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    option = {"evaluate": ["--data"], "adapt": ["--out", tmp_path / "U", "--pairs"]}[command]
    said = refused(command, f"--run_dir={place.run}", *option, pairs)
    assert f"{pairs}:2: missing key 'chosen'" in said


@pytest.mark.parametrize("command", ["evaluate", "adapt"])
def test_vectors_for_a_run_on_text(place: Place, refused: Refused, tmp_path: Path, command: str):
    pairs = tmp_path / "new.jsonl"
    pairs.write_text('{"user_id": "a", "response_features": [[0.1, 0.2], [0.3, 0.4]], "y": 1}\n')
    option = {"evaluate": ["--data"], "adapt": ["--out", tmp_path / "U", "--pairs"]}[command]
    said = refused(command, f"--run_dir={place.run}", *option, pairs)
    assert f"{pairs}: holds vectors, and the run was trained on tokens" in said


def test_adapt(place: Place, refused: Refused, tmp_path: Path):
    out = f"--out={tmp_path / 'U'}"
    run = f"--run_dir={place.run}"
    assert "--split unseen_train: no pairs to adapt to" in refused("adapt", run, out)
    assert "none.jsonl: no such file" in refused("adapt", run, out, "--pairs=none.jsonl")
    few = ["--pairs", place.pairs, "--num_pairs=0"]
    assert "--num_pairs is 0; it must be at least 1" in refused("adapt", run, out, *few)
    for taken in (place.data, place.pairs):
        said = refused("adapt", run, f"--out={taken}", "--pairs", place.pairs)
        assert f"--out {taken}: not empty. Name an empty or new directory" in said


@pytest.mark.parametrize(("mixture", "message"), MIXTURES)
def test_mixtures(
    place: Place, refused: Refused, tmp_path: Path, texts: Path, mixture: str, message: str
):
    option = f"--mixture={mixture}"
    assert message in refused("score", f"--run_dir={place.run}", f"--input={texts}", option)
    assert message in refused(place.run, tmp_path / "out", option, command=consolidate.main)


def test_score(place: Place, refused: Refused, tmp_path: Path, texts: Path):
    run = ["score", f"--run_dir={place.run}"]
    given = [*run, f"--input={texts}"]
    said = refused(*given, "--user=nobody")
    assert "unknown user 'nobody'; the table holds 3 users. Fit new users with" in said
    assert "give one of them" in refused(*given, "--user=u1", "--mixture=0.5,0.5")
    assert "exactly one of --model and --run_dir" in refused(*given, f"--model={place.run}")
    assert "no export.json here" in refused("score", f"--model={place.run}", f"--input={texts}")
    assert "users.safetensors is missing" in refused(*given, "--user=u1", "--users=nowhere")
    assert "--batch_texts is 0" in refused(*given, "--batch_texts=0")
    assert "x.jsonl: no such file" in refused(*run, "--input=x.jsonl")
    output = f"--output={tmp_path / 'no' / 'out.jsonl'}"
    assert "must be a file in a folder that exists" in refused(*given, output)
    texts.write_text('{"prompt": "a"}\n')
    assert f"{texts}:1: has no 'response'. Give prompt and response" in refused(*given)
    texts.write_bytes('{"text": "é"}'.encode("latin-1"))
    assert f"{texts}:1: not UTF-8" in refused(*given)


def test_users_of_a_run_with_other_prototypes(
    place: Place, refused: Refused, tmp_path: Path, texts: Path
):
    from pal_ds.users import UserTable

    UserTable(5, ["u1"]).save(tmp_path / "U")
    users = f"--users={tmp_path / 'U'}"
    said = refused("evaluate", f"--run_dir={place.run}", "--split=dev", users)
    assert "5 prototypes, the run has 2. Adapt the users to this run" in said
    said = refused("score", f"--run_dir={place.run}", f"--input={texts}", users, "--user=u1")
    assert "5 prototypes, the run has 2. Adapt them to this run" in said


def test_consolidate(place: Place, refused: Refused, tmp_path: Path):
    def said(*arguments: object) -> str:
        return refused(place.run, *arguments, command=consolidate.main)

    out = tmp_path / "out"
    assert f"{place.data}: exists and is not empty" in said(place.data)
    assert "--step 7: not among the checkpoints" in said(out, "--step=7")
    assert "unknown user 'nobody'" in said(out, "--user=nobody")
    assert "--max_shard_size 4: must be a number and KB" in said(out, "--max_shard_size=4")
    assert "no such folder is here" in said(out, "--data=nowhere")
    assert "unrecognized arguments: --usr" in said(out, "--usr=x")


def test_users_command(place: Place, refused: Refused):
    run = f"--run_dir={place.run}"
    assert "exactly one of --list and --remove ID" in refused("users", run)
    assert "no checkpoint of" in refused("users", run, "--remove=nobody")


def test_resuming_another_run(place: Place, refused: Refused, tmp_path: Path):
    said = refused(*place.train("--train.epochs=3", "--optim.learning_rate=0.5"))
    assert "optim.learning_rate: 0.0001 -> 0.5; train.epochs: 2 -> 3" in said
    assert "--allow_change optim.learning_rate,train.epochs, or start in another --run_dir" in said
    said = refused(
        *place.train("--train.epochs=3", "--optim.learning_rate=0.5", "--allow_change=train.epochs")
    )
    assert "other values: optim.learning_rate: 0.0001 -> 0.5. Restore" in said
    assert "--fresh needs an empty directory" in refused(*place.train("--fresh"))


def test_data_that_changed_under_a_run(place: Place, refused: Refused, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    info = json.loads((data / "dataset.json").read_text())
    change_info(data, hash="0" * 32)
    said = refused(*place.train(f"--data.path={data}"))
    assert f"trained on data with hash {info['hash']}, {data} has {'0' * 32}" in said
    assert "Resume with the data it was trained on" in said
    said = refused(place.run, tmp_path / "out", f"--data={data}", command=consolidate.main)
    assert "Point data.path at the data it was trained on" in said


def test_damaged_runs(place: Place, refused: Refused, copied_run: Path):
    evaluate = ["evaluate", f"--run_dir={copied_run}", "--split=dev"]
    newest = copied_run / "checkpoints" / "step_00000006"
    (copied_run / "best.json").write_text("{")
    assert "best.json: not valid JSON" in refused(*evaluate, "--step=best")
    (copied_run / "best.json").unlink()
    assert "no best.json, the run has not evaluated on dev" in refused(*evaluate, "--step=best")
    content = (newest / "users.arrow").read_bytes()
    (newest / "users.arrow").write_bytes(content[:-1])
    assert "users.arrow: " in refused(*evaluate)
    (newest / "users.arrow").write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    assert "does not match the hash in the manifest" in refused(*evaluate)
    (newest / "manifest.json").write_text('{"format')
    assert "manifest.json: cannot be read (not valid JSON: " in refused(*evaluate)
    recipe = (copied_run / "config.yaml").read_text()
    (copied_run / "config.yaml").write_text(recipe.replace("epochs:", "epoks:"))
    said = refused(*evaluate)
    assert "config.yaml" in said
    assert "epoks" in said
    (copied_run / "config.yaml").write_text("{")
    assert "config.yaml:1: not valid YAML" in refused(*place.train(run=copied_run))
    (copied_run / "config.yaml").write_text(recipe)
    shutil.rmtree(copied_run / "checkpoints")
    assert "no complete checkpoint. Train first" in refused(*evaluate)


def test_allowed_changes_in_real_processes(place: Place, copied_run: Path):
    size = ["--head.dim=8", "--allow_change=head.init_args.dim"]
    before = contents(copied_run)
    done = pal_ds(*place.train(*size, run=copied_run))
    assert done.returncode == 2, done.stderr
    assert "does not fit the model of this recipe" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(copied_run) == before
    done = pal_ds(*place.train("--train.epochs=3", "--allow_change=train.epochs", run=copied_run))
    assert done.returncode == 0, done.stderr
    assert json.loads((copied_run / "latest.json").read_text())["step"] == 9


def test_two_ranks_say_it_once_and_leave(place: Place, tmp_path: Path):
    before = contents(place.folder)
    options = ["--head.num_prototypes=0"]
    done = torchrun(2, "pal_ds", *place.train(*options, run=tmp_path / "new"), timeout=120)
    said = done.stderr.partition("ChildFailedError")[2]
    assert done.returncode != 0
    assert done.stderr.count("pal-ds: error: head: num_prototypes is 0; it must be above 0.") == 1
    assert said.count("exitcode  : 2 ") == 2, done.stderr
    assert "pal_ds/cli/main.py" not in done.stderr
    assert contents(place.folder) == before
    assert not (tmp_path / "new").exists()
