"""Write prepared tables: collect, drop what cannot be trained on, renumber, publish the folder."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from pal_ds.data.bad_rows import BadRows
from pal_ds.data.collect import Collector
from pal_ds.data.dataset_info import Counts, DatasetInfo, SoftCounts
from pal_ds.data.marker_words import named_counts
from pal_ds.data.ragged import Ragged
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.data.splits import NUM_BASE_SPLITS, SPLITS, SplitOptions
from pal_ds.data.stores import CODE, REASONS, TokenStore, TokenTables
from pal_ds.data.tables import FORMAT_VERSION, USERS_SCHEMA, PreparedData, best_accuracy
from pal_ds.data.tokenise import TextEncoder
from pal_ds.data.verification import INFO_NAME, hash_tables
from pal_ds.errors import UserError
from pal_ds.io.files import new_folder, refuse_existing
from pal_ds.io.sealed import list_files, seal

logger = logging.getLogger(__name__)


def build_tables(
    records: Iterable[Record],
    directory: str | Path,
    encoder: TextEncoder | None,
    options: SplitOptions | None = None,
    *,
    check_marker: bool = True,
    source: Source | None = None,
    extra_info: Mapping[str, object] | None = None,
) -> PreparedData:
    """Tables of `records` in `directory`, which must not exist yet or be empty.

    Ad-hoc files (evaluate --data, adapt --pairs) pass the run's encoder and `check_marker=False`:
    their boundaries are known from the text, so no row is dropped for its marker. `encoder` is None
    for vector records. what `source` left out is read after the last record. `extra_info` goes to
    dataset.json as it is (source, licence, settings).
    """
    options = options or SplitOptions()
    bad_rows = BadRows() if source is None else source.bad_rows
    collector = Collector(encoder, options, bad_rows)
    directory = Path(directory)
    refuse_existing(directory)
    with new_folder(directory) as folder:
        for record in records:
            collector.add(record)
        bad_rows.check()
        if not collector.num_records:
            left_out = {} if source is None else dict(source.dropped) | bad_rows.counts()
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items())
            raise UserError(
                "the source yields no record; there is nothing to prepare"
                + (f". Left out were: {reasons}" if reasons else "")
            )
        bad_rows.warn()
        extra = dict(extra_info or {})
        dropped = Counter({} if source is None else source.dropped) + Counter(bad_rows.counts())
        info = _write(collector, folder, check_marker, dropped, extra)
        # Last of all: it names every other file.
        whole = {**info, "files": list_files(folder, without=INFO_NAME)}
        (folder / INFO_NAME).write_text(seal(whole, indent=1), encoding="utf-8")
    return PreparedData.open(directory)


def _write(
    collector: Collector,
    folder: Path,
    check_marker: bool,
    source_dropped: Counter[str],
    extra: dict[str, object],
) -> DatasetInfo:
    table, content_prompt = collector.comparisons()
    users, seen = list(collector.members.users), collector.members.seen()
    split = table["split"].copy()
    if collector.members.options.split != "record":
        split = collector.members.prompt_splits()[content_prompt]
    table["split"] = split + NUM_BASE_SPLITS * ~seen[table["user"]]

    store = collector.store
    assert store is not None, "at least one record was added"
    if isinstance(store, TokenStore):
        tables = store.finish(check_marker)
        _warn_of_what_is_not_shown(store)
        reason = token_reasons(table, tables)
        write_rows = partial(_write_tokens, folder, store, tables)
    else:
        reason = np.where(table["a"] == table["b"], CODE["identical"], 0)
        write_rows = partial(_write_vectors, folder, *store.finish())
    hidden = store.not_shown if isinstance(store, TokenStore) else {}
    table, dropped = _drop(table, reason, hidden)
    kept_users = np.unique(table["user"])
    kept = np.unique(np.concatenate([table["a"], table["b"]]))
    split_of_row = {
        row: code
        for side in ("a", "b")
        for row, code in zip(table[side].tolist(), table["split"].tolist(), strict=True)
    }
    table["user"] = np.searchsorted(kept_users, table["user"])
    for side in ("a", "b"):
        table[side] = np.searchsorted(kept, table[side])
    details = write_rows(kept, split_of_row)
    np.save(folder / "comparisons.npy", table)
    groups = list(collector.groups)
    group = [collector.members.user_group[row] for row in kept_users]
    names = [groups[code] if code >= 0 else None for code in group]
    _write_users(folder, [users[row] for row in kept_users], seen[kept_users], names)
    info = {
        "format_version": FORMAT_VERSION,
        "kind": store.kind,
        "hash": hash_tables(folder),
        "source": None,
        "licence": None,
        **extra,
        "counts": _counts(table, seen[kept_users], details.pop("num_prompts"), len(kept)),
        "dropped": dict(source_dropped + dropped),
        "groups": groups,
        **details,
        **_bayes(table),
    }
    return cast(DatasetInfo, info)


def _warn_of_what_is_not_shown(store: TokenStore) -> None:
    if store.special:
        logger.warning(
            "texts hold special tokens of tokenizer %s in their own contents (number of texts by token: %s): a model "
            "reads them as it reads the ends of texts and turns. Take them out of the texts, unless they are meant so",
            store.encoder.name,
            named_counts(store.special),
        )
    if store.not_shown:
        listed = ", ".join(f"{kind}: {count}" for kind, count in sorted(store.not_shown.items()))
        logger.warning(
            "the chat template of tokenizer %s leaves something out, so the model never sees it (number of texts by "
            "what is missing: %s). Use a tokenizer whose template shows it, or set data.chat_template: never",
            store.encoder.name,
            listed,
        )


def _drop(
    table: np.ndarray, reason: np.ndarray, not_shown: Mapping[str, int]
) -> tuple[np.ndarray, Counter[str]]:
    """The rows to keep, and how many were dropped for each reason."""
    counts = np.bincount(reason, minlength=len(REASONS)).tolist()
    dropped = Counter({REASONS[code]: n for code, n in enumerate(counts) if code and n})
    if not (reason == 0).any():
        listed = ", ".join(f"{name} {count}" for name, count in dropped.items())
        hidden = ", ".join(not_shown)
        listed += f"; the chat template leaves out: {hidden}" if hidden else ""
        raise UserError(f"every comparison was dropped ({listed}); nothing is left to train on")
    return table[reason == 0], dropped


def token_reasons(table: np.ndarray, tables: TokenTables) -> np.ndarray:
    """Per comparison, the code of the reason to drop it (0: keep)."""
    first, second = tables.status[table["a"]], tables.status[table["b"]]
    reason = np.where(first != 0, first, second).astype(np.int64)
    prompt = tables.response_prompt
    reason[(reason == 0) & (prompt[table["a"]] != prompt[table["b"]])] = CODE["prompt_differs"]
    lengths = tables.responses.lengths
    alike = (reason == 0) & (lengths[table["a"]] == lengths[table["b"]])
    for row in np.flatnonzero(alike):
        a, b = table["a"][row], table["b"][row]
        if a == b or np.array_equal(tables.responses[a], tables.responses[b]):
            reason[row] = CODE["identical"]
    return reason


def _write_tokens(
    folder: Path,
    store: TokenStore,
    tables: TokenTables,
    kept: np.ndarray,
    split_of_row: dict[int, int],
) -> dict:
    kept_prompts, response_prompt = np.unique(tables.response_prompt[kept], return_inverse=True)
    prompts, responses = tables.prompts.take(kept_prompts), tables.responses.take(kept)
    _save_ragged(folder, "prompt", prompts)
    _save_ragged(folder, "response", responses)
    np.save(folder / "response_prompt.npy", response_prompt.astype(np.int64))
    np.save(folder / "response_num_chars.npy", tables.num_chars[kept].astype(np.int32))
    encoder = store.encoder
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in store.samples.choose(split_of_row):
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    whole = prompts.lengths[response_prompt] + responses.lengths
    tokens = encoder.describe(tables.marker_ids, tables.user_marker_ids)
    return {
        "tokens": {**tokens, "marker_kept": tables.marker_kept},
        **({"not_shown": dict(store.not_shown)} if store.not_shown else {}),
        "truncated_prompts": int((whole > encoder.max_length).sum()),
        "vector_size": None,
        "num_prompts": len(kept_prompts),
    }


def _write_vectors(
    folder: Path,
    responses: np.ndarray,
    prompts: np.ndarray | None,
    response_prompt: np.ndarray,
    kept: np.ndarray,
    _split_of_row: dict[int, int],
) -> dict:
    kept_prompts, response_prompt = np.unique(response_prompt[kept], return_inverse=True)
    np.save(folder / "response_vectors.npy", responses[kept])
    np.save(folder / "response_prompt.npy", response_prompt.astype(np.int64))
    if prompts is not None:
        np.save(folder / "prompt_vectors.npy", prompts[kept_prompts])
    size = responses.shape[1]
    return {"tokens": None, "vector_size": size, "num_prompts": len(kept_prompts)}


def _save_ragged(folder: Path, name: str, table: Ragged) -> None:
    np.save(folder / f"{name}_tokens.npy", table.tokens.astype(np.int32))
    np.save(folder / f"{name}_offsets.npy", table.offsets)


def _write_users(folder: Path, ids: list[str], seen: np.ndarray, groups: list) -> None:
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "row": np.arange(len(ids)),
            "seen": seen,
            "group": pa.array(groups, pa.string()),
        },
        schema=USERS_SCHEMA,
    )
    # pyarrow puts the home folder for a `~` in front.
    with pa.ipc.new_file(str((folder / "users.arrow").absolute()), table.schema) as writer:
        writer.write_table(table)


def _counts(table: np.ndarray, seen: np.ndarray, num_prompts: int, num_responses: int) -> Counts:
    by_split = np.bincount(table["split"], minlength=len(SPLITS)).tolist()
    return {
        "comparisons": len(table),
        "prompts": num_prompts,
        "responses": num_responses,
        "users": len(seen),
        "seen_users": int(seen.sum()),
        "unseen_users": int((~seen).sum()),
        "splits": dict(zip(SPLITS, by_split, strict=True)),
        **_counts_beyond_hard(table),
    }


def _counts_beyond_hard(table: np.ndarray) -> SoftCounts:
    """Numbers of ties and of soft labels, where there are any."""
    counts: SoftCounts = {}
    if num_ties := int((table["label"] == 0).sum()):
        counts["ties"] = num_ties
    if "soft" in (table.dtype.names or ()):
        counts["soft_labels"] = int(table["soft"].sum())
    return counts


def _bayes(table: np.ndarray) -> dict:
    """Best possible accuracy per split, where the choice probabilities are known."""
    of_splits = {
        name: best_accuracy(table[table["split"] == code]) for code, name in enumerate(SPLITS)
    }
    figures = {name: best for name, best in of_splits.items() if best is not None}
    return {"bayes_accuracy": figures} if figures else {}
