"""What a recipe from Python becomes, and what cannot become one."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pal_ds
from pal_ds.backbones.config import BackboneConfig
from pal_ds.config.own_code import source_files
from pal_ds.config.recipe import plain, read
from pal_ds.config.run_config import OptimConfig, RunConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.data.sources import Jsonl
from pal_ds.errors import UserError
from pal_ds.export.bundle_code import own_source
from pal_ds.export.flatten import flatten
from pal_ds.heads import HEADS, Head
from pal_ds.losses import PreferenceLoss

PalA = HEADS["PalA"]
DATA = {"path": "d", "source": {"class_path": "Jsonl", "init_args": {"path": "p.jsonl"}}}


def test_every_name_is_there_and_documented() -> None:
    for name in pal_ds.__all__:
        value = getattr(pal_ds, name)
        assert value.__doc__ and name in dir(pal_ds)
    with pytest.raises(AttributeError):
        pal_ds.nothing  # noqa: B018


def test_dicts_dataclasses_and_files_say_the_same(tmp_path: Path) -> None:
    head = {"class_path": "PalA", "init_args": {"num_prototypes": 3}}
    content = {
        "data": DATA,
        "head": head,
        "backbone": {"path": "b"},
        "optim": {"learning_rate": 0.5},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    whole = RunConfig(
        data=DataConfig(path="d", source=Jsonl("p.jsonl")),
        head=functools.partial(PalA, num_prototypes=3),
        backbone=BackboneConfig(path="b"),
        optim=OptimConfig(learning_rate=0.5),
    )
    parts = {**content, "head": PalA, "optim": OptimConfig(learning_rate=0.5)}
    texts = [
        read(tmp_path / "r.yaml", {})[1],
        read(content, {})[1],
        read(whole, {})[1],
        read(parts, {"head.num_prototypes": 3})[1],
        read([parts, {"head": head}], {})[1],
        read({**content, "optim": {}}, {"optim.learning_rate": 0.5})[1],
    ]
    trees = [yaml.safe_load(text) for text in texts]
    assert all(tree == trees[0] for tree in trees)
    assert trees[0]["optim"]["learning_rate"] == 0.5


def test_shipped_recipes_go_by_name() -> None:
    config, _ = read(["quickstart", "quickstart_pal_b"], {"train.epochs": 7})
    assert config.train.epochs == 7 and isinstance(config.head(8), HEADS["PalB"])


class Keeps(Head):
    """Defined where every process finds it."""


REFUSED = {
    "no file": ("nowhere.yaml", {}, "nowhere.yaml: no such file"),
    "no mapping": ([1], {}, "a int; give a file, a dict or a RunConfig"),
    "a key": ({"data": DATA, "head": PalA}, {"optim.lerning_rate": 1}, "optim.lerning_rate"),
    "an object": ({"data": DATA, "head": PalA}, {"optim": object()}, "cannot be written into"),
    "an argument without its name": (
        {"data": DATA, "head": functools.partial(PalA, 3)},
        {},
        "give the arguments of PalA by name",
    ),
    "both losses": (
        {"data": DATA, "head": PalA, "loss": {"kind": "hinge"}},
        {"loss.shape": {"class_path": "tests.api.test_recipes.Squared"}},
        "Give one of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    recipe, overrides, wanted = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        read(recipe, overrides)
    assert wanted in str(refusal.value), refusal.value


def test_a_class_must_be_importable_elsewhere() -> None:
    class Local(Head):
        """Of this function."""

    with pytest.raises(UserError, match="Put it into a file beside the recipe"):
        plain(Local, "head")
    main = type("Main", (), {"__module__": "__main__"})
    with pytest.raises(UserError, match="no other process finds it"):
        plain(main, "head")
    assert plain(Keeps, "head") == "tests.api.test_recipes.Keeps"


class Squared(pal_ds.MarginLoss):
    """(1 - m)^2."""

    def __call__(self, margin: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return (1 - margin).square()


def test_a_loss_of_ones_own_is_weighted_as_ours() -> None:
    loss = PreferenceLoss(shape=Squared(), token_weighting="mean")
    margin = torch.tensor([[0.5, 2.0, float("nan")]])
    label, start, end = torch.tensor([-1]), torch.tensor([0]), torch.tensor([2])
    assert loss(margin, label, start, end).tolist() == [(1.5**2 + 3.0**2) / 2]
    needed = torch.tensor([1.0])
    assert loss(margin, label, start, end, needed).tolist() == [(2.5**2 + 4.0**2) / 2]
    # Whoever reads log-odds, or solves in closed form, asks for the kind.
    assert loss.kind not in ("logistic", "hinge", "smooth_hinge")


def test_code_is_followed_through_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_head.py").write_text(
        "import json\nfrom pal_ds import Head\nfrom pal_ds.heads.geometry import take\n"
        "from one_helper import (\n    sum as twice,\n)\n\ndef unit(x):\n    # By two.\n    return twice(x)\n\n\n"
        "class One(Head):\n    place = take\n"
    )
    (tmp_path / "one_helper.py").write_text(
        "def sum(x):\n    # Keeps its comments.\n    return 2 * x\n"
    )
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    from one_head import One  # pyright: ignore

    assert set(source_files("one_head")) == {"one_head.py", "one_helper.py"}
    text = flatten(own_source(One))
    assert "import json" in text and "pal_ds import" not in text and "from ." not in text
    # Two modules of one file have a `unit`, and the builtin `sum` stays what it is for the others.
    names: dict[str, Any] = {"__name__": "flat"}
    exec(compile(text, "flat", "exec"), names)
    assert names["unit_2"](4) == 8 and "sum" not in names
    assert torch.equal(names["unit"](torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    assert names["One"].place is names["take"] and names["One"].__mro__[1] is names["Head"]


def test_names_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vague_head.py").write_text(
        "from pal_ds import Head\nfrom pal_ds.heads.geometry import take\n\ndef unit(x):\n    return x\n\n"
        "class One(Head):\n    def f(self, unit):\n        return unit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from vague_head import One  # pyright: ignore

    with pytest.raises(UserError, match=r"vague_head.py:8: unit is a name of this module, too"):
        flatten(own_source(One))


@pytest.mark.parametrize("line", ["import pal_ds", "from pal_ds.data.records import Record"])
def test_an_exported_head_stands_without_pal_ds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    name = f"bound_head_{len(line)}"
    (tmp_path / f"{name}.py").write_text(
        f"{line}\nfrom pal_ds import Head\nclass One(Head):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(name)
    with pytest.raises(UserError) as refusal:
        flatten(own_source(module.One))
    assert f"{name}.py:1: `{line}`" in str(refusal.value)


def test_messages_name_arguments_where_commands_have_options() -> None:
    from pal_ds.api.run import for_people

    with (
        pytest.raises(UserError, match=r"^users and group: type `pal-ds score --users U`$"),
        for_people(),
    ):
        raise UserError("--users and --group: type `pal-ds score --users U`")


def test_what_is_written_from_python_is_not_for_everyone_to_change(tmp_path: Path) -> None:
    """A container's umask is often 0, and readers refuse what anyone may have written."""
    lines = [
        '{"user_id": "a", "prompt_features": [0, 0], "response_features": [[1, 0], [0, 1]], "y": 1}'
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines * 4))
    umask = os.umask(0)
    try:
        source = {"class_path": "Jsonl", "init_args": {"path": str(tmp_path / "p.jsonl")}}
        data = pal_ds.prepare({"data": {"path": str(tmp_path / "d"), "source": source}})
        assert os.umask(0) == 0, "the process keeps its own"
    finally:
        os.umask(umask)
    assert not any(path.stat().st_mode & 0o002 for path in (data.path, *data.path.iterdir()))
