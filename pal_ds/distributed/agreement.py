"""One comparison, before any work, of what each rank was started with: differences are refused by key and rank."""

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from pal_ds.distributed.watchdog import meeting
from pal_ds.distributed.world import World
from pal_ds.errors import UserError

LIBRARIES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "peft"),
    *("triton", "flash-attn"),
)
"""Packages whose version may change what a run computes."""
MOST_NAMED = 6
"""Differences that a message lists."""


class DisagreementError(UserError):
    """Ranks of one run were started with different things."""


def refuse_disagreement(world: World, facts: Mapping[str, Any]) -> None:
    """Compare facts of all ranks, key by key; every rank calls it with its own.

    Raises:
        DisagreementError: on every rank, where one has another value than rank 0, or lacks a key.
    """
    own = {key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()}
    with meeting():
        of_ranks = world.gather(own)
    first = of_ranks[0]
    differences = []
    for key in dict.fromkeys(key for facts in of_ranks for key in facts):
        apart = [rank for rank, facts in enumerate(of_ranks) if facts.get(key) != first.get(key)]
        if apart:
            shown = of_ranks[apart[0]].get(key, "nothing")
            differences.append(f"{key} is {shown} on {_named(apart)}, {first.get(key)} on rank 0")
    if differences:
        more = len(differences) - MOST_NAMED
        listed = "; ".join(differences[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise DisagreementError(
            f"the ranks were not started alike: {listed}. Start all of them with one recipe, one set of data and one "
            "installation; nothing was trained or written."
        )


def _named(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def installation_facts() -> dict[str, Any]:
    """Return what names the code of this process: pal_ds's sources, Python and the libraries that compute."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"code of pal_ds": _own_sources(), **{f"version of {k}": v for k, v in versions.items()}}


@functools.cache
def _own_sources() -> str:
    """Hash of every Python file of this package."""
    root = Path(__file__).resolve().parents[1]
    digest = xxhash.xxh3_128()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_version() -> dict[str, str | None]:
    """Return version and git commit of the installed pal_ds, null where unknown; "-dirty": files differ from it.

    An installation from a URL has its commit in its metadata (PEP 610), an editable one in the checkout around it.
    """
    version, origin = None, None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution("pal_ds")
        version, origin = distribution.version, distribution.read_text("direct_url.json")
    commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    root = Path(__file__).resolve().parents[2]
    if commit is None and (root / ".git").exists():
        describe = ("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*")
        # There may be no git here, or it does not trust a checkout of somebody else.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=30)
            commit = found.stdout.strip()
    return {"version of pal_ds": version, "commit of pal_ds": commit}
