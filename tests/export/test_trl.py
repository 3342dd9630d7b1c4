"""TRL's online trainers take exported folders as their reward models, as they are.

Runs where TRL is installed (`pip install trl`), which pal_ds does not need.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pal_ds.cli.main import main
from pal_ds.config.recipe import recipe_from_arguments
from pal_ds.data.prepare import prepare
from pal_ds.export import ExportOptions, export, export_users
from pal_ds.runs.run_dir import RunDirectory
from tests.export.cases import ARCHITECTURES, make_tokenizer, write_inputs
from tests.spawn import run_ranks

trl = pytest.importorskip("trl", reason="TRL is not installed; pip install trl to run this")
from datasets import Dataset  # noqa: E402 (after the skip)

RUNS = "llama_pal_a_full", "llama_pal_b_full"
SEPARATOR = "\n\n### Response:\n"
NUM_STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PAL-A for two users on shared weights, PAL-B for the population."""
    root = tmp_path_factory.mktemp("trl")
    write_inputs(root)
    prepare(recipe_from_arguments([f"--config={root / RUNS[0] / 'config.yaml'}"]).data, quiet=True)
    run_ranks(1, "tests.export.worker", root, *RUNS)
    quiet = ExportOptions(quiet=True)
    export_users(RunDirectory(root / RUNS[0]), root / "users", ["u0", "u1"], quiet)
    export(RunDirectory(root / RUNS[1]), root / "pal_b", quiet)
    return [root / "users" / "u0", root / "users" / "u1", root / "pal_b"]


@pytest.fixture(scope="module")
def policy(folders: list[Path]) -> Path:
    """A tiny decoder with random weights and a tokenizer of its own."""
    path = folders[-1].parent / "policy"
    tokenizer = make_tokenizer("gpt2")
    torch.manual_seed(0)
    keys = {**ARCHITECTURES["llama"], "vocab_size": len(tokenizer)}
    keys |= {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scores_of(folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> list[float]:
    """What `pal-ds score` says of full texts."""
    source = folder.parent / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    capsys.readouterr()
    main(["score", "--model", str(folder), "--input", str(source)])
    return [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_rewards_are_the_scores(
    name: str,
    folders: list[Path],
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = [f"Tell me about {topic}.{SEPARATOR}" for topic in ("tea", "chess", "bread")]
    texts: list[str] = []
    rewards: dict[str, list[float]] = {folder.name: [] for folder in folders}

    def record(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts.extend(p + c for p, c in zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "trust_remote_code": True,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    trainer = getattr(trl, f"{name}Trainer")(
        model=str(policy),
        reward_funcs=[*map(str, folders), record],
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    for folder, model in zip(folders, trainer.reward_funcs, strict=False):
        keep = rewards[folder.name].extend
        model.register_forward_hook(lambda _, __, out, keep=keep: keep(out.logits[:, 0].tolist()))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == NUM_STEPS and len(texts) == 4 * NUM_STEPS
    changed = zip(before, trainer.model.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in changed), "the policy learned nothing"
    for folder in folders:
        expected = scores_of(folder, texts, capsys)
        assert rewards[folder.name] == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) > len(texts) // 2
        means = [row.get(f"rewards/{folder.name}/mean") for row in trainer.state.log_history]
        logged = [mean for mean in means if mean is not None]
        assert sum(logged) / NUM_STEPS == pytest.approx(sum(expected) / len(texts), abs=1e-5)
    assert len({tuple(column) for column in rewards.values()}) == len(folders)
