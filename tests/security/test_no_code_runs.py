"""Ways to run code by what somebody hands over: none runs without the person's flag, each is refused in one message."""

import contextlib
import re
import sys

import numpy as np
import pytest
import yaml

from pal_ds.cli.main import main
from pal_ds.data.sources.embeddings import Embeddings
from pal_ds.errors import UserError
from pal_ds.feature_cache.shards import DamagedShardError, shard_name, verify_shard
from pal_ds.reward_models import load_reward_model
from tests.security.attacks import (
    ATTACKS,
    FUNCTIONS,
    RECIPES,
    RUNS,
    Attack,
    code_of_its_own,
    prepare,
    reading,
    said_by,
)
from tests.security.stranger import Pickled, Stranger

REASONS = {
    "recipes": (
        "is no head, source or loss|is no class that pal_ds ships|a function that returns|import path format"
        "|must be of type (int|str)|only a person may say it|asks for code of a|contains custom code|not valid YAML"
        "|scripts are no longer supported|pickles .* are refused|is no key of a recipe"
    ),
    "runs": (
        "this run asks for code beyond pal_ds's own: [\\w.]+|contains custom code|not valid YAML"
        "|names (posix.mkdir|builtins.bytearray), which no checkpoint|an instruction FRAME"
    ),
    "others": (
        "is a class of its own|which is no code of this folder|not listed in export.json|export.json says"
        "|which is code elsewhere|no user table, or a damaged|holds? posix.mkdir|lists no safetensors"
        "|no backbone .stranger"
    ),
}
"""What a refusal may say; any other message would be of a mistake in the attack."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    words = ATTACKS[attack](stranger)
    code, said = said_by(words, capsys)
    assert not stranger.mark.exists(), f"it ran: {said}"
    assert stranger.name not in sys.modules
    assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said, said
    group = "recipes" if attack in RECIPES else "runs" if attack in RUNS else "others"
    assert re.search(REASONS[group], said), said


def test_there_are_forty() -> None:
    assert len(ATTACKS) >= 40, len(ATTACKS)


FLAGGED: dict[str, Attack] = {
    name: ATTACKS[name]
    for name in (
        "head from beside the recipe",
        "loss from beside the recipe",
        "a backbone's code",
        "evaluate of a run with code of its own",
        "users of a run with code of its own",
        "a run's backbone",
    )
}


@pytest.mark.parametrize("attack", FLAGGED)
def test_the_flag_is_what_lets_it_run(attack: str, stranger: Stranger) -> None:
    """Else those above could be refused for another reason, or leave no mark when they run."""
    words = [str(word) for word in FLAGGED[attack](stranger)]
    with contextlib.suppress(SystemExit, Exception):
        main([*words, "--trust_code"])
    assert stranger.mark.exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_flag_makes_no_function_a_head(
    name: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is named must be a class of the right kind, whoever allows it; so where it is a person's own word."""
    recipe = stranger.recipe(head=stranger.call(name))
    for words in (["--trust_code"], ["--head", name], [f"--head.class_path={name}"]):
        code, said = said_by(prepare("--config", recipe, *words), capsys)
        assert code == 2 and not stranger.mark.exists(), said
    run = stranger.run(head=stranger.call(name))
    code, said = said_by([*reading("evaluate", stranger, run), "--trust_code"], capsys)
    assert code == 2 and not stranger.mark.exists(), said


OTHER_KINDS = {
    "a loss as a head": {"head": "{}.Loss"},
    "a source as a loss": {"loss": {"shape": "{}.Votes"}},
    "a head as a source": {"data": {"source": "{}.Head"}},
    "a class of another kind": {"head": "{}.Path"},
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_a_class_of_another_kind_is_never_made(
    case: str, stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    name = stranger.module()
    keys = yaml.safe_load(yaml.safe_dump(OTHER_KINDS[case]).replace("{}", name))
    recipe = stranger.recipe(**keys)
    code, said = said_by(prepare("--config", recipe, "--trust_code"), capsys)
    assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said, said


def test_what_the_command_line_names_is_the_persons_own_choice(stranger: Stranger) -> None:
    """A class that is given as an option needs no flag, and allows nothing else."""
    stranger.module()
    recipe = stranger.recipe(backbone={"path": str(stranger.source / "run" / "base")})
    main(["plan", "--num_gpus=1", f"--config={recipe}", f"--head={stranger.name}.Head"])
    assert stranger.mark.exists()
    other = Stranger(stranger.folder, stranger.name + "_other", stranger.source)
    recipe = stranger.recipe(loss={"shape": f"{other.module()}.Loss"})
    with pytest.raises(SystemExit):
        main(["plan", "--num_gpus=1", f"--config={recipe}", f"--head={stranger.name}.Head"])
    assert other.name not in sys.modules


@pytest.mark.parametrize(
    "option", ["--data.source.init_args.path={}.jsonl", "--data.source.path={}.jsonl"]
)
def test_the_name_of_a_file_allows_no_module_of_that_name(
    stranger: Stranger, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """`data.jsonl` is no leave to import a stranger's `data.py`."""
    recipe = stranger.recipe(head={"class_path": f"{stranger.module()}.Head"})
    code, said = said_by(prepare("--config", recipe, option.format(stranger.name)), capsys)
    assert code == 2 and "is no class that pal_ds ships" in said, said
    assert not stranger.mark.exists() and stranger.name not in sys.modules


def test_a_source_is_not_built_to_read_a_run(stranger: Stranger) -> None:
    """The run has read its data already: whoever reads the run has no use for where they came from."""
    stranger.module(stranger.copy("run") / "code")
    source = {"class_path": f"{stranger.name}.Votes", "init_args": {"path": "x"}}
    run = stranger.run(data={"source": source})
    main([str(word) for word in reading("evaluate", stranger, run)])
    assert not stranger.mark.exists() and stranger.name not in sys.modules


def test_modules_of_a_strangers_folder_are_not_found(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries look for optional packages: one beside a recipe, or in a run, is none of them."""
    stranger.module()
    said_by(prepare("--config", stranger.recipe(head="os.system")), capsys)
    stranger.module(stranger.copy("run") / "code")
    said_by(reading("evaluate", stranger, stranger.run(head="os.system")), capsys)
    assert str(stranger.folder) not in sys.path and not any("run/code" in p for p in sys.path)


def test_from_python(stranger: Stranger) -> None:
    """`load_reward_model` keeps what its docstring promises."""
    run = code_of_its_own(stranger)
    with pytest.raises(UserError, match="trust_code=True in Python"):
        load_reward_model(run)
    assert not stranger.mark.exists()
    load_reward_model(run, trust_code=True)
    assert stranger.mark.exists()


def test_a_pickle_is_no_state_of_a_cache(stranger: Stranger) -> None:
    """Though it has the name that its content asks for: the text is encoded again."""
    shard = stranger.folder / shard_name(stranger.pickled)
    shard.write_bytes(stranger.pickled)
    with pytest.raises(DamagedShardError, match="is no safetensors file"):
        verify_shard(shard, lambda: None)
    shard = stranger.folder / "x.npy"
    np.save(shard, np.array([Pickled(stranger.mark)], dtype=object), allow_pickle=True)
    shard.with_suffix(".ids.json").write_text('["a"]')
    with pytest.raises(UserError):
        Embeddings(str(shard))["a"]
    assert not stranger.mark.exists()
