"""`prepare`: raw preference data -> tables in `DATA/`, with a summary of what was kept and dropped.

Runs in one process, before any process group exists.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import xxhash
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pal_ds.data.bad_rows import MAX_BAD_ROWS
from pal_ds.data.build import build_tables
from pal_ds.data.chat_template import choose_template
from pal_ds.data.reading import description_of, records_of
from pal_ds.data.record_checks import fault_of
from pal_ds.data.records import Record, render_plain
from pal_ds.data.sources import Source
from pal_ds.data.splits import Membership, SplitOptions, compared, content_digest
from pal_ds.data.summary import print_summary, warn_of_gaps
from pal_ds.data.tables import INFO_NAME, PreparedData, read_info
from pal_ds.data.tokenise import DEFAULT_SEPARATOR, TextEncoder, load_tokenizer, train_tokenizer
from pal_ds.distributed import phase
from pal_ds.distributed.preemption import refuse_to_go_on
from pal_ds.errors import UserError
from pal_ds.io.files import clear_aside, expand_home, is_free, refuse_existing
from pal_ds.progress import is_quiet
from pal_ds.runs.lock import LOCK, held

PROGRESS_EVERY = 1000
DEFAULT_MAX_LENGTH = 1024
"""Tokens of prompt + response where nobody says."""
_LATER_KEYS = {"truncation_side": "left", "max_bad_rows": MAX_BAD_ROWS}
_LATER_SOURCE_KEYS = (("known_by", "text"),)
"""Arguments of sources, with the value that held before they were there."""
_COUNTS = ("dropped", "bad_rows")
"""What a source counts while it is read; no argument of its own."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the prepared data: where it lies and, if it is to be made, from what and how."""

    path: str
    """Folder of the prepared tables (`DATA/`)."""
    source: Source | None = None
    """Raw data; null opens what is prepared at `path`."""
    tokenizer: str | None = None
    """Folder or hub id, usually the backbone's; null trains a byte-level BPE on the train split."""
    trust_remote_code: bool = False
    """Run Python code that a tokenizer's repository brings."""
    vocab_size: int = 2048
    """Number of tokens of a tokenizer trained here."""
    max_length: int | None = None
    """Tokens of prompt + response; the prompt alone is truncated. Unset: that of the data behind
    `train.init_from`, else 1024, or as many as the backbone has positions for where these are fewer."""
    truncation_side: Literal["left", "right"] = "left"
    """End of a long prompt that goes: its beginning, or what stands just in front of the response marker, which
    stays. The response and its end token are never cut."""
    separator: str = DEFAULT_SEPARATOR
    """Between prompt and response where there is no chat template. It marks where the response
    starts, so choose one that no text contains and that ends in a newline."""
    chat_template: str = "auto"
    """auto: the tokenizer's template where it has one; never; or the name of one of several."""
    special_tokens: bool = True
    """Prefix (BOS, CLS) and end tokens around each text; false: neither."""
    split: Literal["hash", "ordinal", "field", "record"] = "hash"
    """By prompt: its hash, its order of appearance, or the `split` that records name (`field`); or by `record`."""
    dev_fraction: float = 0.05
    """Share of the prompts in the dev split, on which a training evaluates."""
    test_fraction: float = 0.1
    """Share of the prompts in the test split."""
    unseen_user_fraction: float = 0.0
    """Share of users held out whole, among those whose records do not say."""
    seed: int = 0
    """Seed of the hashes that decide splits and unseen users."""
    max_bad_rows: float = MAX_BAD_ROWS
    """Largest share of the rows that may be bad: they are left out and counted, and the first are named. 0 refuses
    the first one."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        expand_home(self, "path", "tokenizer")
        for key, value in (("vocab_size", self.vocab_size), ("max_length", self.max_length)):
            if value is not None and value < 1:
                raise UserError(f"data.{key} is {value}; it must be at least 1.")
        if not 0 <= self.max_bad_rows <= 1:
            share = self.max_bad_rows
            raise UserError(f"data.max_bad_rows is {share}; it is a share of the rows, 0 to 1.")

    def split_options(self) -> SplitOptions:
        return SplitOptions(**{key.name: getattr(self, key.name) for key in fields(SplitOptions)})


def prepare(config: DataConfig, *, quiet: bool = False, again: bool = False) -> PreparedData:
    """Make the tables, or open those that the same settings made; with `again`, replace those of other settings."""
    path = Path(config.path)
    if config.source is None:
        return PreparedData.open(path)
    if is_free(path):
        refuse_existing(path)
    if config.max_length is None:
        config = replace(config, max_length=DEFAULT_MAX_LENGTH)
    if not (again or is_free(path)):
        return _reuse(path, config, quiet)
    # Of several that want the same data one makes them, and the others wait and find them.
    with held(path.with_name(f"{path.name}.{LOCK}"), path, "Start again later.") as is_alone:
        if is_alone:
            clear_aside(path)
        if is_free(path):
            data = _make(path, config, quiet)
        elif again and _changed_from(path, config)[0]:
            data = _replace(path, config, quiet)
        else:
            return _reuse(path, config, quiet)
    if not quiet:
        print_summary(data)
    warn_of_gaps(data, config.split_options())
    return data


def _make(path: Path, config: DataConfig, quiet: bool) -> PreparedData:
    """Make the tables at `path`, where nothing is."""
    settings, source, options = settings_of(config), config.source, config.split_options()
    assert source is not None
    source.bad_rows.largest_share = config.max_bad_rows
    encoder = _encoder(config, source, quiet)
    extra = {
        "source": description_of(source),
        "licence": source.licence,
        "settings": settings,
        "fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode()),
    }
    records = _tracked(records_of(source), source.num_records(), "preparing", quiet)
    return build_tables(records, path, encoder, options, source=source, extra_info=extra)


def _replace(path: Path, config: DataConfig, quiet: bool) -> PreparedData:
    """Make the tables beside those that are there, and put them in their place."""
    new, old = (path.with_name(f"{path.name}.tmp-{word}-{os.getpid()}") for word in ("new", "old"))
    _make(new, config, quiet)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)
    return PreparedData.open(path)


def settings_of(config: DataConfig, read_source: bool = True) -> dict:
    """Everything that decides what the tables hold, as JSON; the raw files' hashes only with `read_source`."""
    own = {key: value for key, value in vars(config).items() if key not in ("path", "source")}
    for key, default in _LATER_KEYS.items():
        if own[key] == default:
            # As in the tables that were prepared before there was a choice.
            del own[key]
    source = config.source
    assert source is not None, "prepare() opens what is there when no source is given"
    described = {
        "class": type(source).__name__,
        "init": {
            key: value
            for key, value in vars(source).items()
            if key[0] != "_" and key not in _COUNTS and (key, value) not in _LATER_SOURCE_KEYS
        },
        "data": description_of(source) if read_source else None,
    }
    return json.loads(json.dumps({**own, "source": described}, default=str, sort_keys=True))


def _reuse(path: Path, config: DataConfig, quiet: bool) -> PreparedData:
    """Open what is there if the same settings made it; the raw data may be gone by now."""
    changed, note = _changed_from(path, config)
    if changed:
        raise UserError(
            f"data.path: {path} was prepared with other settings "
            f"({', '.join('data.' + one for one in changed)}); name another folder, or replace it: "
            "`pal-ds prepare --prepare_again` with this recipe (runs that were trained on it read it no more)"
        )
    if not (quiet or is_quiet()):
        message = f"{path}: prepared before with these settings; reusing it{note}"
        Console(stderr=True).print(message, markup=False)
    return PreparedData.open(path)


def _changed_from(path: Path, config: DataConfig) -> tuple[list[str], str]:
    """Return the settings that made what is at `path` and are others now, and a note on what was not compared.

    Raises:
        UserError: what is there are no prepared data.
    """
    if not (path / INFO_NAME).exists():
        raise UserError(
            f"data.path: {path} exists, is not empty and holds no {INFO_NAME}; it is not ours to "
            "overwrite. Name another folder"
        )
    made_with, note = read_info(path).get("settings") or {}, ""
    try:
        settings = settings_of(config)
    except UserError as error:
        settings = settings_of(config, read_source=False)
        settings["source"]["data"] = made_with.get("source", {}).get("data")
        note = f" (not compared with the raw data: {error})"
    return sorted(_changed_keys(made_with, settings)), note


def _changed_keys(old: dict, new: dict, prefix: str = "") -> Iterator[str]:
    """Name each key that differs, with both values where they are short."""
    for key in {*old, *new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed_keys(before, after, f"{prefix}{key}.")
        elif before != after or (key in old) != (key in new):
            short = all(isinstance(value, int | float | None) for value in (before, after))
            yield prefix + key + (f": {before} then, {after} now" if short else "")


def _encoder(config: DataConfig, source: Source, quiet: bool) -> TextEncoder | None:
    """The tokenizer of the config, or one trained on the train split; None for vector records."""
    first = next((record for record in records_of(source) if not fault_of(record)), None)
    if first is not None and first.response_features is not None:
        return None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, config.trust_remote_code)
    else:
        tokenizer = train_tokenizer(_train_texts(config, source, quiet), config.vocab_size)
    clock = datetime.now().astimezone().isoformat(timespec="microseconds")
    choose_template(tokenizer, config.tokenizer or "trained", config.chat_template)
    encoder = TextEncoder(
        tokenizer,
        max_length=config.max_length or DEFAULT_MAX_LENGTH,
        separator=config.separator,
        chat_template="never" if config.chat_template == "never" else "auto",
        special_tokens=config.special_tokens,
        name=config.tokenizer or "trained",
        clock=clock,
    )
    encoder.truncation_side = config.truncation_side
    return encoder


def _train_texts(config: DataConfig, source: Source, quiet: bool) -> Iterator[str]:
    """Each distinct text that seen users judged in the train split, and the separator."""
    plan = Membership(config.split_options())
    records = _tracked(records_of(source), source.num_records(), "reading", quiet)
    for record in filter(plan.has_split, records):
        plan.add_user(record)
        plan.add_prompt(record, record.where or "record")
    done = set[bytes]()
    for record in filter(plan.trained_on(), filter(plan.has_split, records_of(source))):
        for text in (record.prompt, *compared(record)):
            digest = content_digest(text)
            if text is not None and digest not in done:
                done.add(digest)
                yield render_plain(text)
        yield config.separator


def _tracked(
    records: Iterable[Record], total: int | None, label: str, quiet: bool
) -> Iterator[Record]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f} {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    hidden = quiet or is_quiet() or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(label, total=total, rate="")
        start = time.monotonic()
        for number, record in enumerate(records, start=1):
            yield record
            phase.progress()
            refuse_to_go_on("stopped while the data were being prepared; nothing of them is kept")
            if number % PROGRESS_EVERY == 0:
                rate = number / max(time.monotonic() - start, 1e-9)
                progress.update(task, completed=number, rate=f"{rate:,.0f} records/s")
