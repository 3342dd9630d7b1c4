"""`ask` and scores with standard deviations: pools, users and numbers that are none."""

import json
import shutil
from pathlib import Path

import pytest

from pal_ds.cli.main import main
from pal_ds.errors import UserError
from pal_ds.inference.posterior_file import known_posterior
from tests.bad_input.conftest import Place, Refused


@pytest.fixture(scope="module")
def users(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("asked") / "users"
    main(["adapt", f"--run_dir={place.run}", f"--pairs={place.pairs}", f"--out={out}"])
    return out


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool.jsonl"
    pair = {"prompt": "Tell me about tea.", "response_1": "Tea is fine.", "response_2": "No."}
    path.write_text(json.dumps(pair) + "\n")
    return path


def words(place: Place, users: Path, pool: Path, *options: str) -> list[object]:
    out = pool.parent / "out.jsonl"
    given = [f"--users={users}", f"--candidates={pool}", f"--out={out}", "--num=1"]
    return [
        "ask",
        f"--run_dir={place.run}",
        *given[: 3 if "--num" in str(options) else 4],
        *options,
    ]


def test_numbers_users_and_places(place: Place, refused: Refused, users: Path, pool: Path) -> None:
    assert "--num is 0; it must be at least 1" in refused(*words(place, users, pool, "--num=0"))
    said = refused(*words(place, users, pool, "--user=nobody"))
    assert f"--user nobody: not among the 3 users of {users}. Fit this user with" in said
    said = refused(*words(place, pool.parent / "nowhere", pool))
    assert "nowhere/users.safetensors is missing" in said
    said = refused(*words(place, users, pool, "--strategy=best"))
    assert "best" in said and "thompson" in said
    kept = pool.read_bytes()
    said = refused(*words(place, users, pool)[:-2], f"--out={pool}", "--num=1")
    assert f"--out {pool}: is one of the --candidates" in said and pool.read_bytes() == kept
    missing = pool.parent / "none.jsonl"
    assert f"{missing}: no such file" in refused(*words(place, users, missing))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "holds no record"),
        ('{"prompt": "a", "response_1": "b"}\n', ":1: missing key"),
        ('{"prompt": "a", "responses": ["b"]}\n', ":1: 'responses' must be a list of two or more"),
        ('{"prompt": "a", "response_1": "b", "response_2": "b"}\n', "identical 1"),
        ("[1, 2]\n", ":1: expected an object"),
        ('{"response_features": [[0.1], [0.2]]}\n', "pool.jsonl: holds vectors, and the run was"),
        (
            '{"prompt": "a", "response_1": "b", "response_2": "c", "user_id": "stranger"}\n',
            "all are for users who are not asked (stranger)",
        ),
    ],
)
def test_pools(
    place: Place, refused: Refused, users: Path, pool: Path, text: str, message: str
) -> None:
    pool.write_text(text)
    assert message in refused(*words(place, users, pool))


def test_users_without_a_posterior(
    place: Place, refused: Refused, users: Path, pool: Path, tmp_path: Path
) -> None:
    """As an older version left them, or beside another table's posterior."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Tell me about tea.", "response": "Fine."}) + "\n")
    score = ["score", f"--run_dir={place.run}", f"--input={texts}"]
    old = tmp_path / "old"
    shutil.copytree(users, old)
    (old / "posterior.safetensors").unlink()
    assert f"ask: {old} holds no posterior.safetensors" in refused(*words(place, old, pool))
    of_old = [f"--users={old}", "--user=u1"]
    assert f"{old} holds no posterior.safetensors" in refused(*score, *of_old, "--std")
    (old / "posterior.safetensors").write_bytes(b"nonsense")
    assert "no posterior of a user table, or a damaged one" in refused(*words(place, old, pool))
    assert "nothing says how sure this user is. Give --users" in refused(*score, "--std")
    said = refused(*score, f"--users={users}", "--user=u1", "--pessimism=-1")
    assert "--pessimism is -1.0; it must be a finite number, 0 or more" in said
    with pytest.raises(UserError, match="how sure user 'alice' is, who is not among the 3 users"):
        known_posterior(users, "--std")(["alice"])
    said = refused("few_shot", f"--run_dir={place.run}", "--strategy=bald,bald")
    assert "--strategy bald,bald: names one of them twice" in said
    said = refused("few_shot", f"--run_dir={place.run}", "--strategy=best")
    assert "--strategy best: must be of random, d_optimal, bald, thompson" in said
