"""The exported folder: weights, config, code, tokenizer, card, and the check against the run.

Everything is written beside the final name and renamed at the end, so a folder of that name is complete and checked.
"""

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pal_ds.data.tokenise import truncation_side
from pal_ds.errors import UserError
from pal_ds.export import bundle_code, card, configs, contents, tokenizer
from pal_ds.export.audience import Audience, choose_audience, posteriors_of
from pal_ds.export.parity import Probe, exported_scores, probe_of, read_samples, trainer_scores
from pal_ds.export.weights import DTYPES, Layout, Weights, parse_size, weights_of, write_weights
from pal_ds.heads.base import Head
from pal_ds.inference.load_run import OpenRun, load_model, open_run
from pal_ds.inference.mixtures import user_lines
from pal_ds.io.files import new_folder, refuse_existing
from pal_ds.remote_code.canonical_rows import CanonicalRows
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export, and its audience; the default is the population at the latest step."""

    step: str = "latest"
    user: str | None = None
    mixture: Sequence[float] | None = None
    group: str | None = None
    """A group of the run's data, for a head that asks for it."""
    users_dir: Path | None = None
    """Users fitted by `adapt`, among whom `user` is looked up first."""
    with_users: bool = False
    """Also write users.jsonl: id, mixture and scalars (reliability, tie_threshold) of every user of the run."""
    dtype: str = "fp32"
    max_shard_size: str = "4GB"
    data_path: Path | None = None
    """Folder of the prepared data, if it no longer lies where the recipe says."""
    trust_checkpoint: bool = False
    trust_code: bool = False
    """Import the classes that the run names beyond pal_ds's own."""
    reward_mean: float | None = None
    reward_std: float | None = None
    quiet: bool = False


def export(run: RunDirectory, out: Path, options: ExportOptions | None = None) -> card.RunExport:
    """Write the exported folder `out` and return its facts (export.json).

    Raises:
        UserError: `out` holds something, the run cannot be opened, options contradict each other,
            a tensor is missing or misshapen, or the exported model does not score as the run does.
        StorageError: `out` cannot be written; no folder of that name was made.
    """
    options = options or ExportOptions()
    opened = open_for_export(run, out, options)
    with new_folder(out) as folder:
        return fill_folder(folder, opened, options)


def open_for_export(run: RunDirectory, out: Path, options: ExportOptions) -> OpenRun:
    """Open the run at the wanted step, once all is refused that can be before anything is written."""
    parse_size(options.max_shard_size)
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: must be one of {', '.join(DTYPES)}.")
    refuse_existing(out)
    opened = open_run(
        run,
        options.step,
        trust=options.trust_checkpoint,
        trust_code=options.trust_code,
        data_path=options.data_path,
    )
    configs.backbone_config(opened)
    return opened


def fill_folder(folder: Path, opened: OpenRun, options: ExportOptions) -> card.RunExport:
    """Put an exported model into an empty folder, check it against the run, and return its facts."""
    weights = weights_of(opened)
    head = weights.head
    if head.has_points:
        opened.refuse_other_table(options.users_dir, head)
    audience = choose_audience(
        head,
        opened.users,
        user=options.user,
        mixture=options.mixture,
        users_dir=options.users_dir,
        group=options.group,
        groups=opened.data.groups,
    )
    linear = head.linear_weight()
    stock = None
    if (
        linear is not None
        and opened.parts.pooling == "last"
        and truncation_side(opened.data.info["tokens"]) == "left"
        and opened.parts.collator.encoding == "joint"
    ):
        stock = configs.stock_class(configs.backbone_config(opened))
    if stock is None or linear is None:
        config = configs.pal_config(opened, audience.mixture)
        if options.user is not None and options.users_dir is not None:
            (config.posterior,) = posteriors_of(
                [options.user], [audience.mixture], options.users_dir
            )
        config.reward_mean, config.reward_std = options.reward_mean, options.reward_std
        tokenizer.copy_tokenizer(opened.data.tokenizer_path, folder)
        layout = configs.pal_layout(folder, config, weights)
    else:
        layout = _stock_layout(folder, opened, weights, stock, linear)
    shown = None if options.quiet else "exporting"
    write_weights(folder, layout, options.dtype, options.max_shard_size, shown)
    target = layout.target
    del weights, layout
    parity, probe = _check(folder, opened, audience, target, options.dtype)
    configs.add_probe(folder, probe)
    name = None if stock is None else stock.__name__
    facts = card.describe(opened, audience, parity, dtype=options.dtype, stock=name)
    if options.with_users and (head.has_points or opened.users.scalars):
        _write_users(folder, opened, head, options.users_dir)
    card.write_card(folder, facts)
    contents.write_facts(folder, facts)
    return facts


def _stock_layout(
    folder: Path, opened: OpenRun, weights: Weights, stock: type[PreTrainedModel], linear: Tensor
) -> Layout:
    """Write config, tokenizer and code of transformers' own class, with a subclass that scores as the trainer."""
    config = configs.backbone_config(opened)
    tokens = opened.data.info["tokens"]
    arguments = opened.data.tokenizer_path, folder, tokens, config.vocab_size
    pad = tokenizer.write_canonical_tokenizer(*arguments)
    if not tokenizer.is_exact(folder, *read_samples(opened)):
        tokenizer.write_canonical_tokenizer(*arguments, in_text=False)
    if pad == config.vocab_size:
        weights = _with_one_more_row(weights, config.vocab_size)
        config.vocab_size += 1
    config.num_labels = 1
    config.pad_token_id = pad
    config.canonical = {
        "prefix_ids": tokens["prefix_ids"],
        "end_ids": tokens["end_ids"],
        "max_tokens": tokens["max_length"],
        **({"end_variants": tokens["end_variants"]} if "end_variants" in tokens else {}),
    }
    name = bundle_code.write_stock_code(folder, stock.__name__)
    auto_map = {"AutoModelForSequenceClassification": f"modeling_canonical.{name}"}
    configs.write_config(folder, config, stock.__name__, auto_map)
    target = configs.on_meta(stock, config)
    return Layout(target, weights, f"{stock.base_model_prefix}.", {"score.weight": linear[None]})


def _with_one_more_row(weights: Weights, vocab_size: int) -> Weights:
    """Add a zero row at the end of the token embedding, for a pad token that is never read."""
    tables = [
        n for n, shape in weights.shapes.items() if shape[0] == vocab_size and len(shape) == 2
    ]
    if len(tables) != 1:
        raise UserError(f"cannot tell the token embedding among {tables} to add a pad token.")
    name, rows = tables[0], weights.shapes[tables[0]]

    def read(wanted: str) -> Iterator[Tensor]:
        yield from weights.read(wanted)
        if wanted == name:
            yield torch.zeros(rows[1])

    return Weights({**weights.shapes, name: (rows[0] + 1, rows[1])}, read, weights.head)


def _check(
    folder: Path, opened: OpenRun, audience: Audience, target: PreTrainedModel, dtype: str
) -> tuple[dict[str, float], Probe]:
    """Score samples by both paths, one model in memory at a time; return facts, and what other versions are held to.

    Raises:
        UserError: the fp32 export differs from the run by more than LARGEST_DIFFERENCE.
    """
    texts, encoded = read_samples(opened)
    facts: dict[str, float] = {}
    everything = np.arange(len(texts))
    readers: list[tuple[type[PreTrainedModel], np.ndarray]] = [(type(target), everything)]
    if not isinstance(target, PalForSequenceClassification):
        readers = [(configs.canonical_class(type(target)), everything)]
        facts["tokenizer_exact"] = tokenizer.is_exact(folder, texts, encoded)
        if facts["tokenizer_exact"]:
            # A stock class cannot cut what is longer than the trainer's rows.
            limit = opened.data.info["tokens"]["max_length"]
            lengths = np.array([len(e.prompt_ids) + len(e.response_ids) for e in encoded])
            readers.append((type(target), np.flatnonzero(lengths <= limit)))
    got, probes = [], []
    for cls, rows in readers:
        model = cls.from_pretrained(folder, local_files_only=True).eval()
        got.append(exported_scores(model, folder, [texts[row] for row in rows]))
        if isinstance(model, PalForSequenceClassification | CanonicalRows):
            probes.append(probe_of(model, exact=dtype == "fp32"))
        del model
        # Modules lie in reference cycles. These weights are mapped files, which go for good now;
        # the run's own, read next, would stay in the allocator: hence this order.
        gc.collect()
    collator = opened.parts.collator
    expected = trainer_scores(load_model(opened), collator, encoded, audience.mixture)
    difference = max(
        float(np.abs(scores - expected[rows]).max(initial=0.0))
        for scores, (_, rows) in zip(got, readers, strict=True)
    )
    scale = float(np.abs(expected).max())
    logger.info("exported scores differ from the trainer's by at most %.2e", difference)
    if dtype == "fp32" and not difference <= LARGEST_DIFFERENCE * max(1.0, scale):
        raise UserError(
            f"the exported model's scores differ from the run's by {difference:.2e} on "
            f"{len(texts)} texts of scale {scale:.3g}: nothing was written. Please report this."
        )
    facts |= {"max_difference": difference, "scale": scale, "num_samples": len(texts)}
    return facts, probes[0]


def _write_users(folder: Path, opened: OpenRun, head: Head, adapted: Path | None) -> None:
    """Write users.jsonl: the run's users and those of an adapted table, which hide trained ones of the same id.

    The run's table holds no points of a head that makes them from comparisons.
    """
    tables = [opened.users] if opened.parts.needs_users or not head.is_personal else []
    tables += [] if adapted is None else [UserTable.load(adapted)]
    lines = {line["user_id"]: line for table in tables for line in user_lines(head, table)}
    with open(folder / "users.jsonl", "w", encoding="utf-8") as stream:
        for line in lines.values():
            stream.write(json.dumps(line) + "\n")
