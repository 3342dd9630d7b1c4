"""The attacks: each a function of `Stranger` that prepares it, and returns the command line of the person attacked."""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pal_ds.cli.main import main
from tests.security.stranger import Pickled, Stranger

Words = list[object]
Attack = Callable[[Stranger], Words]
FUNCTIONS = (
    "os.system",
    "os.mkdir",
    "subprocess.check_output",
    "subprocess.Popen",
    "runpy.run_path",
    "timeit.timeit",
    "builtins.exec",
    "pal_ds.cli.main.main",
    "pal_ds.io.files.write_atomically",
)


def prepare(*words: object) -> Words:
    return ["prepare", *words]


RECIPES: dict[str, Attack] = {
    **{
        f"head {name}": lambda s, name=name: prepare("--config", s.recipe(head=s.call(name)))
        for name in FUNCTIONS
    },
    "head by name alone": lambda s: prepare("--config", s.recipe(head="os.mkdir")),
    "head from beside the recipe": lambda s: prepare(
        "--config", s.recipe(head=f"{s.module()}.Head")
    ),
    "head from a folder's module": lambda s: [
        "plan",
        "--num_gpus=1",
        "--config",
        s.recipe(head={"class_path": f"{s.module()}.Head"}, backbone={"path": "x"}),
    ],
    "head by a module that acts when imported": lambda s: prepare(
        "--config", s.recipe(head="antigravity.fly")
    ),
    "a function of ours": lambda s: prepare(
        "--config", s.recipe(head="pal_ds.heads.pal_reference.head_from_reference")
    ),
    "what a module of ours imports": lambda s: prepare(
        "--config", s.recipe(head={"class_path": "pal_ds.heads.base.nn.Linear"})
    ),
    "source": lambda s: prepare("--config", s.recipe(data={"source": s.call("os.mkdir")})),
    "source from beside the recipe": lambda s: prepare(
        "--config", s.recipe(data={"source": {"class_path": f"{s.module()}.Votes"}})
    ),
    "in a source's argument": lambda s: prepare(
        "--config",
        s.recipe(
            data={"source": {"class_path": "Jsonl", "init_args": {"path": s.call("os.mkdir")}}}
        ),
    ),
    "in a head's argument": lambda s: prepare(
        "--config",
        s.recipe(head={"class_path": "PalA", "init_args": {"num_prototypes": s.call("os.system")}}),
    ),
    "loss": lambda s: prepare("--config", s.recipe(loss={"shape": s.call("os.mkdir")})),
    "loss from beside the recipe": lambda s: prepare(
        "--config", s.recipe(loss={"shape": f"{s.module()}.Loss"})
    ),
    "another recipe in it": lambda s: prepare(
        "--config", s.recipe(config=str(s.recipe("more.yaml", head=s.call("os.system"))))
    ),
    "a file in a class's place": lambda s: prepare("--config", s.recipe(head=_file_of(s))),
    "a file in a group's place": lambda s: prepare("--config", s.recipe(loss=_group_of(s))),
    "YAML of Python objects": lambda s: prepare("--config", _tagged(s.folder / "r.yaml", s)),
    "the flag in the file": lambda s: prepare(
        "--config", s.recipe(head=f"{s.module()}.Head", trust_code=True)
    ),
    "trust in the file": lambda s: [
        *("train", "--run_dir", s.folder / "new", "--config"),
        s.recipe(trust_checkpoint=True),
    ],
    "a method of a suite": lambda s: [
        *("compare", "--out", "out", "--config"),
        s.recipe(head=None, methods={"mine": {"head": s.call("os.system")}}),
    ],
    "a method's head beside the suite": lambda s: [
        *("compare", "--out", "out", "--config"),
        s.recipe(head=None, methods={"mine": {"head": f"{s.module()}.Head"}}),
    ],
    "a method's backbone": lambda s: [
        *("compare", "--out", "out", "--config"),
        s.recipe(
            head=None,
            methods={
                "mine": {
                    "head": "PalA",
                    "backbone": {"path": str(s.model_folder()), "trust_remote_code": True},
                }
            },
        ),
    ],
    "a backbone's code": lambda s: [
        *("plan", "--num_gpus=1", "--config"),
        s.recipe(backbone={"path": str(s.model_folder()), "trust_remote_code": True}),
    ],
    "a backbone's code, unasked": lambda s: [
        *("plan", "--num_gpus=1", "--config"),
        s.recipe(backbone={"path": str(s.model_folder())}),
    ],
    "a tokenizer's code": lambda s: prepare(
        "--config",
        s.recipe(data={"tokenizer": str(s.model_folder()), "trust_remote_code": True}),
    ),
    "a tokenizer's code, unasked": lambda s: prepare(
        "--config", _with_pairs(s, s.recipe(data={"tokenizer": str(s.model_folder())}))
    ),
    "a data set's script": lambda s: prepare("--config", _with_script(s)),
    "pickled vectors": lambda s: prepare("--config", _with_vectors(s)),
    "a job's recipe": lambda s: [
        *("submit", "train", s.recipe(head=s.call("os.system"))),
        *("--gpus_per_node=0", "--dry_run"),
    ],
    "a job's recipe for embed": lambda s: [
        *("submit", "embed", s.recipe(head=f"{s.module()}.Head", backbone={"cache": "-delete"})),
        *("--gpus_per_node=0", "--dry_run"),
    ],
}


def _file_of(stranger: Stranger) -> str:
    path = stranger.folder / "head.yaml"
    path.write_text(yaml.safe_dump(stranger.call("os.mkdir")))
    return str(path)


def _group_of(stranger: Stranger) -> str:
    path = stranger.folder / "loss.yaml"
    path.write_text(yaml.safe_dump({"shape": f"{stranger.module()}.Loss"}))
    return str(path)


def _tagged(path: Path, stranger: Stranger) -> Path:
    path.write_text(f"head: !!python/object/apply:os.mkdir ['{stranger.mark}']\n")
    return path


def _with_pairs(stranger: Stranger, recipe: Path) -> Path:
    shutil.copy(stranger.source / "pairs.jsonl", stranger.folder / "pairs.jsonl")
    return recipe


def _with_script(stranger: Stranger) -> Path:
    name = stranger.module()
    source = {"class_path": "HuggingFace", "init_args": {"path": f"{stranger.folder}/{name}.py"}}
    return stranger.recipe(data={"source": source})


def _with_vectors(stranger: Stranger) -> Path:
    path = stranger.folder / "vectors.pt"
    path.write_bytes(stranger.pickled)
    names = ("images", "blue_images", "red_images", "captions")
    source = {
        "class_path": "PickAFilter",
        "init_args": dict.fromkeys(names, str(path)) | {"path": str(stranger.folder)},
    }
    return stranger.recipe(data={"source": source})


def reading(command: str, stranger: Stranger, run: Path) -> Words:
    """The command line that reads a run in some way."""
    out = stranger.folder / "out"
    return {
        "users": ["users", "--list", "--run_dir", run],
        "users --remove": ["users", "--remove=u0", "--run_dir", run],
        "report": ["report", "--run_dirs", f"[{run}]", "--out", out],
        "evaluate": ["evaluate", "--run_dir", run, "--split=train"],
        "few_shot": ["few_shot", "--run_dir", run],
        "adapt": ["adapt", "--run_dir", run, "--split=train", "--out", out],
        "ask": [
            *("ask", "--run_dir", run, "--users", out, "--out", out),
            *("--candidates", stranger.texts()),
        ],
        "score": ["score", "--run_dir", run, "--input", stranger.texts()],
        "consolidate": ["consolidate", run, out],
        "retention": ["retention", run, run, "test"],
        "reshard": ["reshard", run, "--world_size=2"],
        "init_from": [
            *("train", "--run_dir", out, "--head=PalA", f"--data.path={stranger.source / 'data'}"),
            *(f"--train.init_from={run}", "--train.ds_config=zero0"),
        ],
    }[command]


READING = (
    "users",
    "report",
    "evaluate",
    "few_shot",
    "adapt",
    "ask",
    "score",
    "consolidate",
    "init_from",
)
RUNS: dict[str, Attack] = {
    **{
        f"{command} of a run with os.system": lambda s, command=command: reading(
            command, s, s.run(head=s.call("os.system"))
        )
        for command in READING
    },
    **{
        f"{command} of a run with code of its own": lambda s, command=command: reading(
            command, s, code_of_its_own(s)
        )
        for command in READING
    },
    "a run's loss": lambda s: reading(
        "evaluate", s, s.run(loss={"shape": f"{s.module()}.Loss", "kind": "logistic"})
    ),
    "a run's backbone": lambda s: reading("evaluate", s, _with_base(s, trust_remote_code=True)),
    "a run's backbone, unasked": lambda s: reading("evaluate", s, _with_base(s)),
    "a run's tokenizer": lambda s: reading("score", s, s.run(data={"trust_remote_code": True})),
    "YAML of Python objects in a run": lambda s: reading("evaluate", s, _tagged_run(s)),
    "a pickle in a shard": lambda s: reading("evaluate", s, s.shard(s.pickled)),
    "a pickle that exports": lambda s: reading("consolidate", s, s.shard(s.pickled)),
    "a pickle of another protocol": lambda s: reading(
        "evaluate", s, s.shard(pickle.dumps(Pickled(s.mark), protocol=4))
    ),
    "8 GB in a shard": lambda s: reading(
        "evaluate",
        s,
        s.shard(
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x05"
            + (8 * 10**9).to_bytes(5, "little")
            + b"\x85R."
        ),
    ),
}


def code_of_its_own(stranger: Stranger) -> Path:
    run = stranger.copy("run")
    stranger.module(run / "code")
    head = {"class_path": f"{stranger.name}.Head", "init_args": {"num_prototypes": 3}}
    return stranger.run(head=head)


def _with_base(stranger: Stranger, **backbone: Any) -> Path:
    run = stranger.copy("run")
    shutil.rmtree(run / "base")
    shutil.copytree(stranger.model_folder(), run / "base")
    return stranger.run(backbone=backbone)


def _tagged_run(stranger: Stranger) -> Path:
    run = stranger.copy("run")
    _tagged(run / "config.yaml", stranger)
    return run


def score(folder: Path, stranger: Stranger, *words: object) -> Words:
    return ["score", "--model", folder, "--input", stranger.texts(), *words]


TRUSTED = "--trust_remote_code"
OTHERS: dict[str, Attack] = {
    "an export's head": lambda s: score(s.export(head={"name": "os.system", "init": {}}), s),
    "an export's head of a module": lambda s: score(
        s.export(head={"name": f"{s.module()}.Head", "init": {}}), s
    ),
    "an export's auto_map to another repository": lambda s: score(
        s.export(auto_map={"AutoConfig": "stranger/code--modeling.Config"}), s, TRUSTED
    ),
    "an export's auto_map to a file of no listing": lambda s: score(
        _added(s, s.export(auto_map={"AutoConfig": f"{s.name}.Config"}), f"{s.name}.py"), s, TRUSTED
    ),
    "an export's code, changed": lambda s: score(_changed(s, "modeling_pal.py"), s, TRUSTED),
    "an export's code, added": lambda s: score(_added(s, s.copy("export"), "torchx.py"), s),
    "an export's backbone": lambda s: score(s.export(text_config={"model_type": "stranger"}), s),
    "an export's kernels": lambda s: score(
        s.export(attn_implementation="stranger/kernels", _attn_implementation="stranger/kernels"), s
    ),
    "an export's tokenizer": lambda s: score(_with_tokenizer(s), s),
    "pickled weights beside an export's": lambda s: score(
        _added(s, s.copy("export"), "pytorch_model.bin"), s
    ),
    "pickled weights in their place": lambda s: score(_with_pickled_weights(s), s),
    "an adapter that an export does not list": lambda s: score(
        _added(s, s.copy("export"), "adapter_config.json"), s
    ),
    "an export to start from": lambda s: [
        *("train", "--run_dir", "new", "--head=PalA", f"--data.path={s.source / 'data'}"),
        f"--train.init_from={_changed(s, 'config.json')}",
    ],
    "a pickled user table": lambda s: [
        *("evaluate", "--run_dir", s.copy("run"), "--split=train"),
        *("--users", _pickled(s, s.copy("users"), "users.safetensors")),
    ],
    "a pickled list of users": lambda s: [
        *("evaluate", "--run_dir", s.copy("run"), "--split=train"),
        *("--users", _pickled(s, s.copy("users"), "users.arrow")),
    ],
    "a pickled reference checkpoint": lambda s: [
        *("import-reference", _archive(s), "out", "--config", s.recipe()),
        *("--backbone", s.source / "run" / "base"),
    ],
    "a backbone's pickled weights": lambda s: [
        *("embed", "--head=PalA", f"--data.path={s.source / 'data'}", "--backbone.cache=cache"),
        *("--backbone.tuning=frozen", f"--backbone.path={_pickled_weights(s)}"),
        "--train.ds_config=zero0",
    ],
}


def _added(stranger: Stranger, export: Path, name: str) -> Path:
    text = stranger.module() + ".py"
    content = (stranger.folder / text).read_bytes() if name.endswith(".py") else stranger.pickled
    (export / name).write_bytes(b"{}" if name.endswith(".json") else content)
    return export


def _changed(stranger: Stranger, name: str) -> Path:
    export = stranger.copy("export")
    text = (stranger.folder / f"{stranger.module()}.py").read_text()
    content = (export / name).read_text()
    (export / name).write_text(text + content if name.endswith(".py") else content + "\n")
    return export


def _with_tokenizer(stranger: Stranger) -> Path:
    export = stranger.copy("export")
    model = stranger.model_folder()
    for name in ("tokenizer_config.json", f"{stranger.name}.py"):
        shutil.copy(model / name, export / name)
    return stranger.signed(export)


def _with_pickled_weights(stranger: Stranger) -> Path:
    export = stranger.copy("export")
    (export / "model.safetensors").unlink()
    (export / "pytorch_model.bin").write_bytes(stranger.pickled)
    return stranger.signed(export)


def _pickled(stranger: Stranger, folder: Path, name: str) -> Path:
    (folder / name).write_bytes(stranger.pickled)
    return folder


def _archive(stranger: Stranger) -> Path:
    path = stranger.folder / "best.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", stranger.pickled)
        archive.writestr("x/version", "3\n")
    return path


def _pickled_weights(stranger: Stranger) -> Path:
    folder = stranger.folder / "backbone"
    folder.mkdir()
    shutil.copy(stranger.source / "run" / "base" / "config.json", folder / "config.json")
    torch.save({"x": Pickled(stranger.mark)}, folder / "pytorch_model.bin")
    return folder


ATTACKS = RECIPES | RUNS | OTHERS


def said_by(words: Words, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """(exit code, what stderr holds beside progress) of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code, capsys.readouterr().err
