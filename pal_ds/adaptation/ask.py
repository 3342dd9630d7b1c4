"""`ask`: for each fitted user the comparisons, out of a pool, whose answers would tell most."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pal_ds.adaptation.candidates import Candidates
from pal_ds.adaptation.chooser import Chooser, Users
from pal_ds.adaptation.fit import pairs_per_chunk
from pal_ds.adaptation.strategies import STRATEGIES, Choice, Prompts, Strategy
from pal_ds.data.sources import Jsonl
from pal_ds.data.sources.base import check_files
from pal_ds.data.tables import PreparedData
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.errors import UserError, writing
from pal_ds.eval.evaluate import opened_pairs
from pal_ds.heads.jaxtyping_fallback import Bool, Int
from pal_ds.inference.load_run import OpenRun, restore
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.posterior_file import known_posterior
from pal_ds.inference.readers import reader_of
from pal_ds.inference.rewards_at import scored_pairs
from pal_ds.io.files import replacing
from pal_ds.progress import progress_bar
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from pal_ds.users.ids import POPULATION_USER

logger = logging.getLogger(__name__)

_NAMED = 5
"""Users whom a warning names."""


@dataclass(frozen=True)
class AskOptions:
    """Options of `ask_run`."""

    candidates: Jsonl
    """The pool."""
    users: Path
    """Folder that `adapt` wrote."""
    num: int = 10
    """Comparisons for each user; of who has fewer candidates, all."""
    strategy: Strategy = "bald"
    only: tuple[str, ...] = ()
    """Ids of the users to ask; none for all of the folder."""
    step: str = "latest"
    seed: int = 0
    trust_checkpoint: bool = False
    trust_code: bool = False


class AskResult(NamedTuple):
    """Numbers of what `ask_run` wrote."""

    num_users: int
    num_candidates: int


def ask_run(run: RunDirectory, out: Path, options: AskOptions) -> AskResult:
    """Write OUT, JSON Lines: for each user `num` candidates, the most telling first, to be answered.

    A line is the candidate's own fields with `user_id`, `gain` (see `strategies.Choice`) and `rank` from 1; with a `y`
    added to it, it is a line of `adapt --pairs`.

    Raises:
        UserError: a strategy or number that is none; users without a posterior, or who are not in the folder;
            candidates that cannot be read, or none for any user. A user with fewer than `num` is asked them all.
    """
    if options.strategy not in STRATEGIES:
        raise UserError(f"--strategy {options.strategy}: must be one of {', '.join(STRATEGIES)}.")
    if options.num < 1:
        raise UserError(f"--num is {options.num}; it must be at least 1.")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: must be a file in a folder that exists.")
    if out.exists() and any(out.samefile(path) for path in check_files(options.candidates.path)):
        raise UserError(f"--out {out}: is one of the --candidates. Name another file.")
    world = World(0, 1, torch.device("cpu"))
    leave = {"trust": options.trust_checkpoint, "trust_code": options.trust_code}
    restored = restore(run, options.step, world.device, **leave)
    users = _users(restored, options)
    source = Candidates(options.candidates)
    with opened_pairs(restored, source, world) as data:
        pool = _Pool.of(data, source, users.ids)
        rows = pool.rows
        nobody = np.full(len(data.users), -1, np.int64)
        reader = reader_of(restored, data, rows, nobody, world, encode_ahead=True)
        size = pairs_per_chunk(restored.model.head, reader.collator, rows)
        scored = scored_pairs(reader.model, reader.collator, rows, size)
        prompts = torch.zeros(int(scored.sides.max()) + 1, dtype=torch.int64)
        codes = data.comparisons[rows]["a"], data.comparisons[rows]["b"]
        for side, code in enumerate(codes):
            prompts[scored.sides[:, side]] = torch.from_numpy(data.response_prompt[code])
    num_of = pool.num_for_each(options.num)
    largest = 0.0
    most = int(num_of.max())
    chooser = Chooser(options.strategy, most, options.seed, scored, Prompts.of(prompts))
    with writing(out), replacing(out) as aside, open(aside, "w", encoding="utf-8") as stream:
        for part, choice in choices(chooser, users, pool):
            for user, count, places, gains in zip(
                users.ids[part],
                num_of[part].tolist(),
                choice.candidate.tolist(),
                choice.gain.tolist(),
                strict=True,
            ):
                # Behind those that this user may be asked stand some that are others'.
                own = list(zip(places, gains, strict=True))[:count]
                for rank, (place, gain) in enumerate(own, start=1):
                    largest = max(largest, gain)
                    line = {**pool.questions[place], "user_id": user, "gain": gain, "rank": rank}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    if options.strategy in ("bald", "d_optimal") and largest <= 0:
        logger.warning(
            "no answer would tell anything of these users: all gains are 0, as with one prototype, or where the "
            "responses of every candidate score alike for everyone"
        )
    return AskResult(len(users.ids), len(rows))


def _users(restored: OpenRun, options: AskOptions) -> Users:
    head = restored.model.head
    if "logits" not in head.needs:
        raise UserError(
            f"{restored.run.path}: its head fits no user's point: it has no users, or knows them by group or by their "
            "comparisons. No question can be chosen for them."
        )
    restored.refuse_other_table(options.users, head)
    table = UserTable.load(options.users)
    ids = list(dict.fromkeys(options.only)) or list(table.ids)
    if unknown := [user for user in ids if user not in table]:
        raise UserError(
            f"--user {unknown[0]}: not among the {len(table.ids)} users of {options.users}. Fit this user with "
            "`pal-ds adapt` first."
        )
    posterior = known_posterior(options.users, "ask")(ids)
    point = user_mixtures(head, table)[:-1][table.rows(ids)]
    r = table.log_reliability[table.rows(ids)] if table.has_reliability else None
    return Users(ids, point, posterior.covariance, r)


class _Pool(NamedTuple):
    """Candidates of the tables, without repeats."""

    rows: np.ndarray
    questions: list[dict[str, object]]
    """The line of each row."""
    user_ids: list[str]
    owner: np.ndarray
    """Place in `user_ids` of the one user whom a candidate is for, -1 where it is for everyone; int64 [C]."""

    @staticmethod
    def of(data: PreparedData, source: Candidates, user_ids: list[str]) -> "_Pool":
        """Raises UserError for a candidate of a user who is not asked, and not in the table either."""
        table = data.comparisons
        place = {user: number for number, user in enumerate(user_ids)}
        codes = np.array([place.get(user, -1) for user in data.users], np.int64)
        is_common = np.array([user == POPULATION_USER for user in data.users], bool)
        owner = np.where(is_common[table["user"]], -1, codes[table["user"]])
        is_wanted = is_common[table["user"]] | (owner >= 0)
        stranger = data.users[int(table["user"][is_wanted.argmin()])]
        if lost := int((~is_wanted).sum()):
            logger.warning(
                "%d candidates are for users who are not asked (%s): left out", lost, stranger
            )
        pairs = np.sort(np.stack([table["a"], table["b"]], 1), 1)
        # Everyone's first: what a user shares with everyone is asked once, too.
        wanted = np.flatnonzero(is_wanted)
        wanted = wanted[np.argsort(owner[wanted] >= 0, kind="stable")]
        _, pair = np.unique(pairs[wanted], axis=0, return_inverse=True)
        common = np.isin(pair, pair[owner[wanted] < 0])
        keys = np.where(common, -1, owner[wanted]), pair
        _, first = np.unique(np.stack(keys, 1), axis=0, return_index=True)
        rows = np.sort(wanted[first])
        if repeated := len(wanted) - len(rows):
            logger.warning("%d candidates are there more than once: each is asked once", repeated)
        if dropped := len(source.questions) - len(table):
            listed = ", ".join(f"{name} {count}" for name, count in data.info["dropped"].items())
            logger.warning("%d candidates cannot be scored (%s): left out", dropped, listed)
        if len(rows) == 0:
            raise UserError(
                f"--candidates: all are for users who are not asked ({stranger}). Name these users, or leave user_id "
                "out of what everyone may be asked."
            )
        questions = [source.questions[int(number)] for number in table["margin"][rows]]
        return _Pool(rows, questions, user_ids, owner[rows])

    def available(self, part: slice) -> Bool[np.ndarray, "u C"]:
        """Tell which candidates each of these users may be asked."""
        place = np.arange(len(self.user_ids))[part, None]
        return (self.owner == -1) | (self.owner == place)

    def num_for_each(self, num: int) -> Int[np.ndarray, "u"]:
        """How many candidates each user is asked: `num`, or all there are for them, with a warning; int64."""
        counts = np.bincount(self.owner[self.owner >= 0], minlength=len(self.user_ids))
        counts = counts + (self.owner == -1).sum()
        few = np.flatnonzero(counts < num)
        if len(few):
            named = ", ".join(f"{self.user_ids[u]!r} {counts[u]}" for u in few[:_NAMED])
            more = f", and {len(few) - _NAMED} more users" if len(few) > _NAMED else ""
            logger.warning(
                "--num %d: fewer different candidates for %s%s. They are asked what there is; give more candidates, or "
                "a smaller --num",
                num,
                named,
                more,
            )
        return np.minimum(counts, num)


def choices(chooser: Chooser, users: Users, pool: _Pool) -> Iterator[tuple[slice, Choice]]:
    """The choice for all users, some at a time."""
    size = chooser.users_at_once
    steps = range(0, len(users.ids), size)
    with progress_bar("asking", len(steps), shown=True, unit="users") as advance:
        for begin in steps:
            phase.progress()
            part = slice(begin, begin + size)
            some = users.some(part)
            yield part, chooser.choose(some, torch.from_numpy(pool.available(part)))
            advance(len(some.ids))
