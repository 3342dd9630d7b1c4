"""Recipes that say something impossible: unknown keys and classes, values out of range, parts that do not fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.engine.ds_config import load_ds_config
from tests.bad_input.conftest import Place, Refused
from tests.spawn import ROOT, environment
from tests.tiny import change_info

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.batch_pair=3"], "--train.batch_pair=3. Did you mean train.batch_pairs?"),
        (["--optim.lerning_rate=1"], "Did you mean optim.learning_rate?"),
        (["--head.num_prototype=3"], "'num_prototype' is not accepted. Did you mean num_prototype"),
        (["--fre"], "--fre. Did you mean fresh?"),
        (["--qqqq=1"], "--qqqq=1. `pal-ds COMMAND --help` lists what there is."),
        (["--head=PalC"], "head: there is no class PalC. Did you mean PalB? Known are PalA, PalB,"),
        (["--data.source=Jason"], "data.source: there is no class Jason. Did you mean Jsonl?"),
        (["--head.similarity=cos"], "similarity: it must be one of 'distance', 'cosine'. Got v"),
        (["--train.epochs=two"], "train.epochs: it must be of type int. Got value: two"),
        (
            ["--users.learning_rate=.inf"],
            "users.learning_rate is inf; it must be above 0, and finite",
        ),
        (["--optim.learning_rate=.inf"], "optim.learning_rate is inf; it must be finite."),
        (["--train.eval_sets={false: x.jsonl}"], "train.eval_sets is False; it must be names of"),
        (["--train.batch_pairs=0"], "train.batch_pairs is 0; it must be at least 1."),
        (["--train.log_every=0"], "train.log_every is 0; it must be at least 1."),
        (["--train.stop_signals=[USR9]"], "train.stop_signals is USR9; it must be a signal's name"),
        (["--train.stop_signals=[KILL]"], "train.stop_signals is KILL; it must be a signal's name"),
        (["--train.time_limit_minutes=0"], "train.time_limit_minutes is 0.0; it must be above 0"),
        (["--train.gradient_clipping=-1"], "train.gradient_clipping is -1.0; it must be 0 or m"),
        (["--optim.learning_rate=-1"], "optim.learning_rate is -1.0; it must be 0 or more."),
        (["--optim.warmup_fraction=2"], "optim.warmup_fraction is 2.0; it must be between 0"),
        (["--users.learning_rate=0"], "users.learning_rate is 0.0; it must be above 0"),
        (["--loss.kind=hing"], "loss.kind: it must be one of 'logistic', 'hinge'"),
        (["--data.max_length=0"], "data.max_length is 0; it must be at least 1"),
        (["--data.max_length=40"], "data was prepared with other settings (data.max_length:"),
        (["--train.ds_config=zero9"], "zero9.json. Give a path to a DeepSpeed JSON or one of: z"),
    ],
)
def test_options(place: Place, refused: Refused, tmp_path: Path, options: list, message: str):
    assert message in refused(*place.train(*options, run=tmp_path / "new"))


def test_an_empty_run_dir(place: Place, refused: Refused):
    said = refused("train", f"--config={place.recipe}", "--run_dir=")
    assert "--run_dir: is empty (a variable of the shell that is not set?)" in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("allow_change: 0.5", "allow_change: 0.5 is no list of names, as in a,b"),
        ("allow_change: [1]", "allow_change: [1] is no list of names, as in a,b"),
        (
            "allow_change: [train.sed]",
            "--allow_change train.sed: a recipe has no such key (did you",
        ),
        ("train.num_workers: 1000000000000000000000000000000", "it must be 1024 at most"),
    ],
)
def test_values_of_another_kind_in_a_file(
    place: Place, refused: Refused, tmp_path: Path, lines: str, message: str
):
    (tmp_path / "more.yaml").write_text(lines + "\n")
    more = f"--config={tmp_path / 'more.yaml'}"
    assert message in refused(*place.train(more, run=tmp_path / "new"))


def test_a_world_of_ranks_without_a_rank(
    place: Place, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(*place.train(run=tmp_path / "new"))
    assert "WORLD_SIZE is 2 in the environment, and RANK is not set" in said
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE is 'two'" in refused(*place.train(run=tmp_path / "new"))


def test_operators_that_have_no_place(place: Place, tmp_path: Path):
    """The exit code of storage, whatever number the system gives for the place."""
    (tmp_path / "file").write_text("")
    for folder in ("/proc/none", tmp_path / "file" / "below"):
        words = ("train", f"--config={place.recipe}", f"--run_dir={tmp_path / 'new'}")
        done = subprocess.run(
            [sys.executable, "-m", "pal_ds", *words],
            env={**environment(), "TORCH_EXTENSIONS_DIR": str(folder)},
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
        assert str(folder) in done.stderr and "TORCH_EXTENSIONS_DIR" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {batch_pears: 3}", "option 'train.batch_pears'. Did you mean train.batch_pairs?"),
        ("trian: {epochs: 3}", "option 'trian.epochs'. Did you mean train.epochs?"),
        ("head: {class_path: PalC}", "head: there is no class PalC."),
        ("train:\n  epochs: [\n", "extra.yaml:3: not valid YAML"),
        ("- train", "extra.yaml: holds no keys; a recipe is a YAML mapping"),
        ("", "extra.yaml: holds no keys"),
    ],
)
def test_recipe_files(place: Place, refused: Refused, tmp_path: Path, text: str, message: str):
    extra = tmp_path / "extra.yaml"
    extra.write_text(text)
    assert message in refused(*place.train(f"--config={extra}", run=tmp_path / "new"))


def test_what_is_missing(place: Place, refused: Refused, tmp_path: Path):
    assert "nope.yaml: no such file" in refused(*place.train("--config", tmp_path / "nope.yaml"))
    assert "are required: --run_dir" in refused("train", f"--config={place.recipe}")
    assert "are required: --head" in refused(
        "train", "--data.path=x", f"--run_dir={tmp_path / 'new'}"
    )
    assert "there is no command 'trian'. Did you mean train?" in refused("trian")
    assert "give a command, one of prepare, embed, train" in refused()
    assert "is a file. Name a directory" in refused(*place.train(run=place.pairs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone.path=x"], "backbone: give exactly one of path (weights to load) and archi"),
        (
            ["--backbone.architecture=null", "--backbone.path=tests"],
            "backbone.path: transformers cannot open 'tests'",
        ),
        (["--backbone.architecture=null"], "backbone: give exactly one of path"),
        (
            ["--backbone.architecture=null", "--train.init_from=nowhere"],
            "train.init_from nowhere: holds neither config.yaml (a run directory) nor export.json",
        ),
        (
            ["--train.init_from=run"],
            "train.init_from run: holds neither config.yaml",
        ),
        (
            ["--backbone.architecture=null", "--backbone.path=./nowhere"],
            "backbone.path: no folder ./nowhere (looked from ",
        ),
        (
            ['--backbone.architecture={"model_type": "lama"}'],
            "model_type is lama, which transformers does not know. Give one that it does, such as",
        ),
        (
            ["--backbone.architecture.num_hidden_layer=1"],
            "llama has no option num_hidden_layer. Did you mean num_hidden_layers?",
        ),
        (
            ["--backbone.architecture.num_attention_heads=5"],
            "(32) is not a multiple of the number of attention heads (5)",
        ),
        (
            ["--backbone.tuning=lora", "--backbone.lora.target_modules=[nope]"],
            "backbone.lora: Target modules {'nope'} not found",
        ),
        (["--head.num_prototypes=0"], "head: num_prototypes is 0; it must be above 0."),
        (
            ["--backbone.tuning=frozen", "--train.micro_batch_tokens=100"],
            "train.micro_batch_tokens: updates read no tokens here",
        ),
        (
            [f"--backbone.architecture={json.dumps(BERT)}", "--loss.token_weighting=cumulative"],
            "loss.token_weighting: cumulative needs a score per response token; an encoder is mea",
        ),
        (
            [
                f"--backbone.architecture={json.dumps(BERT)}",
                "--backbone.encoding=joint",
                "--head=PalB",
            ],
            "backbone.encoding: joint with an encoder mean-pools",
        ),
        (
            [f"--backbone.architecture={json.dumps(BERT)}", "--backbone.pooling=eos"],
            "backbone.pooling: eos, and the last token of an encoder stands for nothing more",
        ),
        (
            ["--backbone.pooling=max", "--loss.token_weighting=mean"],
            "loss.token_weighting: mean needs a score per response token; backbone.pooling: max gi",
        ),
        (["--backbone.tuning=frozen", "--loss.lm_weight=0.1"], "loss.lm_weight: a frozen backbone"),
    ],
)
def test_parts_that_do_not_fit(
    place: Place, refused: Refused, tmp_path: Path, options: list, message: str
):
    assert message in refused(*place.train(*options, run=tmp_path / "new"))


def test_head_that_reads_the_prompt_needs_a_marker(place: Place, refused: Refused, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    info = json.loads((data / "dataset.json").read_text())
    info["tokens"]["marker_ids"], info["tokens"]["separator"] = None, " "
    change_info(data, **info)
    options = ["--head=PalB", f"--data.path={data}", "--data.source=null"]
    message = refused(*place.train(*options, run=tmp_path / "new"))
    assert "head: it reads the prompt, and data.separator ' ' leaves no token" in message
    assert "Prepare with a separator that does" in message


def test_prompts_read_by_themselves_have_tokens(place: Place, refused: Refused, tmp_path: Path):
    """The tokenizer that is made here puts nothing in front: a record without a prompt has an empty one."""
    pairs = [json.loads(line) for line in place.pairs.read_text().splitlines()]
    for pair in pairs[:3]:
        pair["prompt"] = None
    file = tmp_path / "some_without.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"vocab_size": 400, "max_length": 64, "dev_fraction": 0, "test_fraction": 0}
    config = DataConfig(path=str(tmp_path / "data"), source=Jsonl(str(file)), **settings)
    num_prompts = prepare(config, quiet=True).info["counts"]["prompts"]
    options = [f"--data.path={tmp_path / 'data'}", "--data.source=null"]
    options += ["--head=PalB", "--backbone.encoding=separate"]
    message = refused(*place.train(*options, run=tmp_path / "new"))
    assert f" of {num_prompts} prompts have no token, and the head reads each by itself" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_batch_size": 99},
            "train_batch_size = 99 contradicts the recipe, which owns it as",
        ),
        ({"train_batch_size": "many"}, 'train_batch_size = "many" contradicts the recipe'),
        ({"gradient_clipping": 3.0}, "gradient_clipping = 3.0 contradicts the recipe"),
        ({"optimizer": {"type": "Adam"}}, "contradicts the recipe, which owns it as optim. Delete"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true contradicts train.precision: fp32"),
        ({"bf16": True}, "bf16 must be an object, found true"),
        ({"nebula": {}}, "DeepSpeed removed the key nebula; delete it."),
        ({"elasticity": {}}, "DeepSpeed removed the key elasticity; delete it."),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            "removed the key zero_optimization.mics_shard_size; use zero_hpz_partition_size",
        ),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7; it must be 0, 1, 2"),
        ({"zero_optimization": []}, "zero_optimization must be an object, found []"),
        ({"zero_optimisation": {}}, "no key zero_optimisation. Did you mean zero_optimization?"),
        ({"zero_optimization": {"stagee": 3}}, "DeepSpeed refuses zero_optimization (stagee: Ext"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            'zero_optimization.offload_optimizer.device is "nvme": DeepSpeed would copy swap files into checkpoints',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'zero_optimization.offload_param.device is "nvme"',
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.4},
                }
            },
            "zero_optimization.offload_optimizer.ratio is 0.4: part of the model would be stepped",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm is false: updates are judged by that norm. Delete",
        ),
        ([], "a DeepSpeed config is a JSON object, found list"),
    ],
)
def test_deepspeed_json(place: Place, refused: Refused, tmp_path: Path, content, message: str):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    said = refused(*place.train(f"--train.ds_config={path}", run=tmp_path / "new"))
    assert message in said
    assert str(path) in said


def test_deepspeed_json_that_is_none(place: Place, refused: Refused, tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text('{\n "bf16": \n')
    said = refused(*place.train(f"--train.ds_config={path}", run=tmp_path / "new"))
    assert f"{path}:3: not valid JSON" in said


def test_shipped_deepspeed_configs_pass():
    names = [path.stem for path in Path("ds_configs").glob("*.json")]
    assert "zero3" in names
    for name in names:
        load_ds_config(name)


def test_a_recipe_names_no_other_recipe(place: Place, refused: Refused) -> None:
    recipe = place.folder / "names_another.yaml"
    recipe.write_text("config: other.yaml\n")
    assert "`config` is no key of a recipe" in refused(*place.train(f"--config={recipe}"))
