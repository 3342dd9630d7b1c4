"""The reward function for OpenRLHF, imported and called as OpenRLHF does it, gives `score`'s scores."""

import asyncio
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pal_ds.cli.main import main
from pal_ds.export import ExportOptions, export_users
from pal_ds.runs.run_dir import RunDirectory
from tests.export.cases import texts_of_rows

SOURCE = Path(__file__).parents[2] / "tools" / "openrlhf_reward.py"
SEPARATOR = "\n\n### Response:\n"
ROWS = [(f"{prompt}{SEPARATOR}", text) for prompt, (text, _) in texts_of_rows()[1:5]]


def imported(folder: Path, copy: Path) -> ModuleType:
    """A copy with FOLDER set, executed as `SingleTurnAgentExecutor` executes a reward file."""
    setting = 'FOLDER = Path("OUT")'
    text = SOURCE.read_text()
    assert text.count(setting) == 1
    copy.write_text(text.replace(setting, f'FOLDER = Path("{folder}")'))
    spec = importlib.util.spec_from_file_location("reward_func", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewards(module: ModuleType, labels: list[str], end: str) -> list[float]:
    """One query per call, each in a thread of its own; the query ends with the policy's end token."""

    async def everything():
        calls = [
            asyncio.to_thread(module.reward_func, [prompt + text + end], [prompt], [label])
            for (prompt, text), label in zip(ROWS, labels, strict=True)
        ]
        return await asyncio.gather(*calls)

    found = asyncio.run(everything())
    # As `_process_response_into_experience` reads them.
    return [torch.tensor([item["rewards"]]).item() for item in found]


def scores_of(folder: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> list[float]:
    source.write_text("".join(json.dumps({"text": p + t}) + "\n" for p, t in ROWS))
    capsys.readouterr()
    main(["score", "--model", str(folder), "--input", str(source)])
    return [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["llama_pal_a_full", "llama_pal_b_full"])
def test_each_prompt_for_the_user_of_its_row(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export_users(RunDirectory(runs / name), out, ["u0"], ExportOptions(quiet=True))
    module = imported(out, tmp_path / "reward.py")
    source = tmp_path / "in.jsonl"
    own, everyone = (scores_of(out / place, source, capsys) for place in ("u0", "_shared"))
    found = rewards(module, ["u0", "", "u0", ""], end="</s>")
    assert found == pytest.approx([own[0], everyone[1], own[2], everyone[3]], abs=1e-5)
    assert own != pytest.approx(everyone, abs=1e-4)
    with pytest.raises(KeyError, match="nobody"):
        module.reward_func(["a"], ["a"], ["nobody"])


@pytest.mark.parametrize("name", ["llama_bt_full", "bert_pal_a_full"])
def test_a_plain_folder(
    name: str, runs: Path, exported: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported[name][0]
    module = imported(folder, tmp_path / "reward.py")
    expected = scores_of(folder, tmp_path / "in.jsonl", capsys)
    assert rewards(module, [""] * len(ROWS), end="") == pytest.approx(expected, abs=1e-5)
