"""What a stranger may hand over, each with code in it that leaves a mark when it runs."""

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pal_ds.engine.checkpoint.manifest import entry_of, write_manifest
from pal_ds.export.contents import write_facts
from pal_ds.runs.run_dir import RunDirectory

MODULE = '''from pathlib import Path

Path({mark!r}).mkdir(exist_ok=True)

from pal_ds.data.sources import Jsonl
from pal_ds.heads import BradleyTerry, PalA
from pal_ds.losses import MarginLoss


class Head(PalA):
    """An honest head in a module that is not."""


class Votes(Jsonl):
    """A source."""


class Loss(MarginLoss):
    """A loss."""

    def __call__(self, margin):
        return -margin
'''
REMOTE = """from pathlib import Path

Path({mark!r}).mkdir(exist_ok=True)

from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast


class Config(GPT2Config):
    model_type = "stranger"


class Model(GPT2Model):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Pickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@dataclass
class Stranger:
    """A folder of things to attack with: a recipe, a run, an export and a user table, all copies."""

    folder: Path
    name: str
    """Name of the stranger's module, of its own for each test, as Python keeps what it has imported."""
    source: Path
    """Where the honest ones lie."""

    @property
    def mark(self) -> Path:
        """There once something has run."""
        return self.folder / "ran"

    @property
    def pickled(self) -> bytes:
        return pickle.dumps({"x": Pickled(self.mark)}, protocol=2)

    def module(self, folder: Path | None = None, text: str = MODULE) -> str:
        """Writes the module into a folder; returns its name."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.py").write_text(text.format(mark=str(self.mark)))
        return self.name

    def call(self, function: str) -> dict[str, Any]:
        """A class path with the arguments by which this function leaves the mark."""
        path = str(self.mark)
        arguments: dict[str, Any] = {
            "os.system": {"command": f"mkdir {path}"},
            "os.mkdir": {"path": path},
            "subprocess.check_output": {"args": ["mkdir", path]},
            "subprocess.Popen": {"args": ["mkdir", path]},
            "runpy.run_path": {"path_name": str(self.folder / f"{self.module()}.py")},
            "timeit.timeit": {"stmt": f"import os; os.mkdir({path!r})", "number": 1},
            "builtins.exec": {"source": f"import os; os.mkdir({path!r})"},
            "pal_ds.cli.main.main": {"arguments": ["prepare"]},
            "pal_ds.io.files.write_atomically": {"path": path, "text": "x"},
        }
        return {"class_path": function, "init_args": arguments.get(function, {})}

    def recipe(self, name: str = "recipe.yaml", **keys: Any) -> Path:
        """An honest recipe with some keys laid over it."""
        (self.folder / "pairs.jsonl").write_text("")
        source = {"class_path": "Jsonl", "init_args": {"path": "pairs.jsonl"}}
        content: dict[str, Any] = {"data": {"path": "data", "source": source}, "head": "PalA"}
        for key, value in keys.items():
            if isinstance(value, dict) and isinstance(content.get(key), dict):
                content[key] = {**content[key], **value}
            else:
                content[key] = value
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return path

    def model_folder(self, *, code: bool = True, **config: Any) -> Path:
        """A model's folder, or a tokenizer's, that brings code."""
        folder = self.folder / "model"
        folder.mkdir(exist_ok=True)
        auto_map = {"AutoConfig": f"{self.name}.Config", "AutoModel": f"{self.name}.Model"}
        content = {"model_type": "stranger", "n_embd": 8, "n_layer": 1, "n_head": 1}
        mapped = {"auto_map": auto_map} if code else {}
        (folder / "config.json").write_text(json.dumps({**content, **mapped, **config}))
        tokenizer = {
            "tokenizer_class": "StrangerTokenizer",
            "auto_map": {"AutoTokenizer": [None, f"{self.name}.Tokenizer"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        self.module(folder, REMOTE)
        return folder

    def copy(self, name: str) -> Path:
        """A copy of an honest thing."""
        target = self.folder / name
        if not target.exists():
            shutil.copytree(self.source / name, target, symlinks=True)
        return target

    def run(self, **keys: Any) -> Path:
        """A run whose recipe has some keys laid over the honest ones; manifests know nothing of config.yaml."""
        run = self.copy("run")
        tree = yaml.safe_load((run / "config.yaml").read_text())
        for key, value in keys.items():
            tree[key] = (
                {**tree[key], **value} if key in ("backbone", "data", "loss", "train") else value
            )
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        return run

    def shard(self, content: bytes) -> Path:
        """A run with another object in a shard's place, and a manifest that agrees."""
        run = self.copy("run")
        directory = RunDirectory(run)
        step = directory.checkpoint(directory.complete_steps()[-1])
        name = next(p for p in (step / "engine").glob("*optim_states.pt")).relative_to(step)
        with zipfile.ZipFile(step / name, "w") as archive:
            archive.writestr("x/data.pkl", content)
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["files"][name.as_posix()] = entry_of(step / name)
        write_manifest(step, manifest)
        return run

    def export(self, **config: Any) -> Path:
        """An export with some keys laid over its config.json, signed again as a stranger would."""
        export = self.copy("export")
        path = export / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return self.signed(export)

    def signed(self, export: Path) -> Path:
        """An export whose export.json lists what is there now."""
        facts = json.loads((export / "export.json").read_text())
        for key in ("checksum", "sizes", "sha256"):
            facts.pop(key, None)
        write_facts(export, facts)
        return export

    def texts(self) -> Path:
        """Something to score."""
        path = self.folder / "texts.jsonl"
        path.write_text(json.dumps({"prompt": "Tell me about tea.", "response": "Tea is fine."}))
        return path
