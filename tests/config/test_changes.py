"""Keys that a resumed run may change: those are offered that `--allow_change` lets through, and no others."""

from pathlib import Path

import pytest

from pal_ds.config.changes import refuse_changes
from pal_ds.errors import UserError

OLD = "users: {reliability: none, tie_threshold: none}\nloss: {ties: half}\ntrain: {seed: 0}\n"


@pytest.mark.parametrize(
    ("new", "allowed", "said"),
    [
        (
            OLD.replace("reliability: none", "reliability: learnt"),
            [],
            "reliability: 'none' -> 'learnt'. Restore users.reliability, which decides what a checkpoint holds, or "
            "start in",
        ),
        (
            OLD.replace("reliability: none", "reliability: learnt"),
            ["users.reliability"],
            "Restore users.reliability, which",
        ),
        (
            OLD.replace("reliability: none", "reliability: learnt").replace("seed: 0", "seed: 1"),
            [],
            "holds, pass --allow_change train.seed for the rest, or start in",
        ),
        (
            OLD.replace("tie_threshold: none", "tie_threshold: learnt"),
            ["users.tie_threshold"],
            "Restore users.tie_threshold, which decides",
        ),
        (OLD.replace("half", "davidson"), ["loss.ties"], "Restore loss.ties, which decides"),
        (OLD.replace("half", "drop"), [], "Restore them, pass --allow_change loss.ties, or start"),
    ],
)
def test_only_what_is_allowed_is_offered(
    tmp_path: Path, new: str, allowed: list[str], said: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(OLD)
    with pytest.raises(UserError) as error:
        refuse_changes(file, new, allowed)
    assert said in str(error.value)


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(OLD)
    refuse_changes(file, OLD.replace("half", "drop"), ["loss.ties"])
    refuse_changes(file, OLD, ["users.reliability"])
