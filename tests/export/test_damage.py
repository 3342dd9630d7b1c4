"""An exported folder that is not what was written is refused when it is opened, by pal_ds and by its own code."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pal_ds.errors import UserError
from pal_ds.export import contents
from pal_ds.export.contents import verify_export, write_facts
from pal_ds.reward_models import load_reward_model
from tests.artefacts.test_read import HERE
from tests.warm import WarmParent

DAMAGES = ("cut", "a byte less", "a bit", "missing", "another's")


@pytest.fixture(scope="module")
def exports(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two exports of one run, for different mixtures, and one of another step."""
    from pal_ds.cli.main import main

    folder = tmp_path_factory.mktemp("exports")
    made = warm("tests.engine.kills:train", folder, "run", {"save_every": 1, "stop_after": 2}, 1)
    assert made["codes"] == [0], made["said"]
    run = str(folder / "run")
    main(["consolidate", run, str(folder / "one"), "--mixture=1,0,0"])
    main(["consolidate", run, str(folder / "two"), "--mixture=0,1,0", "--step=1"])
    return folder


@pytest.fixture(autouse=True)
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(contents.MARKS_VARIABLE, str(tmp_path / "marks"))
    return tmp_path / "marks" / "exports"


@pytest.fixture
def export(exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports / "one", tmp_path / "one"))


def damage(file: Path, kind: str, other: Path) -> bool:
    """Damages a file; returns whether it is another than before."""
    before = file.read_bytes()
    content = bytearray(before)
    if kind == "cut":
        file.write_bytes(before[: len(before) // 2])
    elif kind == "a byte less":
        file.write_bytes(before[:-1])
    elif kind == "missing":
        file.unlink()
        return True
    elif kind == "another's":
        shutil.copy(other / file.name, file)
    else:
        content[len(content) * 2 // 3] ^= 4
        file.write_bytes(content)
    return file.read_bytes() != before


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_of_an_export(exports: Path, tmp_path: Path, kind: str) -> None:
    """Damage of any of them is found at opening, before and after it was found to be sound once."""
    names = sorted(path.name for path in (exports / "one").iterdir())
    assert {"model.safetensors", "config.json", "modeling_pal.py", "export.json"} <= set(names)
    num_damaged = 0
    for name in set(names) - {contents.CARD}:
        folder = Path(shutil.copytree(exports / "one", tmp_path / name))
        verify_export(folder)
        if damage(folder / name, kind, exports / "two"):
            num_damaged += 1
            with pytest.raises(UserError) as refused:
                load_reward_model(folder)
            assert str(folder) in str(refused.value)
        shutil.rmtree(folder)
    # Of two exports of one version the code and the tokenizer are the same.
    assert num_damaged >= (2 if kind == "another's" else len(names) - 1)


def test_a_card_may_be_edited(export: Path) -> None:
    (export / contents.CARD).write_text("# Mine\n")
    verify_export(export, whole=True)


def test_bits_of_the_listing(export: Path) -> None:
    """export.json has nobody else to vouch for it: no bit of it goes unnoticed; a fifth is tried."""
    file = export / "export.json"
    before = file.read_bytes()
    for place in range(0, len(before), 5):
        content = bytearray(before)
        content[place] ^= 1 << place % 7
        file.write_bytes(content)
        with pytest.raises(UserError, match="export"):
            contents.read_facts(export)


def test_hashes_are_taken_once_and_on_request(
    export: Path, monkeypatch: pytest.MonkeyPatch, marks: Path
) -> None:
    hashed: list[str] = []
    real = contents.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(contents, "sha256_of", counted)
    verify_export(export)
    first = len(hashed)
    assert "model.safetensors" in hashed and len(list(marks.iterdir())) == 1
    verify_export(export)
    assert len(hashed) == first
    verify_export(export, whole=True)
    assert len(hashed) == 2 * first
    # A file that was written anew has another time, if not another inode.
    weights = export / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    verify_export(export)
    assert len(hashed) == 3 * first
    # Marks that others may write say nothing.
    marks.chmod(0o777)
    verify_export(export)
    assert len(hashed) == 4 * first


def test_a_place_that_cannot_be_written_is_no_obstacle(
    export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(contents.MARKS_VARIABLE, str(tmp_path / "file"))
    verify_export(export)
    verify_export(export)


def test_an_export_of_an_earlier_version_is_verified_by_its_hashes(tmp_path: Path) -> None:
    """It has neither sizes nor a checksum."""
    folder = Path(shutil.copytree(HERE / "kept" / "exported" / "pal_a", tmp_path / "kept"))
    assert "sizes" not in verify_export(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(UserError, match=r"model\.safetensors: its content does not match the hash"):
        load_reward_model(folder)


def rewritten(export: Path, change: str) -> Path:
    """The export with other tensors, and a listing that agrees: nothing but their names can tell."""
    weights = export / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.startswith("head."))
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["backbone.extra.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name].flatten()[:-1].clone()
    save_file(tensors, weights, {"format": "pt"})
    facts = json.loads((export / "export.json").read_text())
    write_facts(
        export, {k: v for k, v in facts.items() if k not in ("checksum", "sizes", "sha256")}
    )
    return export


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
@pytest.mark.parametrize("own_code", [False, True])
def test_tensors_are_those_of_the_model(export: Path, change: str, own_code: bool) -> None:
    """Else transformers would fill the gap with random numbers, and score."""
    with pytest.raises(
        UserError,
        match=r"one: cannot be read \((head.* this tensor is (missing|of)|backbone.* is no part)",
    ):
        load_reward_model(rewritten(export, change), trust_remote_code=own_code)


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
def test_by_transformers_alone(
    export: Path, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's own code says so as well."""
    AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"this tensor is (missing|no part|of another shape)"):
        AutoModelForSequenceClassification.from_pretrained(
            rewritten(export, change), trust_remote_code=True
        )
