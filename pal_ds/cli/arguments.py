"""Options and values that several commands read from the command line."""

import argparse
from pathlib import Path

from jsonargparse import ArgumentParser


def add_run_arguments(parser: ArgumentParser) -> None:
    """Which checkpoint of which run."""
    parser.add_argument("--run_dir", type=str, required=True, help="directory that `train` wrote")
    parser.add_argument("--step", type=str, default="latest", help="a number, latest or best")
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
    )


def as_path(text: str | None) -> Path | None:
    """None stays None."""
    return None if text is None else Path(text)


def keys(text: str | list[str]) -> list[str]:
    """Names separated by commas, in brackets or not."""
    if not isinstance(text, str):
        return text
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]


def mixture(text: str | list[float]) -> list[float]:
    """Weights separated by commas, `0.2,0.8`; whether they fit a head is checked where one is."""
    if not isinstance(text, str):
        # jsonargparse runs the type once more over what it gave.
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers separated by commas, as in 0.2,0.8"
        ) from None
