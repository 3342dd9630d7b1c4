"""Evaluates a finished run on a split or a file of pairs, alone or over ranks, and writes D/eval/NAME.json."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pal_ds.data.build import build_tables
from pal_ds.data.reading import records_of
from pal_ds.data.records import Record
from pal_ds.data.sources import Source, source_of_file
from pal_ds.data.tables import PreparedData, preferences, targets
from pal_ds.data.tokenise import TextEncoder
from pal_ds.data.verification import verify_content
from pal_ds.distributed.agreement import installation_facts, refuse_disagreement
from pal_ds.distributed.watchdog import watch
from pal_ds.distributed.world import World
from pal_ds.errors import UserError, writing
from pal_ds.eval.diagnostics import context_flip
from pal_ds.eval.figures import (
    dev_temperature,
    prompt_counts,
    refuse_no_numbers,
    report_on,
)
from pal_ds.eval.metrics import controversial
from pal_ds.eval.prototype_examples import evenly, examples_of_prototypes
from pal_ds.eval.results import SPLIT, EvalRequest, name_of, split_request, write_figures
from pal_ds.eval.schema import EvaluationFigures
from pal_ds.eval.tie_figures import ThreeWay, fit_threshold
from pal_ds.inference.load_run import OpenRun, limits_of, restore
from pal_ds.inference.readers import KnownUsers, known_users, own_margins, reader_of, with_points
from pal_ds.modeling.build import refuse_empty_prompts
from pal_ds.runs.run_dir import RunDirectory


@contextlib.contextmanager
def opened_pairs(
    restored: OpenRun,
    file: Path | Source | None,
    world: World,
    read: Callable[[Path | Source], Iterable[Record]] | None = None,
    beside: Path | None = None,
) -> Iterator[PreparedData]:
    """The run's data, or tables of `file` made with the run's tokenizer and template, deleted afterwards.

    The tables lie in the run directory meanwhile, or in the folder `beside`.
    `file` may be a source; `read` says which pairs of responses the file holds, unset for a file of comparisons.
    """
    if file is None:
        verify_content(restored.data.path, restored.data.info, world)
        yield restored.data
        return

    def build() -> Path:
        # A name of its own: others may be evaluating a file of this name on this run right now.
        stem = name_of(file) if isinstance(file, Path) else type(file).__name__
        name = {"prefix": f"pairs-of-{stem}-", "suffix": ".tables"}
        place = restored.run.path if beside is None else beside
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(**name, dir=place))
        tokens = restored.data.info["tokens"]
        try:
            encoder = None
            if tokens is not None:
                encoder = TextEncoder.from_info(tokens, restored.data.tokenizer_path)
            if read is None:
                source = file if isinstance(file, Source) else source_of_file(file)
                build_tables(records_of(source), folder, encoder, check_marker=False, source=source)
            else:
                build_tables(read(file), folder, encoder, check_marker=False)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    folder = world.from_rank_zero(build)
    try:
        yield world.on_every_rank(lambda: _tables_of(file, folder, restored))
        # Nobody may still be reading; after a failure on one rank alone the others would not come here.
        world.barrier()
    finally:
        if world.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)


def _tables_of(file: Path | Source, folder: Path, restored: OpenRun) -> PreparedData:
    """Raises UserError where the records are not of the kind and size that the run was trained on."""
    data = PreparedData.open(folder)
    info, of_run, collator = data.info, restored.data.info, restored.parts.collator
    if info["kind"] != of_run["kind"]:
        raise UserError(
            f"{file}: holds {info['kind']}, and the run was trained on {of_run['kind']}."
        )
    if info["vector_size"] != of_run["vector_size"]:
        raise UserError(
            f"{file}: vectors of {info['vector_size']} numbers, the run was trained on {of_run['vector_size']}."
        )
    if info["kind"] == "vectors" and collator.with_prompt and data.prompt_vectors is None:
        raise UserError(
            f"{file}: the run's head reads the prompt, and these records carry no prompt_features."
        )
    refuse_empty_prompts(replace(collator, data=data), file)
    return data


def evaluate_run(
    run: RunDirectory,
    world: World,
    *,
    request: EvalRequest | None = None,
    users: Path | None = None,
    trust_code: bool = False,
) -> EvaluationFigures:
    """Compute the figures of `eval/NAME.json`, which rank 0 writes, and return them on every rank.

    The last checkpoint is taken; `request` is the split `test` where unset, `users` a folder that `adapt` wrote.
    `trust_code` imports the classes that the run names beyond pal_ds's own.

    Raises:
        UserError: no such run, split or file; an empty split.
    """
    request = request or split_request(SPLIT)
    restored = world.on_every_rank(lambda: restore(run, device=world.device, trust_code=trust_code))
    return evaluate_set(restored, known_users(restored, users), request, world)


@contextlib.contextmanager
def restored_by_ranks(
    run: RunDirectory,
    step: str | int,
    users: Path | None,
    *,
    trust: bool = False,
    trust_code: bool = False,
) -> Iterator[tuple[World, OpenRun, KnownUsers]]:
    """A run and whom it knows, on each rank of a launcher or alone; what hangs is found, within the run's limits."""
    from pal_ds.engine.process_group import joined_or_alone

    limits = limits_of(run)
    with joined_or_alone(limits.timeout_minutes, limits.hang_minutes) as world:
        # Alone it waits for nobody; who started it sees whether it goes on.
        minutes = limits.hang_minutes if world.world_size > 1 else 0
        with watch(world, run.path / "stacks", minutes):
            leave = {"trust": trust, "trust_code": trust_code}
            restored = world.on_every_rank(lambda: restore(run, step, world.device, **leave))
            facts = {
                "manifest of the checkpoint": restored.manifest["checksum"],
                "hash of data.path": restored.data.hash,
                "--users": None if users is None else str(users),
            }
            refuse_disagreement(world, facts | installation_facts())
            yield world, restored, known_users(restored, users)


def evaluate_set(
    restored: OpenRun, known: KnownUsers, request: EvalRequest, world: World
) -> EvaluationFigures:
    """Evaluate a run that is in memory; see `evaluate_run`."""
    refuse_disagreement(world, {"evaluated": str(request)})
    with opened_pairs(restored, request.pairs, world, beside=request.out) as data:
        rows = request.rows(data)
        known = with_points(known, restored, data, world)
        calibration = _calibration(restored, world)
        reader = reader_of(restored, data, rows, known.table_rows(data), world)
        forwards = reader.forwards(world, "scoring")
        margins = forwards.margins(rows, known.mixtures, known.log_reliability)
        refuse_no_numbers(margins, restored)
        figures = report_on(restored, known, reader, rows, margins, calibration, world)
        if known.encoded_rows is not None:
            other = with_points(known, restored, data, world, flipped=True)
            turned = reader.forwards(world).margins(rows, other.mixtures, known.log_reliability)
            # Points of adapted users were made elsewhere, and stay as they are.
            could_turn = np.isin(reader.collator.user_rows(rows), known.encoded_rows)
            disputed = controversial(data.comparisons[rows])
            figures["context_flip"] = context_flip(margins, turned, could_turn, disputed)
        if request.by_prompt:
            figures["by_prompt"] = prompt_counts(data, rows, margins)
        sample = evenly(rows, request.num_example_pairs)
        if (examples := examples_of_prototypes(restored, reader, sample, world)) is not None:
            figures["prototype_examples"] = examples
        if request.pairs is not None:
            figures["dropped"] = data.info["dropped"]
            figures["prompts_seen_in_training"] = _num_seen_prompts(restored.data, data)
    figures["step"] = restored.step
    figures["adapted_users"] = sum(len(ids) for ids in known.ids[1:])
    write = functools.partial(write_figures, restored.run, request.name, figures, request.out)
    world.from_rank_zero(write)
    return figures


def _calibration(restored: OpenRun, world: World) -> tuple[float, ThreeWay | None]:
    """(temperature of margins, model of ties) at the restored step, from the run's own users and dev pairs.

    Whichever pairs and users are evaluated. Margins of the logistic loss are log-odds already: nothing is read or
    scored for it, but where ties need a threshold that training did not learn.
    """
    data, loss, learnt = restored.data, restored.config.loss, restored.model.tie_threshold
    if learnt is not None:
        return 1.0, ThreeWay(loss.ties, float(learnt()), learnt=True)
    rows = data.rows("dev")
    has_ties = bool((data.comparisons["label"][rows] == 0).any())
    if len(rows) == 0 or (loss.kind == "logistic" and not has_ties):
        return 1.0, None
    margins, labels = own_margins(restored, rows, world), data.comparisons["label"][rows]
    sure = preferences(data.comparisons[rows]) != 0
    temperature = dev_temperature(margins[sure], labels[sure].astype(float), loss.kind)
    shares = targets(data.comparisons[rows])
    return temperature, fit_threshold(margins / temperature, labels.astype(float), shares=shares)


def _num_seen_prompts(trained_on: PreparedData, data: PreparedData) -> int:
    if data.prompts is None and (data.prompt_vectors is None or trained_on.prompt_vectors is None):
        return 0  # vector records without prompts have none to meet again
    responses = trained_on.comparisons["a"][trained_on.rows("train")]
    seen = trained_on.prompt_hashes()[np.unique(trained_on.response_prompt[responses])]
    return int(np.isin(data.prompt_hashes(), seen).sum())


def summary_line(name: str, figures: Mapping[str, Any]) -> str:
    """Summarise figures in one line for people."""
    parts = [f"{name}: {figures['pairs']} pairs"]
    if (interval := figures["accuracy_ci95"]) is not None:
        low, high = interval
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
