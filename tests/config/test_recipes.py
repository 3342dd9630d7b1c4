"""Recipes of real models print and are planned: parameters and bytes per GPU from their sizes, without weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from pal_ds.cli.main import main
from pal_ds.config.changes import changed_keys
from pal_ds.config.recipe import read_recipe, recipe_from_arguments
from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.engine.ds_config import ds_config_of, zero_stage
from pal_ds.errors import UserError
from pal_ds.modeling.build import assemble
from pal_ds.modeling.memory_plan import plan_memory
from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import ROOT
from tests.tiny import LLAMA as TINY_LLAMA
from tests.tiny import write_pairs
from tools import plan

RECIPES = ROOT / "pal_ds" / "recipes"
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151646,
    "max_position_embeddings": 131072,
}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
# Sizes of the published config.json files.
MODELS: dict[str, dict[str, Any]] = {
    "reference_opt_350m": {
        "model_type": "opt",
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
        "vocab_size": 50272,
    },
    "reference_distilbert": {"model_type": "distilbert", "vocab_size": 28996},
    "reference_bge_m3": {
        "model_type": "xlm-roberta",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "vocab_size": 250002,
    },
    "reference_gte_qwen2_1_5b": QWEN2,
    "reference_stella_1_5b": QWEN2,
    "llama_8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama_70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
BACKBONE_PARAMETERS = {
    "reference_opt_350m": 331_196_416,
    "reference_distilbert": 65_190_912,
    "reference_bge_m3": 566_705_152,
    "reference_gte_qwen2_1_5b": 1_543_268_864,
    "reference_stella_1_5b": 1_543_268_864,
    "llama_8b": 7_504_924_672,
    "llama_70b": 69_503_033_344,
}
REFERENCE = [name for name in MODELS if name.startswith("reference")]
STAGES = ("dsp_base", "dsp_general", "dsp_customised")
GB = 10**9


def layered(*names: str, overrides: tuple[str, ...] = ()) -> list[str]:
    return [*(f"--config={RECIPES / name}.yaml" for name in names), *overrides]


def model_config(name: str) -> Any:
    sizes = dict(MODELS[name])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def reference_layers(name: str, head: str, size: str) -> list[str]:
    tiny = ["reference_tiny"] if size == "tiny" else []
    return layered("reference", name, f"reference_{head}", *tiny)


def assert_prints(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> RunConfig:
    """`--print_config` of `train` gives a recipe that is itself, and a ds_config that DeepSpeed could take."""
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments, "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = {key: printed[key] for key in RunConfig.__dataclass_fields__}
    config, text = read_recipe(arguments)
    again = tmp_path / "printed.yaml"
    again.write_text(yaml.safe_dump(recipe))
    assert yaml.safe_load(read_recipe([f"--config={again}"])[1]) == yaml.safe_load(text)
    ds_config = ds_config_of(config.train, 8)
    assert ds_config["bf16"]["enabled"] == (config.train.precision == "bf16")
    return config


def test_no_recipe_is_left_out() -> None:
    known = {path.stem for path in RECIPES.glob("*.yaml")}
    real = {*REFERENCE, *STAGES, "reference", "reference_pal_a", "reference_pal_b"}
    real |= {
        "reference_tiny",
        *(f"{name}_{how}" for name in MODELS if "llama" in name for how in ("full", "lora")),
    }
    others = {
        name for name in known if name.startswith(("quickstart", "persona", "vector", "dsp_f"))
    }
    assert known == real | others


@pytest.mark.parametrize("size", ["large", "tiny"])
@pytest.mark.parametrize("head", ["pal_a", "pal_b"])
@pytest.mark.parametrize("name", REFERENCE)
def test_the_references_configurations(
    name: str, head: str, size: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = assert_prints(reference_layers(name, head, size), capsys, tmp_path)
    found = plan_memory(config, model_config(name), num_gpus=1)
    num_head = found.num_parameters - BACKBONE_PARAMETERS[name]
    assert 0 < num_head < 0.1 * BACKBONE_PARAMETERS[name]
    assert found.num_trained == (num_head if size == "tiny" else found.num_parameters)
    assert found.total < 72 * GB


@pytest.mark.parametrize(
    ("model", "how", "num_gpus", "gigabytes", "fits"),
    [
        ("llama_8b", "full", 8, 80, True),
        ("llama_8b", "full", 1, 80, False),
        ("llama_8b", "lora", 2, 80, True),
        ("llama_70b", "full", 64, 80, True),
        ("llama_70b", "full", 32, 141, True),
        ("llama_70b", "full", 16, 80, False),
        ("llama_70b", "lora", 16, 80, True),
        ("llama_70b", "lora", 8, 80, True),
        ("llama_70b", "lora", 1, 141, False),
    ],
)
def test_large_models(
    model: str,
    how: str,
    num_gpus: int,
    gigabytes: int,
    fits: bool,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = assert_prints(layered(f"{model}_{how}"), capsys, tmp_path)
    assert zero_stage(ds_config_of(config.train, num_gpus)) == 3
    found = plan_memory(config, model_config(model), num_gpus)
    # A tenth stays free for fragments.
    assert (found.total <= 0.9 * gigabytes * GB) == fits, found
    num_backbone = BACKBONE_PARAMETERS[model]
    if how == "full":
        assert found.num_trained == found.num_parameters
        assert found.num_parameters - num_backbone < 100_000_000
        # bf16 weights; fp32 gradients, masters and two moments.
        assert found.weights + found.optimizer == pytest.approx(
            18 * found.num_parameters / num_gpus
        )
    else:
        assert found.num_trained < 0.02 * found.num_parameters


@pytest.mark.parametrize("name", STAGES)
def test_stages_follow_one_another(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {"dsp_base": None, "dsp_general": "base", "dsp_customised": "general"}[name]
    path = ["--backbone.path=/a/decoder"] if before is None else []
    config = assert_prints([*layered(name), *path], capsys, tmp_path)
    assert config.train.init_from == (None if before is None else f"runs/dsp_stages/{before}")
    known = {recipe_from_arguments(layered(stage)).data.path for stage in STAGES}
    assert config.data.path in known and set(config.train.eval_sets.values()) <= known
    found = plan_memory(config, model_config("llama_8b"), num_gpus=8)
    assert found.total <= 0.9 * 80 * GB


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    from pal_ds.data.prepare import DataConfig, prepare
    from pal_ds.data.sources import Jsonl
    from tests.tiny import write_pairs

    folder = tmp_path_factory.mktemp("recipes")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 12)))
    settings = {"max_length": 64, "vocab_size": 300}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)


@pytest.mark.parametrize("head", ["pal_a", "pal_b"])
@pytest.mark.parametrize("name", REFERENCE)
def test_their_parts_fit_together(
    name: str, head: str, texts: PreparedData, tmp_path: Path
) -> None:
    """Head, pooling, encoding, weighting and layout, decided from the model's own sizes."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    for size in ("large", "tiny"):
        config = recipe_from_arguments(reference_layers(name, head, size))
        config = replace(config, backbone=replace(config.backbone, path=str(tmp_path)))
        parts = assemble(config, texts, RunDirectory(tmp_path / "run"))
        decoder = MODELS[name]["model_type"] in ("opt", "qwen2")
        assert parts.pooling == ("last" if decoder else "mean")
        assert parts.collator.packed == (size == "large")
        assert parts.collator.scored_positions == ("all" if decoder else "last")


def test_the_tool_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama_8b"]))
    path = f"--backbone.path={tmp_path}"
    plan.main(["--num_gpus", "8", *layered("llama_8b_full"), path])
    printed = capsys.readouterr().out
    assert printed.startswith("8 GPUs, 7,5") and "total" in printed
    with pytest.raises(SystemExit) as end:
        plan.main(["--num_gpus", "8", *layered("llama_8b_full"), path, "--train.ds_config=zero2"])
    assert end.value.code == 2
    assert "plans are made for ZeRO-3, this is stage 2" in capsys.readouterr().err


def test_a_plan_counts_the_tokens_of_prepared_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer trained on few texts has fewer tokens than the recipe asks for."""
    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    data = {"path": str(tmp_path / "data"), "vocab_size": 5000, "max_length": 64}
    source = {"class_path": "Jsonl", "init_args": {"path": str(path)}}
    recipe = tmp_path / "recipe.yaml"
    parts = {"backbone": {"architecture": TINY_LLAMA}, "head": {"class_path": "PalA"}}
    recipe.write_text(json.dumps({"data": {**data, "source": source}, **parts}))
    words, counts = ["--num_gpus", "1", "--config", str(recipe)], []
    for _ in range(2):
        plan.main(words)
        counts.append(int(capsys.readouterr().out.split()[2].replace(",", "")))
        main(["prepare", "--config", str(recipe)])
        capsys.readouterr()
    info = json.loads((tmp_path / "data/dataset.json").read_text())
    missing = 5000 - info["tokens"]["vocab_size"]
    assert missing > 1000
    assert counts[0] - counts[1] == missing * TINY_LLAMA["hidden_size"]
    with pytest.raises(SystemExit) as end:
        plan.main(["--num_gpus", "0", "--config", str(recipe)])
    assert end.value.code == 2
    assert "--num_gpus is 0; it must be at least 1" in capsys.readouterr().err


def test_stage_three_alone_is_planned() -> None:
    config = recipe_from_arguments(layered("llama_8b_full", overrides=("--train.ds_config=zero1",)))
    with pytest.raises(UserError, match=r"zero1\.json: plans are made for ZeRO-3, this is stage 1"):
        plan_memory(config, model_config("llama_8b"), 8)


def test_keys_that_earlier_versions_did_not_write() -> None:
    """A run of before goes on; PAL-B's new default is a change, with the value that held then."""
    old = "head: {class_path: PalB, init_args: {num_layers: 1}}"
    same = "head: {class_path: PalB, init_args: {num_layers: 1, prompt_dropout: 0.0}}\nusers: {prior: none}"
    assert changed_keys(old, same) == []
    assert changed_keys(old, same.replace("0.0", "0.5")) == ["head.init_args.prompt_dropout"]
    assert changed_keys(old, same.replace("none", "learnt")) == ["users.prior"]
