"""Users who were fitted to another model, or another step of it, are refused by every command that reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pal_ds.api import score_with_std
from pal_ds.cli.main import main
from pal_ds.inference.fitted_to import RECORD, read_record
from pal_ds.inference.posterior_file import read_posterior
from pal_ds.reward_models import load_reward_model
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from slurm import user_shards
from tests.spawn import run_command
from tests.tiny import LLAMA, data_options, write_pairs

EARLY, LAST = 3, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` (two checkpoints) and `two`, new users of `one` (both steps), and exports of both."""
    folder = tmp_path_factory.mktemp("fitted_to")
    pairs = write_pairs(folder / "pairs.jsonl", 60, num_users=4)
    write_pairs(folder / "new.jsonl", 12, num_users=2, seed=1)
    for seed, name in enumerate(("one", "two")):
        run_command(
            "train",
            *data_options(folder, pairs),
            "--data.dev_fraction=0",
            f"--backbone.architecture={json.dumps(LLAMA)}",
            "--head=PalA",
            "--head.num_prototypes=2",
            "--train.batch_pairs=8",
            f"--train.stop_after={LAST}",
            f"--train.save_every={EARLY}",
            f"--train.seed={seed}",
            "--optim.learning_rate=1e-2",
            "--train.ds_config=zero0",
            f"--run_dir={folder / name}",
        )
        main(["consolidate", str(folder / name), str(folder / f"{name}_exported")])
    for step in (EARLY, LAST):
        fit(folder, step, folder / f"users_{step}")
    (folder / "texts.jsonl").write_text(
        json.dumps({"prompt": "a", "response": "b", "user_id": "u1"}) + "\n"
    )
    return folder


def fit(folder: Path, step: int, out: Path) -> None:
    words = [f"--run_dir={folder / 'one'}", f"--pairs={folder / 'new.jsonl'}", f"--step={step}"]
    main(["adapt", *words, f"--out={out}"])


Words = Callable[[Path, str, Path, Path], list[str]]
READERS: dict[str, Words] = {
    "evaluate": lambda place, run, users, out: [
        *("evaluate", f"--run_dir={place / run}", f"--users={users}"),
        *(f"--data={place / 'new.jsonl'}", f"--out={out}"),
    ],
    "score --run_dir": lambda place, run, users, out: [
        *("score", f"--run_dir={place / run}", f"--users={users}", "--user=u1"),
        f"--input={place / 'texts.jsonl'}",
    ],
    "score --run_dir, by line": lambda place, run, users, out: [
        *("score", f"--run_dir={place / run}", f"--users={users}"),
        f"--input={place / 'texts.jsonl'}",
    ],
    "score --model": lambda place, run, users, out: [
        *("score", f"--model={place / f'{run}_exported'}", f"--users={users}", "--user=u1"),
        f"--input={place / 'texts.jsonl'}",
    ],
    "score --model, by line": lambda place, run, users, out: [
        *("score", f"--model={place / f'{run}_exported'}", f"--users={users}"),
        f"--input={place / 'texts.jsonl'}",
    ],
    "consolidate --users": lambda place, run, users, out: [
        *("consolidate", str(place / run), str(out), f"--users={users}"),
    ],
    "consolidate --user": lambda place, run, users, out: [
        *("consolidate", str(place / run), str(out), f"--users={users}", "--user=u1"),
    ],
    "consolidate --with_users": lambda place, run, users, out: [
        *("consolidate", str(place / run), str(out), f"--users={users}", "--with_users"),
    ],
}


@pytest.mark.parametrize("reader", READERS)
def test_a_table_of_another_run_or_step_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    out = tmp_path / "out"
    for run, step in (("two", LAST), ("one", EARLY)):
        with pytest.raises(SystemExit) as stop:
            main(READERS[reader](place, run, place / f"users_{step}", out))
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert f"--users {place}/users_{step}: its users were fitted to step {step} of one" in said
        assert "pal-ds adapt --run_dir" in said and f"--step {LAST}" in said
        assert not out.exists()
    main(READERS[reader](place, "one", place / f"users_{LAST}", out))
    assert RECORD not in capsys.readouterr().err


@pytest.mark.parametrize("reader", READERS)
def test_a_table_of_an_older_version_is_read_with_one_warning(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, reader: str
) -> None:
    users = tmp_path / "older"
    shutil.copytree(place / f"users_{LAST}", users, ignore=shutil.ignore_patterns(RECORD))
    main(READERS[reader](place, "one", users, tmp_path / "out"))
    assert len([line for line in caplog.messages if f"holds no {RECORD}" in line]) == 1


def test_the_same_adapt_gives_a_table_of_an_older_version_its_record(
    place: Path, tmp_path: Path
) -> None:
    users = tmp_path / "older"
    shutil.copytree(place / f"users_{LAST}", users)
    written = (users / RECORD).read_bytes()
    (users / RECORD).unlink()
    fit(place, LAST, users)
    assert (users / RECORD).read_bytes() == written


def test_a_changed_record_is_damage(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = tmp_path / "damaged"
    shutil.copytree(place / f"users_{EARLY}", users)
    text = (users / RECORD).read_text()
    for content in (text.replace(f'"step": {EARLY}', f'"step": {LAST}'), text[:-20], "[]"):
        (users / RECORD).write_text(content)
        with pytest.raises(SystemExit) as stop:
            main(READERS["evaluate"](place, "one", users, tmp_path / "out"))
        assert stop.value.code == 2 and f"{users / RECORD}: " in capsys.readouterr().err


def test_a_forgotten_user_leaves_the_table_of_others_as_good(place: Path, tmp_path: Path) -> None:
    """To remove a user writes checkpoints anew, and their heads are what they were."""
    run = tmp_path / "one"
    shutil.copytree(place / "one", run)
    main(["users", f"--run_dir={run}", "--remove=u0"])
    main(READERS["evaluate"](tmp_path, "one", place / f"users_{LAST}", tmp_path / "out")[:3])


def test_a_job_array_keeps_the_record_and_refuses_shards_of_two_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "array" / "shards"
    shutil.copytree(place / f"users_{LAST}", shards / "0")
    user_shards.merge(tmp_path / "array")
    assert read_record(tmp_path / "array") == read_record(place / f"users_{LAST}") is not None
    assert RunDirectory(place / "one").complete_steps()[-1] == LAST
    shutil.copytree(place / f"users_{EARLY}", shards / "1")
    with pytest.raises(SystemExit) as stop:
        user_shards.merge(tmp_path / "array")
    assert stop.value.code == 2 and "array=1" in capsys.readouterr().err


def test_scores_say_how_sure_they_are(place: Path, tmp_path: Path, capsys: Any) -> None:
    """By a run, by an export of the user, in Python and by differences of scores: the same."""
    users, texts = place / f"users_{LAST}", tmp_path / "texts.jsonl"
    records = [{"prompt": "Tell me about tea.", "response": text} for text in ("Tea.", "No, no.")]
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    of_user = [f"--users={users}", "--user=u1"]
    given = ["score", f"--run_dir={place / 'one'}", f"--input={texts}"]

    def lines(*words: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        main([*words])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    sure, lower = lines(*given, *of_user, "--std"), lines(*given, *of_user, "--pessimism=2")
    exported = tmp_path / "exported"
    main(["consolidate", str(place / "one"), str(exported), *of_user])
    again = lines("score", f"--model={exported}", f"--input={texts}", "--std")
    rewards, stds = score_with_std(place / "one", texts, users, user="u1")
    mixture = UserTable.load(users).mixtures()[UserTable.load(users).rows(["u1"])[0]].tolist()
    posterior = read_posterior(users, 2, 2)
    assert posterior is not None
    spread = float(posterior.covariance[UserTable.load(users).rows(["u1"])[0], 0, 0]) ** 0.5
    step = min(1e-2, *mixture)
    up, down = (
        lines(*given, f"--mixture={mixture[0] + sign * step},{mixture[1] - sign * step}")
        for sign in (1, -1)
    )
    for number, line in enumerate(sure):
        std = line["reward_std"]
        assert std > 0 and std == pytest.approx(stds[number], rel=1e-4)
        assert again[number]["reward_std"] == pytest.approx(std, rel=1e-3)
        assert rewards[number] == pytest.approx(line["score"], abs=1e-5)
        assert lower[number]["score"] == pytest.approx(line["score"] - 2 * std, abs=1e-5)
        slope = abs(up[number]["score"] - down[number]["score"]) / (2 * step)
        assert std == pytest.approx(slope * spread, rel=0.3)


def test_a_posterior_is_of_one_user(place: Path, tmp_path: Path) -> None:
    users, out = place / f"users_{LAST}", tmp_path / "out"
    main(["consolidate", str(place / "one"), str(out), f"--users={users}"])
    folders = json.loads((out / "users.json").read_text())
    ids = torch.tensor([[5, 6, 7]])
    for user, name in folders.items():
        model = load_reward_model(out / name)
        assert model(ids, torch.ones_like(ids), return_std=True).std > 0, user
        model.config.mixture = [0.25, 0.75]
        with pytest.raises(ValueError, match="nothing is known of how sure"):
            model(ids, torch.ones_like(ids), return_std=True)
