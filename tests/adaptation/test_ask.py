"""`ask` on a trained run: the most telling candidates, once each, the same again, and lines that can be answered."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds import api
from pal_ds.cli.main import main
from pal_ds.errors import UserError
from pal_ds.heads import PalA, PalB, UserState
from pal_ds.heads.base import Features
from pal_ds.inference.load_run import restore
from pal_ds.inference.posterior_file import POSTERIOR, axes_of, read_posterior, write_posterior
from pal_ds.inference.rewards_at import ByHead, ByPlaces, ByStatistics, table_of
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.adaptation.test_strategies import quadrature

SIZE, NUM_CANDIDATES = 4, 40
TRAIN = [
    "train",
    "--data.source=VectorWorld",
    "--data.source.num_users=12",
    f"--data.source.feature_size={SIZE}",
    "--data.source.comparisons_per_user=40",
    "--data.source.test_comparisons_per_user=1",
    "--data.split=field",
    "--head=PalA",
    "--head.num_prototypes=3",
    "--head.num_layers=1",
    "--head.user_point=Pw",
    "--head.residual=false",
    "--train.ds_config=zero0",
    "--train.batch_pairs=64",
    "--train.epochs=4",
    "--optim.learning_rate=3e-2",
]


def vectors(draw: np.random.Generator) -> dict[str, Any]:
    return {"response_features": draw.standard_normal((2, SIZE)).round(4).tolist()}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on vectors, users with one to six comparisons, and a pool."""
    folder, draw = tmp_path_factory.mktemp("ask"), np.random.default_rng(0)
    main([*TRAIN, f"--data.path={folder / 'data'}", f"--run_dir={folder / 'run'}"])
    lines = [
        {**vectors(draw), "y": int(draw.choice([-1, 1])), "user_id": f"new {user}"}
        for user in range(6)
        for _ in range(user + 1)
    ]
    write_lines(folder / "pairs.jsonl", lines)
    main(words("adapt", folder, f"--pairs={folder / 'pairs.jsonl'}", f"--out={folder / 'users'}"))
    write_lines(folder / "pool.jsonl", [vectors(draw) for _ in range(NUM_CANDIDATES)])
    return folder


def words(command: str, place: Path, *options: object) -> list[str]:
    return [command, f"--run_dir={place / 'run'}", *map(str, options)]


def ask(place: Path, out: Path, *options: object) -> list[dict[str, Any]]:
    given = [str(option).partition("=")[0] for option in options]
    pool = [] if "--candidates" in given else [f"--candidates={place / 'pool.jsonl'}"]
    users = [] if "--users" in given else [f"--users={place / 'users'}"]
    main(words("ask", place, *users, *pool, f"--out={out}", *options))
    return read_lines(out)


def by_user(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    users: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        users.setdefault(line["user_id"], []).append(line)
    return users


def test_the_first_is_the_one_whose_answer_tells_most(place: Path, tmp_path: Path) -> None:
    """Against the head's own rewards and slopes, and quadrature."""
    lines = by_user(ask(place, tmp_path / "out.jsonl", "--num=1"))
    table = UserTable.load(place / "users")
    posterior = read_posterior(place / "users", len(table.ids), 3)
    assert posterior is not None and len(lines) == 6
    head = restore(RunDirectory(place / "run")).model.head
    states = torch.tensor([line["response_features"] for line in read_lines(place / "pool.jsonl")])
    index = torch.arange(2 * NUM_CANDIDATES).view(-1, 2)
    features = Features(states.view(-1, 1, SIZE), index)
    for row, user in enumerate(table.ids):
        point = torch.softmax(table.logits[row], 0).repeat(NUM_CANDIDATES, 1).requires_grad_()
        reward = head.reward(features, UserState(None, None, point))[..., 0]
        margin = reward[:, 1] - reward[:, 0]
        (slope,) = torch.autograd.grad(margin.sum(), point)
        covariance = posterior.covariance[row].expand(NUM_CANDIDATES, -1, -1)
        std = posterior._replace(covariance=covariance).standard_deviation(slope)
        values = margin.detach().tolist(), std.detach().tolist()
        exact = [quadrature(m, s**2)[0] for m, s in zip(*values, strict=True)]
        (line,) = lines[user]
        first = [pair.tolist() for pair in states].index(
            torch.tensor(line["response_features"]).tolist()
        )
        assert exact[first] > 0.85 * max(exact)
        assert line["gain"] == pytest.approx(exact[first], rel=0.3)


@pytest.mark.parametrize("strategy", ["random", "d_optimal", "bald", "thompson"])
def test_each_once_and_the_same_again(place: Path, tmp_path: Path, strategy: str) -> None:
    options = [f"--strategy={strategy}", "--num=15", "--seed=3"]
    lines = ask(place, tmp_path / "out.jsonl", *options)
    assert ask(place, tmp_path / "again.jsonl", *options) == lines
    # Nobody who is asked beside a user matters.
    alone = ask(place, tmp_path / "alone.jsonl", *options, "--user=new 4")
    users = by_user(lines)
    assert len(users) == 6 and [*map(without_gain, alone)] == [*map(without_gain, users["new 4"])]
    for own in users.values():
        assert [line["rank"] for line in own] == list(range(1, 16))
        assert len({json.dumps(line["response_features"]) for line in own}) == 15
    if strategy in ("random", "thompson"):
        orders = {json.dumps([line["response_features"] for line in own]) for own in users.values()}
        assert len(orders) == 6
        assert ask(place, tmp_path / "other.jsonl", *options[:2], "--seed=4") != lines


def without_gain(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "gain"}


def test_an_answered_line_is_read_by_adapt(place: Path, tmp_path: Path) -> None:
    """And what has been answered is worth less afterwards."""
    lines = ask(place, tmp_path / "out.jsonl", "--num=5", "--user=new 0")
    old = [line for line in read_lines(place / "pairs.jsonl") if line["user_id"] == "new 0"]
    pairs = write_lines(tmp_path / "answered.jsonl", [*old, *({**line, "y": 1} for line in lines)])
    users = tmp_path / "users"
    main(words("adapt", place, f"--pairs={pairs}", f"--out={users}"))
    report = json.loads((users / "report.json").read_text())
    assert report["users"]["new 0"]["pairs"] == 6
    before, after = (
        axes_of(read_posterior(folder, count, 3).covariance[:1]).square().sum()  # type: ignore[union-attr]
        for folder, count in ((place / "users", 6), (users, 1))
    )
    assert after < before


def test_lists_answers_and_pools_of_ones_own(place: Path, tmp_path: Path, caplog: Any) -> None:
    draw = np.random.default_rng(5)
    common, own, again = vectors(draw), vectors(draw), vectors(draw)
    several = draw.standard_normal((3, SIZE)).round(4).tolist()
    lines = [
        {**common, "y": -1, "margin": 2.0},
        {"response_features": several, "scores": [1, 1, 3]},
        {**own, "user_id": "new 2"},
        {**again, "user_id": "stranger"},
        {"response_features": common["response_features"][::-1], "tie": True},
    ]
    pool = write_lines(tmp_path / "pool.jsonl", lines)
    asked_lines = ask(place, tmp_path / "out.jsonl", f"--candidates={pool}", "--num=4")
    users = by_user(asked_lines)
    assert {len(of_user) for of_user in users.values()} == {4}
    for user, of_user in users.items():
        features = [line["response_features"] for line in of_user]
        assert (own["response_features"] in features) == (user == "new 2")
        assert all(
            line.keys() == {"response_features", "user_id", "gain", "rank"} for line in of_user
        )
        if user != "new 2":
            expected = [common["response_features"], *([several[i], several[j]] for i, j in PAIRS)]
            assert sorted(features) == sorted(expected)
    assert "1 candidates are for users who are not asked (stranger)" in caplog.text
    assert "1 candidates are there more than once" in caplog.text


@pytest.mark.parametrize("strategy", ["random", "d_optimal", "bald", "thompson"])
def test_who_has_too_few_is_asked_what_there_is(
    place: Path, tmp_path: Path, caplog: Any, strategy: str
) -> None:
    draw = np.random.default_rng(7)
    owners = ["new 1"] * 3 + ["new 2"]
    pool = write_lines(
        tmp_path / "pool.jsonl", [{**vectors(draw), "user_id": owner} for owner in owners]
    )
    options = [f"--candidates={pool}", "--num=3", f"--strategy={strategy}"]
    users = by_user(ask(place, tmp_path / "out.jsonl", *options))
    assert {user: [line["rank"] for line in own] for user, own in users.items()} == {
        "new 1": [1, 2, 3],
        "new 2": [1],
    }
    own = read_lines(pool)[3]["response_features"]
    assert users["new 2"][0]["response_features"] == own
    assert all(np.isfinite(line["gain"]) for lines in users.values() for line in lines)
    assert "--num 3: fewer different candidates for 'new 0' 0, 'new 2' 1, 'new 3' 0" in caplog.text


def test_the_bar_ends_with_the_last_users(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[list[int]] = []

    @contextlib.contextmanager
    def counted(label: str, total: int, **_: object) -> Iterator[Callable[..., None]]:
        bars.append([total, 0, 0])

        def advance(num_units: int = 0, **_: object) -> None:
            bars[-1][1:] = bars[-1][1] + 1, bars[-1][2] + num_units

        yield advance

    monkeypatch.setattr("pal_ds.adaptation.ask.progress_bar", counted)
    # Four users at a time.
    monkeypatch.setattr("pal_ds.adaptation.chooser.FLOATS_AT_ONCE", 4 * 2 * NUM_CANDIDATES * 32)
    ask(place, tmp_path / "out.jsonl", "--num=1")
    assert bars == [[2, 2, 6]]


def test_a_run_on_vectors_scores_no_texts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(SystemExit) as end:
        main(words("score", place, f"--input={texts}", f"--output={tmp_path / 'scores.jsonl'}"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "was trained on vectors, so it reads no texts" in said
    assert "to score texts, train on texts" in said


def test_in_memory(place: Path, tmp_path: Path) -> None:
    pool = read_lines(place / "pool.jsonl")
    lines = api.ask(place / "run", pool, place / "users", tmp_path / "out.jsonl", num=2)
    assert lines == ask(place, tmp_path / "again.jsonl", "--num=2")


PAIRS = ((0, 1), (0, 2), (1, 2))


@pytest.mark.parametrize("user_point", ["Pw", "f(Pw)"])
@pytest.mark.parametrize("similarity", ["distance", "cosine"])
def test_tables_score_as_the_head_does(user_point: Any, similarity: Any) -> None:
    torch.manual_seed(0)
    head = PalA(8, 3, 8, 2, user_point=user_point, similarity=similarity).eval()
    features = Features(torch.randn(5, 4, 8), torch.tensor([[3], [1], [4]]))
    _compare_tables(head, features, ByStatistics if user_point == "Pw" else ByPlaces)


@pytest.mark.parametrize("prompt_position", ["last", "aligned"])
def test_tables_score_as_a_head_of_prompts_does(prompt_position: Any) -> None:
    torch.manual_seed(0)
    head = PalB(8, 3, 8, 2, prompt_position=prompt_position).eval()
    length = 1 if prompt_position == "last" else 4
    features = Features(
        torch.randn(5, 4, 8),
        torch.tensor([[3], [1], [4]]),
        torch.randn(2, length, 8),
        torch.tensor([[0], [1], [0]]),
        torch.full((2,), length),
    )
    _compare_tables(head, features, ByStatistics if prompt_position == "last" else ByHead)


def _compare_tables(head: Any, features: Features, kind: type) -> None:
    last = torch.tensor([3, 0, 2])
    points = torch.softmax(torch.randn(6, 3), 1)
    with torch.no_grad():
        table = table_of(head, [(features, last)] * 2)
        assert isinstance(table, kind)
        rewards = table.at(points)
        for number, point in enumerate(points):
            user = UserState(None, None, point.expand(3, -1))
            own = head.reward(features, user)[:, 0].gather(1, last[:, None])[:, 0]
            torch.testing.assert_close(rewards[number], own.repeat(2), atol=1e-4, rtol=1e-4)


def test_a_posterior_of_another_table_is_refused(place: Path, tmp_path: Path) -> None:
    users = tmp_path / "users"
    shutil.copytree(place / "users", users)
    table = UserTable.load(users)
    with pytest.raises(UserError, match="cannot be read"):
        (users / POSTERIOR).write_bytes((users / POSTERIOR).read_bytes()[:-9])
        read_posterior(users, 6, 3)
    write_posterior(users, torch.zeros(6, 3, 3))
    table.logits.add_(torch.tensor([1.0, 0.0, 0.0]))
    table.save(users)
    with pytest.raises(UserError, match="belongs to another user table"):
        read_posterior(users, 6, 3)
    (users / POSTERIOR).unlink()
    assert read_posterior(users, 6, 3) is None


def test_nothing_is_asked_twice(place: Path, tmp_path: Path) -> None:
    """Neither what a user shares with everyone, either way round, nor of a user who is named twice."""
    pool = [vectors(np.random.default_rng(seed)) for seed in range(3)]
    first, second = pool[0]["response_features"]
    pool += [{**pool[1], "user_id": "new 4"}]
    pool += [{"response_features": [second, first], "user_id": "new 4"}]
    write_lines(tmp_path / "pool.jsonl", pool)
    options = [f"--candidates={tmp_path / 'pool.jsonl'}", "--num=3", "--user=new 4"]
    lines = ask(place, tmp_path / "out.jsonl", *options, "--user=new 4")
    asked = {json.dumps(sorted(line["response_features"])) for line in lines}
    assert [line["rank"] for line in lines] == [1, 2, 3] and len(asked) == 3


def test_pairs_that_count_for_nothing_leave_a_user_unknown(place: Path, tmp_path: Path) -> None:
    """Ties that the loss drops: the posterior is the prior's, and not that of somebody known for sure."""
    draw, run, users = np.random.default_rng(1), tmp_path / "run", tmp_path / "users"
    main([*TRAIN, f"--data.path={place / 'data'}", "--loss.ties=drop", f"--run_dir={run}"])
    ties = [{**vectors(draw), "y": 0, "user_id": "tied"} for _ in range(4)]
    one = {**vectors(draw), "y": 1, "user_id": "sure"}
    pairs = write_lines(tmp_path / "pairs.jsonl", [*ties, one])
    main(["adapt", f"--run_dir={run}", f"--pairs={pairs}", f"--out={users}"])
    table = UserTable.load(users)
    posterior = read_posterior(users, 2, 3)
    assert posterior is not None
    tied, sure = posterior.covariance[table.rows(["tied", "sure"])].diagonal(dim1=1, dim2=2).sum(1)
    assert 0.5 * sure < tied
