"""The keys in which two recipes differ, and the refusal of those that would make a resumed run another one."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from pal_ds.config.run_config import KEYS_THAT_DO_NOT_ALTER_RESULTS, RunConfig
from pal_ds.data.parse import nearest
from pal_ds.errors import UserError
from pal_ds.io.yaml_files import flattened, parse_yaml
from pal_ds.tie_models import WITH_THRESHOLD
from pal_ds.users.config import SCALARS

_WAS_WRITTEN = {
    "data.max_length": 1024,
    "data.source.init_args.known_by": "text",
    "head.init_args.prompt_dropout": 0.0,
    "loss.ties": "half",
    "train.feature_dropout": 0.0,
    "users.prior": "none",
    "users.reliability": "none",
    "users.tie_threshold": "none",
}
"""What recipes of before have, or mean, at keys that are null by default now or were not there; where data were made,
those say what holds."""


def changed_keys(old: str, new: str) -> list[str]:
    """Return the dotted keys that differ between two recipes (YAML text) and may alter the result, sorted.

    >>> changed_keys("train: {seed: 0, log_every: 1}", "train: {seed: 1, log_every: 50}")
    ['train.seed']
    >>> changed_keys("wandb: {mode: online}", "wandb: {}")
    []
    """
    before, after = _keys_of(old), _keys_of(new)
    differing = (key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    # A section without a value counts as its keys do.
    free = KEYS_THAT_DO_NOT_ALTER_RESULTS
    return sorted(key for key in differing if not f"{key}.".startswith(free))


def _keys_of(recipe: str) -> dict[str, object]:
    """Dotted keys of a recipe with their values, those that earlier versions did not write included."""
    keys = flattened(yaml.safe_load(recipe))
    return keys | {key: was for key, was in _WAS_WRITTEN.items() if keys.get(key) is None}


def refuse_unknown_keys(allowed: Iterable[str], recipe: str) -> None:
    """Raise UserError for a key of `--allow_change` that no recipe has; `recipe` is a resolved one, YAML."""
    known = set(RunConfig.__dataclass_fields__)
    for key in flattened(yaml.safe_load(recipe)):
        parts = key.split(".")
        known |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    for key in allowed:
        # Of a key whose value is a class, or null, what stands below is not in this recipe; its section is.
        is_open = key.startswith(("head.", "data.source.", "loss.shape.", "backbone.architecture."))
        if key not in known and not is_open:
            raise UserError(
                f"--allow_change {key}: a recipe has no such key{nearest(key, known)}. Name a key with its section, as "
                "train.seed."
            )


def refuse_changes(run_config_file: Path, new: str, allowed: list[str]) -> None:
    """Raise UserError, naming the keys, where a resumed run would not be the run that was started.

    Keys that decide which values a checkpoint holds are refused though they are `allowed`.
    """
    old = run_config_file.read_text()
    try:
        parse_yaml(old, str(run_config_file))
    except UserError as error:
        raise UserError(f"{error} Restore it, or start in another --run_dir.") from None
    before, after = _keys_of(old), _keys_of(new)

    def is_fixed(key: str) -> bool:
        return key in {f"users.{name}" for name in SCALARS} or (
            key == "loss.ties"
            and (before.get(key) in WITH_THRESHOLD) != (after.get(key) in WITH_THRESHOLD)
        )

    changed = changed_keys(old, new)
    refused = [key for key in changed if key not in allowed or is_fixed(key)]
    if refused:
        listing = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in refused)
        fixed = [key for key in refused if is_fixed(key)]
        others = ",".join(key for key in refused if key not in fixed)
        remedy = f"Restore them, pass --allow_change {others}, or"
        if fixed:
            rest = f", pass --allow_change {others} for the rest" if others else ""
            remedy = f"Restore {', '.join(fixed)}, which decides what a checkpoint holds{rest}, or"
        raise UserError(
            f"{run_config_file}: this run was started with other values: {listing}. {remedy} start in another "
            "--run_dir."
        )
