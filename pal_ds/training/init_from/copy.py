"""Copy of what a new run starts from (`train.init_from`) into its own directory: the origin is read once.

D/init/ origin.json (what it came from)  backbone/ (weights, adapters merged)  head.safetensors  users.*
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from pal_ds.backbones.transformer import read_model_config
from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.data.vocabulary import refuse_other_tokenizer
from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.export.weights import exported_tensors, write_sharded
from pal_ds.heads.base import Head
from pal_ds.io.files import new_folder, write_json
from pal_ds.modeling.build import Parts, assemble, resolve_backbone_path
from pal_ds.progress import progress_bar
from pal_ds.remote_code.encoding import drop_unused_modules
from pal_ds.runs.run_dir import OriginFacts, RunDirectory
from pal_ds.training.init_from.origin import STOCK_HEAD, Origin, open_origin, whole
from pal_ds.training.state import ids_of_table
from pal_ds.users import USER_FILES, StoredUsers, TrainedUsers, UserTable

logger = logging.getLogger(__name__)

PATIENCE = 6.0
SHARD_BYTES = 4 * 10**9
HEAD_FILE = "head.safetensors"


def take_over(
    config: RunConfig, data: PreparedData, run: RunDirectory, **leave: bool
) -> Parts | None:
    """Write D/init from `train.init_from`, anew until a checkpoint stands on it. For rank 0 alone.

    `leave` is that of `origin_for`. Returns the run's parts, assembled on the way; None where nothing was written.

    Backbone: its trained weights, adapters merged, in the new run's precision; one that was frozen and lies outside of
    the origin's directory is only named. Head: where class and shapes are the same, else a fresh one. Users: logits of
    those in both, where the head was taken over, without Adam moments. Nothing else: optimizer and schedule are new.

    Raises:
        UserError: nothing can be read there, its tokenizer or kind of data is another, or D/init holds something of
            somebody else's; nothing was written.
    """
    if config.train.init_from is None or run.has_checkpoints():
        return None
    if run.init.exists() and not run.origin_file.is_file():
        raise UserError(
            f"{run.init}: holds something that pal_ds did not write, and what train.init_from gives would go there. "
            "Name another --run_dir."
        )
    phase.enter("take over weights", patience=PATIENCE)
    origin = origin_for(config.train.init_from, data, **leave)
    parts = assemble(config, data, run, model_config=origin.model_config)
    _refuse_other_depth(config, origin)
    head = parts.head
    tensors = _head_for(origin, head)
    users = None
    if tensors is not None:
        head.load_state_dict(tensors)
        users = _table(config, data, head, origin)
    # Of an earlier start that never came to a checkpoint.
    shutil.rmtree(run.init, ignore_errors=True)
    # Half a folder could not be told from a whole one.
    with new_folder(run.init) as folder:
        if origin.weights is not None:
            _write_backbone(folder / "backbone", origin, config.train.precision)
        if tensors is not None:
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / HEAD_FILE)
        facts: OriginFacts = {
            "path": str(origin.path),
            **origin.facts,
            "frozen_path": origin.frozen_path,
            "head": None if tensors is None else origin.head,
            "users": 0,
        }
        if users is not None:
            table, facts["users"] = users
            table.save(folder)
        write_json(folder / run.origin_file.name, facts)
    taken = ["backbone"] if data.info["kind"] == "tokens" else []
    taken.append(f"head {facts['head']}" if facts["head"] else "a fresh head")
    taken.append(f"{facts['users']} of {int(data.user_seen.sum())} users")
    source = facts["path"], facts["kind"], facts["step"]
    logger.warning("starting from %s (%s, step %d): %s", *source, ", ".join(taken))
    if parts.backbone is None:
        return parts
    return replace(parts, backbone=resolve_backbone_path(config, run))


def origin_for(
    init_from: str, data: PreparedData, *, trust: bool = False, trust_code: bool = False
) -> Origin:
    """Open what `train.init_from` names, for a run on `data`; see `open_run` for what the last two allow.

    Raises UserError as `take_over` does.
    """
    origin = open_origin(Path(init_from), trust=trust, trust_code=trust_code)
    key, theirs, ours = f"train.init_from {origin.path}", origin.info, data.info
    kinds = [
        "texts" if info["kind"] == "tokens" else f"vectors of {info['vector_size']} numbers"
        for info in (theirs, ours)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(f"{key}: learned from {kinds[0]}, {data.path} holds {kinds[1]}.")
    if ours["kind"] == "tokens":
        tokens, rewritten = theirs["tokens"], origin.tokenizer_rewritten
        refuse_other_tokenizer(key, origin.tokenizer, tokens, data, rewritten=rewritten)
    return origin


def _refuse_other_depth(config: RunConfig, origin: Origin) -> None:
    """Raise UserError where a frozen backbone, read from its own folder, would keep other layers than the origin's."""
    if origin.frozen_path is None:
        return
    backbone = replace(config.backbone, path=origin.frozen_path)
    given, wanted = (
        read_model_config(backbone).num_hidden_layers,
        origin.model_config.num_hidden_layers,
    )
    if given != wanted:
        raise UserError(
            f"train.init_from {origin.path}: its head reads the states behind layer {wanted} of {origin.frozen_path}, "
            f"this run's would read those behind layer {given}. Set backbone.num_layers to {wanted}."
        )


def _head_for(origin: Origin, head: Head) -> dict[str, Tensor] | None:
    """Return the origin's tensors under the names of `head`; None, with a warning, where they do not fit."""
    given = origin.head_tensors
    wanted = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    if STOCK_HEAD in given and head.linear_weight() is not None and len(wanted) == 1:
        (name,) = wanted
        given = {name: given[STOCK_HEAD].flatten()}
    if origin.head != type(head).__name__:
        reason = f"its head is {origin.head}, this run's {type(head).__name__}"
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        other = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
        if not other:
            return given
        name = other[0]
        reason = f"{name} of its head is {shapes.get(name)}, of this run's {wanted.get(name)}"
    logger.warning(
        "train.init_from %s: %s: the head and its users start afresh", origin.path, reason
    )
    return None


def _table(
    config: RunConfig, data: PreparedData, head: Head, origin: Origin
) -> tuple[UserTable, int] | None:
    """Return (table of the new run's seen users, how many have the origin's values); None for a head without users."""
    if "logits" not in head.needs and not config.users.scalars:
        return None
    known = origin.users(head)
    ids = ids_of_table(config, data)
    table = UserTable(head.num_prototypes, ids, config.users, config.train.seed)
    origin_rows = known.ids.find(ids)
    rows = np.flatnonzero(origin_rows >= 0)
    own, of_origin = torch.from_numpy(rows), torch.from_numpy(origin_rows[rows])
    table.logits[own] = known.logits[of_origin].float()
    for name in table.scalars:
        of_known = getattr(known, f"log_{name}")
        if of_known is None:
            logger.warning(
                "train.init_from %s: says nothing of users' %s, which starts afresh",
                origin.path,
                name.replace("_", " "),
            )
        else:
            getattr(table, f"log_{name}")[own] = of_known[of_origin].float()
    return table, len(rows)


def _write_backbone(folder: Path, origin: Origin, precision: str) -> None:
    """Write a folder that transformers opens: config and safetensors."""
    assert origin.weights is not None, "a frozen backbone is named, not copied"
    folder.mkdir()
    config = origin.model_config
    config._name_or_path = ""
    kind, prefix, output_layer = AutoModel, "", {}
    if origin.output_layer is not None:
        # As a language model, which its base loads from, too.
        kind, output_layer = AutoModelForCausalLM, whole(origin.output_layer)
    with torch.device("meta"):
        target = kind.from_config(config)
    if origin.output_layer is not None:
        prefix = f"{target.base_model_prefix}."
    drop_unused_modules(target)
    config.save_pretrained(folder)
    shapes, read = exported_tensors(target, origin.weights(), prefix, output_layer)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with progress_bar("taking over weights", len(shapes), shown=True, unit="tensors") as advance:

        def count(num_units: int) -> None:
            phase.progress()
            advance(num_units)

        write_sharded(folder, shapes, read, dtype, SHARD_BYTES, count)


def load_taken_over(
    config: RunConfig, run: RunDirectory, head: Head, users: TrainedUsers
) -> OriginFacts | None:
    """Load the head and users that D/init holds; return what the run came from (origin.json).

    None for a run without `train.init_from`.

    Raises:
        UserError: D/init is missing, or its table lacks a user who was removed from the run.
    """
    if config.train.init_from is None:
        return None
    facts = run.origin_facts()
    if (run.init / HEAD_FILE).is_file():
        head.load_state_dict(load_file(run.init / HEAD_FILE))
    if (run.init / USER_FILES[0]).is_file():
        stored = StoredUsers(run.init)
        # Here, too: the checkpoint's table is held against this one.
        stored.refuse_removed(users.ids)
        users.restore(stored)
    return facts
