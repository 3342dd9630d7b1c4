"""Evaluates a finished run on a split or a file of pairs, alone or over ranks, and writes D/eval/NAME.json."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pal_ds.asked import Asked, asked_sets
from pal_ds.backbones.given import GivenStates
from pal_ds.cache_folders import restored_cache_folders
from pal_ds.data.batch import Collator
from pal_ds.data.build import build_tables
from pal_ds.data.records import Record
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import TextEncoder
from pal_ds.engine.dist import World
from pal_ds.engine.frozen import encode_once
from pal_ds.errors import UserError, writing
from pal_ds.evaluate import dev_temperature, predict, report_on, user_mixtures
from pal_ds.findings import findings
from pal_ds.heads.shapes import Float
from pal_ds.model import RewardModel
from pal_ds.restore import Restored, restore
from pal_ds.run_dir import RunDirectory
from pal_ds.surface import FormatBaseline
from pal_ds.user_figures import write_user_figures
from pal_ds.user_ids import UserIds
from pal_ds.users import UserTable


@dataclass(frozen=True)
class KnownUsers:
    """Whom a run can score: its own users and, if given, adapted ones; an adapted user hides a trained one."""

    ids: list[UserIds]
    """Of each table, the rows of one after those of the other; the last that holds a user has the say."""
    mixtures: Float[torch.Tensor, "U+1 K"]
    """Mixtures by row; the last is the population of the run's own users."""

    @property
    def own(self) -> Float[torch.Tensor, "U K"]:
        """Mixtures of the run's own users."""
        return self.mixtures[: len(self.ids[0])]

    def table_rows(self, data: PreparedData) -> np.ndarray:
        """Row of each user of `data`, -1 for strangers."""
        rows, first = np.full(len(data.users), -1, np.int64), 0
        for ids in self.ids:
            found = ids.find(data.users)
            rows, first = np.where(found < 0, rows, found + first), first + len(ids)
        return rows


def known_users(restored: Restored, adapted: Path | None) -> KnownUsers:
    """The users of a run and of an adapted table. Raises UserError where the tables do not fit together."""
    head = restored.model.head
    mixtures = user_mixtures(head, restored.users)
    if adapted is None:
        return KnownUsers([restored.users.ids], mixtures)
    table = UserTable.load(adapted)
    if table.num_prototypes != restored.users.num_prototypes:
        raise UserError(
            f"--users {adapted}: {table.num_prototypes} prototypes, the run has {restored.users.num_prototypes}. "
            "Adapt the users to this run."
        )
    return KnownUsers(
        [restored.users.ids, table.ids],
        torch.cat([mixtures[:-1], user_mixtures(head, table)[:-1], mixtures[-1:]]),
    )


def records_of(file: Path) -> Iterable[Record]:
    """The pairs of a JSONL file."""
    return Jsonl(str(file)).records()


@contextlib.contextmanager
def opened_pairs(
    restored: Restored,
    file: Path | None,
    world: World,
    read: Callable[[Path], Iterable[Record]] = records_of,
) -> Iterator[PreparedData]:
    """The run's data, or tables of `file` made with the run's tokenizer and template, deleted afterwards.

    `read` says which pairs of responses the file holds.
    """
    if file is None:
        yield restored.data
        return

    def build() -> Path:
        # A name of its own: others may be evaluating a file of this name on this run right now.
        name = {"prefix": f"pairs-of-{file.stem}-", "suffix": ".tables"}
        folder = Path(tempfile.mkdtemp(**name, dir=restored.run.path))
        tokens = restored.data.info["tokens"]
        try:
            encoder = None
            if tokens is not None:
                encoder = TextEncoder.from_info(tokens, restored.data.tokenizer_path)
            build_tables(read(file), folder, encoder, check_marker=False)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    folder = world.from_rank_zero(build)

    def open_tables() -> PreparedData:
        data = PreparedData.open(folder)
        _refuse_other_kind(file, data, restored)
        return data

    try:
        yield world.on_every_rank(open_tables)
        # Nobody may still be reading; after a failure on one rank alone the others would not come here.
        world.barrier()
    finally:
        if world.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_other_kind(file: Path, data: PreparedData, restored: Restored) -> None:
    """Raises UserError where the records are not of the kind and size that the run was trained on."""
    own = restored.data
    if data.info["kind"] != own.info["kind"]:
        raise UserError(
            f"{file}: holds {data.info['kind']}, and the run was trained on {own.info['kind']}."
        )
    if data.info["vector_size"] != own.info["vector_size"]:
        raise UserError(
            f"{file}: vectors of {data.info['vector_size']} numbers, the run was trained on {own.info['vector_size']}."
        )
    if (
        data.info["kind"] == "vectors"
        and restored.parts.collator.with_prompt
        and data.prompt_vectors is None
    ):
        raise UserError(
            f"{file}: the run's head reads the prompt, and these records carry no prompt_features."
        )


@dataclass(frozen=True)
class Reader:
    """How a run scores comparisons of some data: its collator, and the module that takes the batches."""

    collator: Collator
    model: RewardModel


def reader_of(
    restored: Restored,
    data: PreparedData,
    rows: np.ndarray,
    table_rows: np.ndarray,
    world: World,
    *,
    encode_ahead: bool = False,
) -> Reader:
    """Reads comparisons `rows` of `data` as the run read its own.

    `table_rows` maps users of the data to user table rows. Each distinct text is encoded once, ahead, where the
    backbone is frozen or the caller is going to score the same texts many times.
    """
    parts = restored.parts
    collator = replace(parts.collator, data=data, table_rows=table_rows)
    if parts.backbone is None or not (parts.needs_store or encode_ahead):
        return Reader(collator, restored.model)
    model, config = restored.model, restored.config
    caches = None
    if parts.needs_store:
        dtype = next(model.head.parameters()).dtype
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        weights = restored.manifest["base_weights"]
        caches = world.from_rank_zero(
            lambda: restored_cache_folders(parts, collator, config, weights, precision)
        )
    batch_texts = config.backbone.encode_batch_texts
    collator = encode_once(lambda: model.backbone, collator, rows, batch_texts, world, caches)
    return Reader(collator, RewardModel(GivenStates(), model.head))


def evaluate_run(
    run: RunDirectory,
    world: World,
    *,
    split: str = "test",
    file: Path | None = None,
    name: str | None = None,
    users: Path | None = None,
    step: str = "latest",
    trust_checkpoint: bool = False,
) -> dict[str, Any]:
    """The figures of `eval/NAME.json`, written by rank 0 and returned on every rank.

    Raises:
        UserError: no such run, step, split or file; an empty split.
    """
    (asked,) = asked_sets(split, [] if file is None else [file], name)
    restored = restore(run, step, world.device, trust=trust_checkpoint)
    return evaluate_set(restored, known_users(restored, users), asked, world)


def evaluate_set(
    restored: Restored, known: KnownUsers, asked: Asked, world: World
) -> dict[str, Any]:
    """As `evaluate_run`, of a run in memory."""
    micro = restored.config.train.micro_batch_pairs
    with opened_pairs(restored, asked.file, world) as data:
        rows = asked.rows(data)
        temperature = _temperature(restored, micro, world)
        reader = reader_of(restored, data, rows, known.table_rows(data), world)
        mixtures = known.mixtures.to(world.device)
        margins = predict(
            reader.model, reader.collator, rows, mixtures, micro, world, label="scoring"
        )
        user_rows, looks = reader.collator.user_rows(rows), FormatBaseline.of(restored.data)
        figures = report_on(data, rows, margins, user_rows, temperature, looks)
        figures |= findings(restored, known.own, data, rows, margins, user_rows, looks, world)
        if asked.file is not None:
            figures["dropped"] = data.info["dropped"]
            figures["prompts_seen_in_training"] = _num_seen_prompts(restored.data, data)
    figures["step"] = restored.step
    world.from_rank_zero(lambda: write_figures(restored.run, asked.name, figures))
    return figures


def _temperature(restored: Restored, micro: int, world: World) -> float:
    """At the restored step, from the run's own users and dev pairs, whichever pairs and users are evaluated.

    Margins of the logistic loss are log-odds already: nothing is read or scored for it.
    """
    data, kind = restored.data, restored.config.loss.kind
    rows = data.rows("dev")
    if kind == "logistic" or len(rows) == 0:
        return 1.0
    own = known_users(restored, None)
    reader = reader_of(restored, data, rows, own.table_rows(data), world)
    mixtures = own.mixtures.to(world.device)
    margins = predict(reader.model, reader.collator, rows, mixtures, micro, world)
    return dev_temperature(margins, data.comparisons["label"][rows].astype(float), kind)


def _num_seen_prompts(trained_on: PreparedData, data: PreparedData) -> int:
    if data.prompts is None and (data.prompt_vectors is None or trained_on.prompt_vectors is None):
        return 0  # vector records without prompts have none to meet again
    responses = trained_on.comparisons["a"][trained_on.rows("train")]
    seen = trained_on.prompt_hashes()[np.unique(trained_on.response_prompt[responses])]
    return int(np.isin(data.prompt_hashes(), seen).sum())


def write_figures(run: RunDirectory, name: str, figures: dict[str, Any]) -> None:
    """Writes eval/NAME.json. Raises StorageError where it cannot be written."""
    with writing(run.eval):
        run.eval.mkdir(parents=True, exist_ok=True)
    write_user_figures(run.eval / f"{name}.json", figures)


def summary_line(name: str, figures: dict[str, Any]) -> str:
    """One line for people."""
    parts = [f"{name}: {figures['pairs']} pairs"]
    if figures["pairs"]:
        low, high = figures["accuracy_ci95"]
        parts.append(f"accuracy {figures['accuracy']:.4f} [{low:.4f}, {high:.4f}]")
        parts.append(f"mean over {len(figures['users'])} users {figures['user_accuracy_mean']:.4f}")
        if figures["ece"] is not None:
            parts.append(f"ECE {figures['ece']:.4f}")
    unknown = figures["unknown_users"]
    if unknown["pairs"]:
        parts.append(
            f"users not in the run: {unknown['pairs']} pairs, accuracy {unknown['accuracy']:.4f}"
        )
    return "; ".join(parts)


__all__ = [
    "KnownUsers",
    "Reader",
    "evaluate_run",
    "evaluate_set",
    "known_users",
    "opened_pairs",
    "reader_of",
    "summary_line",
    "write_figures",
]
