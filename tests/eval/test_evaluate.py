"""Evaluation is exact: nine pairs give the same figures on one, two and three ranks; strangers are reported apart.

One of the two runs weighs every token, the other has a hinge loss, whose margins are calibrated on its dev pairs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.cli.main import main
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.records import Record
from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import TextEncoder
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.best_of_n import listed_candidates, read_lists, score_candidates
from pal_ds.eval.evaluate import evaluate_run, opened_pairs
from pal_ds.eval.results import file_request, split_request
from pal_ds.export.audience import choose_audience
from pal_ds.heads.base import HeadOutput, UserState
from pal_ds.inference.load_run import open_run, restore
from pal_ds.inference.readers import known_users
from pal_ds.inference.score_texts import Row, Scorer
from pal_ds.inference.scoring import Forwards
from pal_ds.reward_models import model_of_run
from pal_ds.runs.run_dir import RunDirectory
from tests.near import margin_bound, room
from tests.spawn import run_command, run_ranks
from tests.tiny import LLAMA, TOPICS, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
TUNINGS = {
    "full": [
        "--loss.token_weighting=cumulative",
        "--train.shuffle_unit=item",
        "--train.micro_batch_tokens=80",
    ],
    "frozen": ["--loss.kind=hinge"],
}


def write_lists(path: Path) -> Path:
    """Lists of an odd and an even number of texts, one of them twice; u3 is a stranger, the last line is dropped."""
    generator = np.random.default_rng(5)
    lines = []
    for index in range(7):
        texts = [
            f"{TOPICS[index]} is {word}." for word in ("fine", "no good", "what I like", "odd")
        ]
        texts = texts[: 3 + index % 2] + texts[:1]
        row = {"user_id": f"u{index % 4}", "prompt": f"Tell me about {TOPICS[index]}."}
        scores = generator.integers(0, 4, len(texts)).tolist()
        lines.append(json.dumps({**row, "responses": texts, "scores": scores}))
    too_long = {"user_id": "u0", "responses": ["short", "a", "long " * 100], "scores": [1, 2, 3]}
    path.write_text("\n".join([*lines, json.dumps(too_long)]) + "\n")
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    pairs = write_pairs(folder / "pairs.jsonl", 60)
    nine = write_pairs(folder / "nine.jsonl", 9, num_users=4, seed=1)
    lists = write_lists(folder / "lists.jsonl")
    options = [
        f"--data.path={folder / 'data'}",
        "--data.source=Jsonl",
        f"--data.source.path={pairs}",
        "--data.vocab_size=400",
        "--data.max_length=64",
        "--data.dev_fraction=0.2",
        f"--backbone.architecture={json.dumps(LLAMA)}",
        "--head=PalA",
        "--head.num_prototypes=3",
        "--train.batch_pairs=16",
        "--optim.learning_rate=3e-3",
        "--train.ds_config=zero0",
    ]
    for tuning, more in TUNINGS.items():
        run_command(
            "train",
            *options,
            *more,
            f"--backbone.tuning={tuning}",
            f"--run_dir={folder / tuning}",
        )
        (folder / f"{tuning}_out").mkdir()
        for num_ranks in (1, 2, 3):
            run_ranks(
                num_ranks,
                "tests.eval.evaluate_worker",
                folder / tuning,
                nine,
                lists,
                folder / f"{tuning}_out",
            )
    return folder


@pytest.mark.parametrize("tuning", TUNINGS)
def test_same_on_every_world_size(evaluated: Path, tuning: str) -> None:
    """Which pairs share a forward depends on the world size, so scores agree to rounding; see `tests/near.py`."""
    out = evaluated / f"{tuning}_out"
    figures = {n: json.loads((out / f"figures{n}.json").read_text()) for n in (1, 2, 3)}
    scores = {n: dict(np.load(out / f"scores{n}.npz")) for n in (1, 2, 3)}
    margins = scores[1]["margins"]
    assert len(margins) == 9
    assert np.ptp(margins) > 1e-3
    bound = margin_bound(scores[1]["rewards"])
    rows = [json.loads(line) for line in (evaluated / "nine.jsonl").read_text().splitlines()]
    users = np.asarray([row["user_id"] for row in rows])
    for num_ranks in (2, 3):
        assert np.abs(scores[num_ranks]["margins"] - margins).max() <= bound
        temperatures = figures[1]["temperature"], figures[num_ranks]["temperature"]
        # Fitted on dev margins, which are as near; the minimiser stops within 1e-5 of log T.
        assert temperatures[1] == pytest.approx(temperatures[0], rel=3e-5)
        for section in (lambda found: found, lambda found: found["unknown_users"]):
            one, many = section(figures[1]), section(figures[num_ranks])
            assert one["pairs"] == many["pairs"] and one["users"].keys() == many["users"].keys()
            of_section = np.isin(users, list(one["users"]))
            entries = [(one, many, of_section)]
            entries += [(one["users"][u], many["users"][u], users == u) for u in one["users"]]
            for wanted, found, own in entries:
                assert wanted["pairs"] == found["pairs"] == own.sum() > 0
                for key, most in room(margins[own], bound, temperatures)._asdict().items():
                    assert found[key] == pytest.approx(wanted[key], abs=most), key
        # Of parameters and lengths alone, and of counts, which turn where a margin is within rounding of a tie.
        keys = ["diagnostics", "format_baseline_accuracy"]
        keys += ["warnings", "controversial"] if np.abs(margins).min() > bound else []
        for key in keys:
            assert figures[num_ranks][key] == figures[1][key]
        ranked = [json.loads((out / f"ranked{n}.json").read_text()) for n in (1, num_ranks)]
        for kind, one, many in zip(("listed", "compared"), *ranked, strict=True):
            apart = np.abs(scores[num_ranks][kind] - scores[1][kind]).max()
            assert apart <= margin_bound(scores[1][kind])
            assert_ranked_alike(many, one, scores[1][kind], scores[1][f"{kind}_first"])


def assert_ranked_alike(found: Any, wanted: Any, scores: np.ndarray, first: np.ndarray) -> None:
    """Equal, but for lists (from `first` on) that hold two scores within rounding of each other: they may change order.

    Such a list moves a mean over n lists by 1 / n, that of Kendall's tau by 2 / n.
    """
    near = 2 * margin_bound(scores)
    gaps = [np.diff(np.unique(part)) for part in np.split(scores, first[1:-1])]
    num_near = sum(bool((gap <= near).any()) for gap in gaps)
    if num_near == 0:
        assert found == wanted
        return
    for one, many in ((wanted, found), (wanted["unknown_users"], found["unknown_users"])):
        assert (one["lists"], one["indifferent"]) == (many["lists"], many["indifferent"])
        for name, span in (("top1", 1), ("regret_normalised", 1), ("kendall_tau_b", 2)):
            if one["lists"]:
                assert abs(one[name] - many[name]) <= span * num_near / one["lists"] + 1e-12


@pytest.mark.parametrize("tuning", TUNINGS)
def test_candidates_are_scored_as_an_export_scores_them(evaluated: Path, tuning: str) -> None:
    """One by one, from their texts, by the code that exported folders carry."""
    restored = restore(RunDirectory(evaluated / tuning))
    known, file = known_users(restored, None), evaluated / "lists.jsonl"
    lines = read_lists(file)
    opened = open_run(restored.run)
    model = model_of_run(opened)
    encoder = TextEncoder.from_info(opened.data.info["tokens"], opened.data.tokenizer_path)

    def pairs_of(_: Path) -> Iterator[Record]:
        for number, line in enumerate(lines):
            yield from line.records(number)

    with opened_pairs(restored, file, ALONE, pairs_of) as data:
        candidates, num_dropped = listed_candidates(data, lines)
        scores = score_candidates(restored, known, data, candidates, ALONE)
    assert (len(candidates.user), num_dropped) == (7, 1)
    expected = []
    for line in lines[:-1]:
        user = line.fields["user_id"]
        audience = choose_audience(
            model.head,
            opened.users,
            user=None if user == "u3" else user,
            mixture=None,
            users_dir=None,
        )
        model.config.mixture = audience.mixture
        for text in line.fields["responses"]:
            row = Row("", {}, None, line.fields["prompt"], text)
            expected += Scorer(model, encoder).score([row])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 1e-2
    assert candidates.utility.tolist() == [s for line in lines[:-1] for s in line.scores]


def test_best_of_n_is_written_with_strangers_apart(evaluated: Path) -> None:
    run = RunDirectory(evaluated / "full")
    found = json.loads((run.eval / "lists2.json").read_text())
    assert set(found["users"]) == {"u0", "u1", "u2"}
    assert set(found["unknown_users"]["users"]) == {"u3"}
    assert found["lists"] + found["indifferent"] + found["unknown_users"]["lists"] == 7
    assert found["dropped"]["lists"] == 1 and found["dropped"]["too_long"] > 0
    assert 0 <= found["regret_normalised"] <= 1
    assert found["baselines"]["random"]["kendall_tau_b"] == 0
    # Of a split: what one user compared for one prompt, three texts or more.
    compared = json.loads((run.eval / "compared2.json").read_text())
    assert compared["lists"] > 3 and compared["candidates_mean"] >= 3
    with pytest.raises(UserError, match="no pairs in it"):
        evaluate_run(run, ALONE, request=split_request("unseen_train"))


def test_several_files_in_one_call_and_best_of_n(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, nine, other = evaluated / "full", evaluated / "nine.jsonl", evaluated / "copy.jsonl"
    other.write_text(nine.read_text())
    main(["evaluate", f"--run_dir={run}", f"--data={nine},{other}"])
    said = capsys.readouterr().out
    assert "nine: " in said and "copy: " in said and "warning: " in said
    first, copy = (
        json.loads((run / "eval" / f"{name}.json").read_text()) for name in ("nine", "copy")
    )
    assert first == copy
    main(["evaluate", f"--run_dir={run}", f"--data={evaluated / 'lists.jsonl'}", "--best_of_n"])
    said = capsys.readouterr().out
    assert "best_of_n_lists: " in said and "kendall_tau_b" in said
    found = json.loads((run / "eval" / "best_of_n_lists.json").read_text())
    # This process may have more threads than the worker's rank had.
    scores = np.load(evaluated / "full_out" / "scores1.npz")
    ranked = json.loads((run / "eval" / "lists1.json").read_text())
    assert_ranked_alike(found, ranked, scores["listed"], scores["listed_first"])
    # Results of one name, whether by --name or by the files' own, would hide each other.
    for files, more in (
        (f"{nine},{other}", ["--name=x"]),
        (f"{nine},{evaluated}/deep/nine.jsonl", []),
    ):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", f"--run_dir={run}", f"--data={files}", *more])
        assert end.value.code == 2
        assert "would go to one eval/NAME.json" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [True, False])
def test_forwards_keep_to_the_budget_of_tokens(evaluated: Path, packed: bool) -> None:
    """And margins come back in the order of the rows, whatever forward they were made in."""
    data, budget, sizes = PreparedData.open(evaluated / "data"), 100, []

    def forward(batch: Batch, user: UserState) -> HeadOutput:
        assert batch.input_ids is not None and batch.response_positions is not None
        sizes.append((len(batch.label), batch.input_ids.numel()))
        # Of responses that differ in their ids: the first tells which comparison it is.
        ids = batch.input_ids.flatten() if packed else batch.input_ids
        at = batch.response_positions[:, 0]
        tokens = ids[at] if packed else ids.gather(1, at[:, None])[:, 0]
        mark = tokens[batch.response_index].float() + batch.user_row[:, None]
        margin = (mark[:, 1] + 1000 * mark[:, 0])[:, None].expand(-1, int(batch.window_end.max()))
        return HeadOutput(margin[:, None], margin, margin[:, 0])

    rows = np.random.default_rng(0).permutation(data.rows("train"))
    collator = Collator(data, scored_positions="all", packed=packed)
    mixtures = torch.zeros(len(data.users), 1)
    bounded, free = (
        Forwards(forward, collator, 8, ALONE, tokens).margins(rows, mixtures)
        for tokens in (budget, None)
    )
    assert np.array_equal(bounded, free) and len(np.unique(free)) > 1
    of_budget = sizes[: -(-len(rows) // 8) * -1]
    assert sum(count for count, _ in of_budget) == len(rows)
    assert all(count == 1 or tokens <= budget for count, tokens in of_budget)
    assert max(tokens for _, tokens in sizes) > budget


def test_strangers_are_apart(evaluated: Path) -> None:
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    assert set(figures["users"]) == {"u0", "u1", "u2"}
    assert set(figures["unknown_users"]["users"]) == {"u3"}
    assert figures["pairs"] + figures["unknown_users"]["pairs"] == 9
    assert figures["prompts_seen_in_training"] > 0
    written = json.loads((evaluated / "full" / "eval" / "world2.json").read_text())
    assert written["pairs"] == figures["pairs"]


def test_accuracy_is_that_of_the_margins(evaluated: Path) -> None:
    """Against a count made by hand from the file."""
    rows = [json.loads(line) for line in (evaluated / "nine.jsonl").read_text().splitlines()]
    margins = np.load(evaluated / "full_out" / "scores1.npz")["margins"]
    # In this record form the first response is the chosen one.
    right = margins < 0
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    known = np.asarray([row["user_id"] != "u3" for row in rows])
    assert figures["accuracy"] == pytest.approx(right[known].mean())
    assert figures["unknown_users"]["accuracy"] == pytest.approx(right[~known].mean())


@pytest.fixture
def hinge_run(evaluated: Path) -> RunDirectory:
    return RunDirectory(evaluated / "frozen")


def test_temperature_is_that_of_the_step(evaluated: Path, hinge_run: RunDirectory) -> None:
    """Whatever is evaluated, and although best.json may be about another step."""
    best = hinge_run.path / "best.json"
    said = best.read_text()
    best.unlink()
    try:
        split = evaluate_run(hinge_run, ALONE, request=split_request("dev"))["temperature"]
        file = evaluate_run(hinge_run, ALONE, request=file_request(evaluated / "nine.jsonl", "t"))
    finally:
        best.write_text(said)
    assert split != 1.0
    assert file["temperature"] == split
    # This run has one step, at which training fitted it, too.
    assert split == pytest.approx(json.loads(said)["temperature"], rel=1e-3)


def test_temperature_of_the_logistic_loss_is_one(evaluated: Path) -> None:
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    assert figures["temperature"] == 1.0


def test_files_of_one_name_do_not_meet(evaluated: Path, hinge_run: RunDirectory) -> None:
    """Two evaluations of files called alike at the same time; nothing is left of either."""
    restored = restore(hinge_run)
    (evaluated / "other").mkdir()
    alike = write_pairs(evaluated / "other" / "nine.jsonl", 5, num_users=2, seed=3)
    with opened_pairs(restored, evaluated / "nine.jsonl", ALONE) as nine:
        with opened_pairs(restored, alike, ALONE) as five:
            assert nine.path != five.path
            assert (len(nine.comparisons), len(five.comparisons)) == (9, 5)
        assert nine.path.is_dir()
    assert not list(hinge_run.path.glob("pairs-of-*"))


def test_nothing_is_left_of_a_file_that_is_refused(
    evaluated: Path, hinge_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = evaluated / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        evaluate_run(hinge_run, ALONE, request=file_request(bad))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Forwards, "margins", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_run(hinge_run, ALONE, request=file_request(evaluated / "nine.jsonl"))
    assert not list(hinge_run.path.glob("pairs-of-*"))
