"""The model card of an exported model, and its facts for programs, which go to export.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast, final

from pal_ds.data.dataset_info import TokensInfo
from pal_ds.export.audience import Audience
from pal_ds.inference.fitted_to import head_hash
from pal_ds.inference.load_run import OpenRun

FACTS_NAME = "export.json"
FORMAT_VERSION = 2
"""2 added sizes and a checksum of export.json itself."""
_HEADER = """---
library_name: transformers
pipeline_tag: text-classification
license: other
license_name: {licence}
tags: [reward-model, pal]
---
# Reward model
"""


class ExportFacts(TypedDict):
    """The facts in export.json of any exported folder."""

    format_version: int
    head: str
    """Class name."""
    family: str
    stock_class: str | None
    """transformers' own class that opens the folder; None for ours."""
    audience: str
    mixture: list[float] | None
    head_hash: NotRequired[str]
    """Hash of the head's tensors, by which tables of users know it; of an older version, none."""
    licence: str | None
    backbone: str
    dtype: str
    tokens: TokensInfo
    """How texts became ids, as in dataset.json of the training data."""


@final
class RunExport(ExportFacts):
    """export.json of a run's export, without the files' hashes."""

    step: int
    dataset_hash: str
    tuning: str
    reads_prompt: bool
    tokenizer_exact: NotRequired[bool]
    """True where a stock class's tokenizer writes the trainer's ids by itself."""
    max_difference: float
    """Largest distance of the exported scores from the trainer's."""
    scale: float
    """Largest absolute score of the trainer."""
    num_samples: int
    measured_for: NotRequired[str]


@final
class ImportedExport(ExportFacts):
    """export.json of a checkpoint of the PAL reference, without the files' hashes."""

    reads_prompt: bool
    end_in_tokenizer: str
    """Text that the folder's tokenizer writes after every text; empty for none."""
    backbone_weights: str
    """Origin of the backbone's weights, in words."""
    imported_from: str
    checkpoint_sha256: str


def describe(
    opened: OpenRun,
    audience: Audience,
    parity: Mapping[str, object],
    *,
    dtype: str,
    stock: str | None,
) -> RunExport:
    """Return the facts of an export, without user ids; `parity` are those of its check against the trainer."""
    data, parts = opened.data.info, opened.parts
    backbone = opened.config.backbone
    facts = {
        "format_version": FORMAT_VERSION,
        "head": type(parts.head).__name__,
        "family": parts.head.family,
        "stock_class": stock,
        "audience": audience.description,
        "mixture": audience.mixture,
        "head_hash": head_hash(parts.head),
        "step": opened.step,
        "dataset_hash": data["hash"],
        "licence": data.get("licence"),
        "backbone": backbone.path or opened.config.train.init_from or "random weights of the run",
        "tuning": backbone.tuning,
        "dtype": dtype,
        "tokens": data["tokens"],
        "reads_prompt": parts.collator.with_prompt,
        **parity,
    }
    return cast(RunExport, facts)


def write_card(folder: Path, facts: RunExport | ImportedExport) -> None:
    """Write README.md, the model card."""
    rows: dict[str, object] = {
        "Head": facts["head"],
        "Scores for": facts["audience"],
        "Mixture": facts["mixture"] or "none",
    }
    if "imported_from" in facts:
        rows |= {
            "Imported from": f"{facts['imported_from']}, sha256 {facts['checkpoint_sha256']}",
            "Backbone": f"{facts['backbone']} ({facts['backbone_weights']})",
            "Weights": facts["dtype"],
        }
    else:
        rows |= {
            "Step of the run": facts["step"],
            "Data": f"hash {facts['dataset_hash']}, licence {facts['licence'] or 'not stated'}",
            "Backbone": f"{facts['backbone']} ({facts['tuning']})",
            "Weights": facts["dtype"],
            "Largest difference to the trainer": (
                f"{facts['max_difference']:.2e} on {facts['num_samples']} texts whose scores reach "
                f"{facts['scale']:.3g} in size{facts.get('measured_for', '')}"
            ),
        }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    header = _HEADER.format(licence=facts["licence"] or "unknown")
    page = f"{header}| | |\n|---|---|\n{table}\n\n## Use\n{_usage(facts)}"
    (folder / "README.md").write_text(page)


def _usage(facts: RunExport | ImportedExport) -> str:
    remote = "" if facts["stock_class"] else ", trust_remote_code=True"
    load = f'from_pretrained("THIS FOLDER"{remote})'
    text = f"""```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.{load}
tokenizer = AutoTokenizer.{load}
batch = tokenizer(["prompt and response as one text"], padding=True, return_tensors="pt")
scores = model(**batch).logits[:, 0]
```
Higher is better. Only differences between responses to the same prompt mean something.
{_text_form(facts["tokens"])}
"""
    if facts["stock_class"]:
        return text + _stock_notes(facts)
    text += """Special tokens and padding may be given or not, on either side: the model brings
every row to the form it was trained on.
"""
    if facts["mixture"]:
        text += """`from_pretrained(..., mixture=[...])` scores for another user from the same
files. `model(..., return_token_scores=True)` gives [batch, length] scores for guided decoding
(decoders).
"""
    end = facts.get("end_in_tokenizer")
    if end:
        text += f"""This folder's tokenizer writes {end!r} after every text, as the
training data had it: ids of another tokenizer lack it.
"""
    if facts["reads_prompt"]:
        text += """The model finds the response by its marker; `prompt_lengths` (tokens before the
response in each row as passed) goes first, and a text without exactly the expected markers is
refused.
"""
    return text


def _text_form(tokens: TokensInfo) -> str:
    if tokens["chat_template"]:
        return "A text is the conversation, response last, in the tokenizer's chat template."
    if not tokens["separator"]:
        return (
            "A text is the prompt and, right after it, the response, as the training data had them."
        )
    return f"A text is the prompt, then {tokens['separator']!r}, then the response."


def _stock_notes(facts: RunExport | ImportedExport) -> str:
    assert "tokenizer_exact" in facts, "every export as a stock class says so"
    if facts["tokenizer_exact"]:
        text = """The tokenizer writes the special tokens itself, whatever `add_special_tokens`
says, so the stock class scores as the trainer did.
"""
    else:
        text = """**The stock class alone does not score as the trainer did**: this tokenizer cannot
be made to write its special tokens by itself. Load with `trust_remote_code=True`: the folder's own
class brings every row to the trainer's form.
"""
    return f"""{text}Pad on the right (the tokenizer does): some stock classes count positions from the
row's start. Texts of more than {facts["tokens"]["max_length"]} tokens lost their beginning in
training; the stock class reads them whole. With `trust_remote_code=True` padding, special tokens
and length are as in training.
"""
