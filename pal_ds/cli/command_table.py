"""The commands by name: where each lives and what it does in one line, so that `--help` imports nothing else."""

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A command before it is imported."""

    location: str
    """`module:Class` below `pal_ds.cli`."""
    summary: str
    """The first line of the class's docstring; a test compares the two."""
    shipped: str | None = None
    """Folder of the package whose YAML files `--config` knows by name; None where `--config` is no recipe."""

    joins_ranks: bool = False
    """Whether a launcher may start it as several ranks: those other than rank 0 then leave the word to it."""

    def load(self) -> Any:
        """The class, with `add_arguments(parser)` and `run(options, unresolved)`."""
        module, _, name = self.location.partition(":")
        return getattr(importlib.import_module(f"pal_ds.cli.{module}"), name)


COMMANDS = {
    "prepare": Entry(
        "training_commands:Prepare",
        "Raw preference data to prepared tables, users and splits.",
        "recipes",
    ),
    "embed": Entry(
        "training_commands:Embed",
        "Encode all texts with a frozen backbone into `backbone.cache`; resumable, ends with 75 where it was stopped.",
        "recipes",
        joins_ranks=True,
    ),
    "train": Entry(
        "training_commands:Train",
        "Train a reward model; resumes where the run directory holds checkpoints.",
        "recipes",
        joins_ranks=True,
    ),
    "evaluate": Entry(
        "evaluation_commands:Evaluate",
        "Accuracy per user of a run on a split or on files, or best of n; exact at any world size.",
        joins_ranks=True,
    ),
    "adapt": Entry(
        "evaluation_commands:Adapt",
        "Fit new users to a trained run from a few comparisons each; the model stays as it is.",
    ),
    "few_shot": Entry(
        "evaluation_commands:FewShot",
        "Accuracy of held-out users after k comparisons, for several k; result goes to eval/few_shot.json.",
    ),
    "ask": Entry(
        "ask:Ask",
        "Choose for each fitted user the comparisons, out of a pool, whose answers would tell most.",
    ),
    "users": Entry("evaluation_commands:Users", "List the users of a run, or make it forget one."),
    "score": Entry(
        "export_commands:Score",
        "Scalar scores for texts in a JSONL file, from an exported model or a run.",
    ),
    "report": Entry(
        "evaluation_commands:Report", "Pictures and a page for one run, or several side by side."
    ),
    "compare": Entry(
        "training_commands:Compare",
        "Train and evaluate a suite of methods over seeds on one dataset; resumable, ends in a table with intervals.",
        "suites",
        joins_ranks=True,
    ),
    "consolidate": Entry(
        "export_commands:Consolidate",
        "Sharded checkpoint to a scalar reward model that transformers opens by itself.",
    ),
    "reshard": Entry(
        "training_commands:Reshard",
        "Rewrite a checkpoint for another number of ranks, as if they had written it.",
    ),
    "plan": Entry(
        "training_commands:Plan",
        "Parameters and bytes per GPU of a recipe under ZeRO-3, from the backbone's config.json alone.",
        "recipes",
    ),
    "submit": Entry(
        "submit:Submit", "Check a job for SLURM against its recipe and hand it to sbatch."
    ),
    "import-reference": Entry(
        "export_commands:ImportReference",
        "Checkpoint of the PAL reference to a reward model folder and a user table.",
    ),
    "retention": Entry(
        "evaluation_commands:Retention",
        "Accuracy on general sets before and after a model was trained further, as a table.",
    ),
}
