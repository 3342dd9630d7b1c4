"""A reward model from a run or an exported folder: a torch module that scores token ids.

The names that users of PAL know, `load_pal_rm_a` and `load_pal_rm_b`, check the kind and are otherwise the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pal_ds.data.sources.base import read_lines
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.export.audience import choose_audience, mixtures_of
from pal_ds.export.card import FACTS_NAME
from pal_ds.export.configs import canonical_class, pal_config
from pal_ds.export.contents import verify_export
from pal_ds.export.tokenizer import open_tokenizer
from pal_ds.export.weights import plain_backbone
from pal_ds.heads.base import Head
from pal_ds.inference.fitted_to import FittedTo, refuse_other_table
from pal_ds.inference.load_run import OpenRun, load_model, open_run
from pal_ds.inference.score_texts import Scorer
from pal_ds.io.boundary import reading
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)


def load_reward_model(
    path: str | Path,
    mixture: Sequence[float] | None = None,
    *,
    trust_remote_code: bool = False,
    trust_checkpoint: bool = False,
    trust_code: bool = False,
    verify: bool | None = None,
) -> PreTrainedModel:
    """A model in eval mode, on the CPU, in fp32 (an exported folder: in its own dtype).

    `model(input_ids, attention_mask).logits` are the scores [B, 1]; see PalForSequenceClassification.

    Args:
        path: a directory that `train` wrote, or a folder that `consolidate` wrote.
        mixture: another user than the folder's, or than a run's population.
        trust_remote_code: run the code in an exported folder in place of pal_ds's own. A head of one's own needs it
            unless its module was imported before. Without it no code from the folder is run.
        trust_checkpoint: read a run that another owner, or anyone, may have written.
        trust_code: import the classes that a run names beyond pal_ds's own, and run code that its backbone brings.
            Without it no code that a run names is run.
        verify: hash every file of an exported folder; None does so until these very files were found to be sound once.

    Raises:
        UserError: neither lies at `path`, it is damaged, it asks for code without leave, or the mixture does not
            fit the head.
    """
    path = Path(path)
    if (path / FACTS_NAME).is_file():
        return _from_folder(path, mixture, trust_remote_code=trust_remote_code, verify=verify)
    if (path / "config.yaml").is_file():
        opened = open_run(RunDirectory(path), trust=trust_checkpoint, trust_code=trust_code)
        return model_of_run(opened, mixture)
    raise UserError(
        f"{path}: holds neither a run (config.yaml) nor an exported model ({FACTS_NAME}). Give a "
        "directory that `train` or `consolidate` wrote."
    )


def load_pal_rm_a(path: str | Path, mixture: Sequence[float] | None = None) -> PreTrainedModel:
    """The PAL-A model of a run or an exported folder; UserError where it is of another kind."""
    return _of_family("pal_a", path, mixture)


def load_pal_rm_b(path: str | Path, mixture: Sequence[float] | None = None) -> PreTrainedModel:
    """The PAL-B model of a run or an exported folder; UserError where it is of another kind."""
    return _of_family("pal_b", path, mixture)


@dataclass(frozen=True)
class Whom:
    """For whom texts are scored: one of these, or nobody in particular."""

    user: str | None = None
    """Id of a user of the run, or of the table `users_dir`."""
    mixture: Sequence[float] | None = None
    group: str | None = None
    """A group of the run's data, for a head that asks for it."""
    users_dir: Path | None = None
    """A folder that `adapt` wrote, in which users are looked up first."""

    @property
    def is_named(self) -> bool:
        """True where one user, mixture or group is given for all texts."""
        return any(who is not None for who in (self.user, self.mixture, self.group))


def scorer_of_run(
    run: RunDirectory,
    whom: Whom,
    step: str = "latest",
    *,
    trust: bool = False,
    trust_code: bool = False,
) -> Scorer:
    """Return a scorer with a run, as `score --run_dir` has it. Raises UserError as `open_run` and `choose_audience`."""
    opened = open_run(run, step, trust=trust, trust_code=trust_code)
    model = model_of_run(opened)
    groups, users = opened.data.groups, opened.users
    if model.head.has_points:
        opened.refuse_other_table(whom.users_dir, model.head)
    audience = choose_audience(model.head, users, groups=groups, **vars(whom))
    model.config.mixture = audience.mixture
    encoder = TextEncoder.from_info(opened.data.info["tokens"], opened.data.tokenizer_path)
    if not model.head.is_personal:
        return Scorer(model, encoder)
    by_group = "group" in model.head.needs

    def points_of(names: Sequence[str]) -> list[list[float]]:
        if not by_group:
            return mixtures_of(model.head, users, names, whom.users_dir).tolist()
        of_groups = [choose_audience(model.head, users, group=n, groups=groups) for n in names]
        return [list(one.mixture or ()) for one in of_groups]

    return Scorer(
        model,
        encoder,
        points_of,
        line_key="group" if by_group else "user_id",
        is_for_one=whom.is_named,
        needs_names=whom.users_dir is not None and whom.user is None,
    )


def scorer_of_export(
    folder: Path, whom: Whom, *, trust_remote_code: bool = False, verify: bool | None = None
) -> Scorer:
    """Return a scorer with an exported folder, as `score --model` has it; `verify` is that of `load_reward_model`.

    Raises:
        UserError: no exported folder, a damaged one, or a user or group that it cannot know.
    """
    if whom.group is not None:
        raise UserError(
            "score: an exported model knows no groups. Export one of a group (consolidate --group), score with "
            "--run_dir, or give --mixture."
        )
    if whom.user is not None and whom.users_dir is None:
        raise UserError(
            "score: an exported model knows no user ids. Give --user with the --users folder that holds "
            "it, score with --run_dir, or give --mixture."
        )
    if not (folder / FACTS_NAME).is_file():
        raise UserError(f"--model {folder}: {_what_is_missing(folder)}")
    facts = verify_export(folder, whole=verify)
    tokens = facts["tokens"]
    encoder = TextEncoder(
        open_tokenizer(folder),
        max_length=tokens["max_length"],
        separator=tokens["separator"] or "",
        chat_template="auto" if tokens["chat_template"] else "never",
        # The tokenizer of a stock export writes them into every text by itself.
        special_tokens=tokens["special_tokens"] and not facts["stock_class"],
        clock=tokens.get("clock"),
    )
    encoder.take_header(tokens)
    model: Any = load_reward_model(folder, whom.mixture, trust_remote_code=trust_remote_code)
    if whom.users_dir is not None:
        if facts["mixture"] is None:
            raise UserError(
                f"{folder}: {facts['head']} has one reward for everyone: leave out --user."
            )
        _refuse_other_table(folder, facts, whom.users_dir)
        if whom.user is not None:
            audience = choose_audience(model.head, UserTable.load(whom.users_dir), **vars(whom))
            model.config.mixture = audience.mixture
    if facts["mixture"] is None:
        return Scorer(model, encoder)
    return Scorer(
        model,
        encoder,
        partial(_exported_points, folder, model.head, whom.users_dir),
        is_for_one=whom.is_named,
        needs_names=whom.users_dir is not None and whom.user is None,
    )


def _refuse_other_table(folder: Path, facts: dict[str, Any], users_dir: Path) -> None:
    """Raise UserError where users were fitted to another model than the one that was exported."""
    if "head_hash" not in facts:
        logger.warning(
            "%s: an older version exported it, so nothing says whether the users of %s were fitted to its run and step",
            folder,
            users_dir,
        )
        return
    model: FittedTo = {
        "run": f"the run behind {folder}",
        "step": facts.get("step", 0),
        "head": facts["head_hash"],
    }
    refuse_other_table(users_dir, model, adapt_to=f"--run_dir RUN --step {model['step']}")


def _what_is_missing(folder: Path) -> str:
    """Say why a folder is no exported model."""
    if not folder.is_dir():
        return f"no such folder (looked from {Path.cwd()})."
    if (folder / "config.yaml").is_file():
        return f"no {FACTS_NAME} here; it is a run: give it as --run_dir, or export it by `pal-ds consolidate`."
    of_users = sorted(file.parent.name for file in folder.glob(f"*/{FACTS_NAME}"))
    if of_users:
        named = ", ".join(of_users[:5]) + (", ..." if len(of_users) > 5 else "")
        return (
            f"no {FACTS_NAME} here; it holds {len(of_users)} exported models: {named}. Name one of them: "
            f"--model {folder / of_users[-1]}"
        )
    return f"no {FACTS_NAME} here; make it by `pal-ds consolidate`."


def _exported_points(
    folder: Path, head: Head, users_dir: Path | None, user_ids: Sequence[str]
) -> list[list[float]]:
    """Mixtures of users by id, of a table or of those that the export itself was told of."""
    if users_dir is not None:
        return mixtures_of(head, UserTable.load(users_dir), user_ids).tolist()
    listed = folder / "users.jsonl"
    if not listed.is_file():
        raise UserError(
            "the line names a user_id, and this exported model knows no user ids. Give the --users folder that holds "
            "them, score with --run_dir, or take the key out of the lines to score all for the model's own user."
        )
    known = {str(line["user_id"]): line["mixture"] for _, line in read_lines(listed)}
    for user_id in user_ids:
        if user_id not in known:
            raise UserError(f"user_id {user_id!r} is none of the users in {listed}.")
    return [known[user_id] for user_id in user_ids]


def model_of_run(
    opened: OpenRun, mixture: Sequence[float] | None = None
) -> PalForSequenceClassification:
    """An open run's model as the exported class, in fp32, without writing anything."""
    model = load_model(opened)
    audience = choose_audience(model.head, opened.users, mixture=mixture)
    with torch.device("meta"):
        exported = PalForSequenceClassification(pal_config(opened, audience.mixture))
    exported.backbone = plain_backbone(model)
    exported.head = model.head
    return exported.eval().requires_grad_(False)


def _from_folder(
    folder: Path,
    mixture: Sequence[float] | None,
    *,
    trust_remote_code: bool,
    verify: bool | None = None,
) -> PreTrainedModel:
    facts = verify_export(folder, whole=verify)
    if facts["mixture"] is None and mixture is not None:
        raise UserError(
            f"{folder}: {facts['head']} has one reward for everyone: leave out mixture."
        )
    options: dict[str, Any] = {} if mixture is None else {"mixture": list(mixture)}
    cls: Any = PalForSequenceClassification
    if trust_remote_code:
        cls, options = AutoModelForSequenceClassification, {**options, "trust_remote_code": True}
    with reading(folder, "exported model", "Copy the folder again, or export again."):
        if facts["stock_class"] and not trust_remote_code:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            stock: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
            cls = canonical_class(stock)
        return cls.from_pretrained(folder, local_files_only=True, **options).eval()


def _of_family(family: str, path: str | Path, mixture: Sequence[float] | None) -> PreTrainedModel:
    model = load_reward_model(path, mixture)
    actual = getattr(getattr(model, "head", None), "family", "bradley_terry")
    if actual != family:
        raise UserError(
            f"{path}: holds a {actual} model, not {family}. load_reward_model takes any kind."
        )
    return model
