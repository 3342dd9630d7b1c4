"""Personalised reward models, trained at scale with DeepSpeed.

    from pal_ds import train, evaluate

    run = train("recipe.yaml", "runs/mine", **{"optim.learning_rate": 1e-3})
    evaluate(run)["accuracy"]

Importing the package is cheap: each name is imported where it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
"""The one place that says it: pyproject.toml reads it from here."""

_MODULE_OF = {
    **dict.fromkeys(
        ("Run", "adapt", "ask", "consolidate", "evaluate", "few_shot", "prepare"), "api"
    ),
    **dict.fromkeys(("score", "score_with_std", "train"), "api"),
    **dict.fromkeys(("load_pal_rm_a", "load_pal_rm_b", "load_reward_model"), "reward_models"),
    "Head": "heads.base",
    "MarginLoss": "losses",
    "Source": "data.sources.base",
    "UserError": "errors",
}

__all__ = [
    "Head",
    "MarginLoss",
    "Run",
    "Source",
    "UserError",
    "adapt",
    "ask",
    "consolidate",
    "evaluate",
    "few_shot",
    "load_pal_rm_a",
    "load_pal_rm_b",
    "load_reward_model",
    "prepare",
    "score",
    "score_with_std",
    "train",
]

if TYPE_CHECKING:
    from pal_ds.api import (
        Run,
        adapt,
        ask,
        consolidate,
        evaluate,
        few_shot,
        prepare,
        score,
        score_with_std,
        train,
    )
    from pal_ds.data.sources.base import Source
    from pal_ds.errors import UserError
    from pal_ds.heads.base import Head
    from pal_ds.losses import MarginLoss
    from pal_ds.reward_models import load_pal_rm_a, load_pal_rm_b, load_reward_model


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return all names, whether they were imported or not."""
    return sorted({*globals(), *__all__})
