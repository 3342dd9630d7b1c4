"""`evaluate --best_of_n`: reads candidates, scores them for their users, and writes D/eval/NAME.json."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from pal_ds.data.parse import parse_record
from pal_ds.data.parse_lists import check_list
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, read_lines
from pal_ds.data.sources.given import GivenRecords
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData, targets
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.best_of_n_metrics import FIGURES, Lists, best_of_n_figures
from pal_ds.eval.evaluate import opened_pairs
from pal_ds.eval.figures import refuse_no_numbers
from pal_ds.eval.results import EvalRequest, write_figures
from pal_ds.eval.schema import BestOfNFigures, RankingFigures
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.readers import KnownUsers, reader_of, with_points

FEWEST_COMPARED = 3
"""Responses of a list from a split: two are a pair, of which accuracy tells."""
_KEYS = ("user_id", "prompt", "responses", "prompt_features", "response_features", "scores")


class Candidates(NamedTuple):
    """Candidates from which users choose; axes as in `best_of_n_metrics`."""

    first: np.ndarray
    """int64 [L + 1]."""
    response: np.ndarray
    """Row of each candidate, int64 [N]; a list may hold a response twice."""
    utility: np.ndarray
    """fp64 [N]."""
    user: np.ndarray
    """Row of each list's user in the data, int64 [L]."""


class Line(NamedTuple):
    """A line of a file of candidates."""

    where: str
    fields: Mapping[str, object]
    distinct: list[Any]
    """Its distinct responses, in order of appearance."""
    place: list[int]
    """Place of each candidate in `distinct`."""
    scores: list[float]

    def records(self, number: int) -> Iterator[Record]:
        """Pairs that name each distinct response once, or the first twice; their group is the line's number."""
        kept = ("user_id", "prompt", "prompt_features")
        whole = {key: self.fields[key] for key in kept if key in self.fields}
        for one, other in paired(len(self.distinct)):
            both = [self.distinct[one], self.distinct[other]]
            pair = {"response_1": both[0], "response_2": both[1]}
            if "response_features" in self.fields:
                pair = {"response_features": both}
            yield parse_record({**whole, **pair, "y": 1, "group": str(number)}, self.where)


def paired(size: int) -> list[tuple[int, int]]:
    """Pair 0 with 1, 2 with 3, ...; the last of an odd number with 0 (alone: a pair that `build_tables` drops).

    >>> paired(5)
    [(0, 1), (2, 3), (4, 0)]
    """
    return [(place, place + 1 if place + 1 < size else 0) for place in range(0, size, 2)]


def rank_set(
    restored: OpenRun, known: KnownUsers, request: EvalRequest, world: World
) -> BestOfNFigures:
    """The figures of eval/NAME.json for best of n, written by rank 0 and returned on every rank.

    Of a file each line is a list: {"user_id", "prompt", "responses": [..], "scores": [..]}, the scores being the
    user's own utilities. Of a split it is the responses to one prompt that a user compared, at least three, and the
    utility of each is the share of its comparisons that it won.

    Raises:
        UserError: a line that is no such list, or no list at all.
    """
    if "group" in restored.model.head.needs:
        raise UserError(
            "--best_of_n: this run's head asks for the group of a comparison, and lists have none. Export a domain "
            "with --mixture and score the candidates with `score`."
        )
    lines: list[Line] = []
    file = request.pairs
    if isinstance(file, Source) and not isinstance(file, GivenRecords):
        raise UserError(
            "--best_of_n: a source has pairs, and lists of candidates come from --data."
        )
    if file is not None:
        lines = world.on_every_rank(lambda: read_lists(file))

    def pairs_of(_: Path | Source) -> Iterator[Record]:
        return (pair for number, line in enumerate(lines) for pair in line.records(number))

    with opened_pairs(restored, file, world, pairs_of, request.out) as data:
        dropped = {}
        if file is None:
            candidates = compared_candidates(data, request.rows(data))
        else:
            candidates, num_dropped = listed_candidates(data, lines)
            dropped = {"dropped": {"lists": num_dropped, **data.info["dropped"]}}
        if len(candidates.user) == 0:
            raise UserError(
                f"--best_of_n, {request.name}: no user compared {FEWEST_COMPARED} or more responses to one prompt."
            )
        known = with_points(known, restored, data, world)
        scores = score_candidates(restored, known, data, candidates, world)
        refuse_no_numbers(scores, restored)
        ranking, unknown = _figures(data, candidates, scores, known.table_rows(data))
    made = {**ranking, "unknown_users": unknown, **dropped, "step": restored.step}
    figures = cast(BestOfNFigures, made)
    write = functools.partial(write_figures, restored.run, request.name, figures, request.out)
    world.from_rank_zero(write)
    return figures


def _figures(
    data: PreparedData, candidates: Candidates, scores: np.ndarray, table_rows: np.ndarray
) -> list[RankingFigures]:
    """Compute the figures of lists whose users the run knows, and of strangers' lists."""
    names = np.asarray([data.users[user] for user in candidates.user], str)
    prompts = data.response_prompt[candidates.response[candidates.first[:-1]]]
    lists = Lists(candidates.first, candidates.utility, names, prompts)
    lengths = None
    if data.response_num_chars is not None:
        lengths = data.response_num_chars[candidates.response].astype(float)
    parts: list[RankingFigures] = []
    is_known = table_rows[candidates.user] >= 0
    for chosen in (is_known, ~is_known):
        part, places = lists.take(chosen)
        longest = None if lengths is None else lengths[places]
        parts.append(best_of_n_figures(part, scores[places], longest))
    return parts


def score_candidates(
    restored: OpenRun, known: KnownUsers, data: PreparedData, candidates: Candidates, world: World
) -> np.ndarray:
    """Reward of each candidate for its user, fp64 [N], on every rank; a response twice in a list is scored once."""
    sizes = np.diff(candidates.first)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    num_responses = len(data.response_prompt)
    entries, entry = np.unique(owner * num_responses + candidates.response, return_inverse=True)
    owner, response = np.divmod(entries, num_responses)
    begin = np.searchsorted(owner, np.arange(len(sizes)))
    place = np.arange(len(entries)) - begin[owner]
    one = np.flatnonzero(place % 2 == 0)
    # Two by two, so that each is read once; what is left over goes with the first of its list.
    follows = np.append(owner[1:] == owner[:-1], False)[one]
    other = np.where(follows, np.minimum(one + 1, len(entries) - 1), begin[owner[one]])
    table = np.zeros(len(one), COMPARISON_DTYPE)
    table["user"] = candidates.user[owner[one]]
    table["a"], table["b"] = response[one], response[other]
    data, rows = replace(data, comparisons=table), np.arange(len(table))
    reader = reader_of(restored, data, rows, known.table_rows(data), world)
    rewards = reader.forwards(world, "scoring").rewards(rows, known.mixtures)
    scores = np.empty(len(entries))
    scores[other] = rewards[:, 1]
    scores[one] = rewards[:, 0]
    return scores[entry]


def compared_candidates(data: PreparedData, rows: np.ndarray) -> Candidates:
    """Lists from comparisons: what one user compared for one prompt, with the share that each won (a tie: half)."""
    table = data.comparisons[rows]
    num_prompts, num_responses = int(data.response_prompt.max()) + 1, len(data.response_prompt)
    keys = table["user"] * num_prompts + data.response_prompt[table["a"]]
    lists, owner = np.unique(keys, return_inverse=True)
    sides = np.concatenate([owner * num_responses + table[side] for side in ("a", "b")])
    entries, entry = np.unique(sides, return_inverse=True)
    share = targets(table).astype(float)
    won = np.concatenate([1 - share, share])
    utility = np.bincount(entry, weights=won) / np.bincount(entry)
    owner, response = np.divmod(entries, num_responses)
    sizes = np.bincount(owner, minlength=len(lists))
    kept = sizes >= FEWEST_COMPARED
    return Candidates(
        first=np.concatenate([[0], np.cumsum(sizes[kept])]),
        response=response[kept[owner]],
        utility=utility[kept[owner]],
        user=lists[kept] // num_prompts,
    )


def listed_candidates(data: PreparedData, lines: list[Line]) -> tuple[Candidates, int]:
    """The lists of a file from the tables made of its pairs, and how many were dropped.

    A list is dropped where one of its texts was, see "dropped" in dataset.json.
    """
    number = np.asarray([int(name) for name in data.groups])[data.comparisons["group"]]
    places: dict[int, list[int]] = {}
    for row, line in enumerate(number.tolist()):
        places.setdefault(line, []).append(row)
    sizes, response, utility, users = [], [], [], []
    for line_number, rows in places.items():
        line, table = lines[line_number], data.comparisons[rows]
        pairs = paired(len(line.distinct))
        if len(pairs) != len(rows):
            continue
        row_of = {}
        for (one, other), pair in zip(pairs, table, strict=True):
            row_of |= {one: int(pair["a"]), other: int(pair["b"])}
        sizes.append(len(line.place))
        response += [row_of[place] for place in line.place]
        utility += line.scores
        users.append(int(table["user"][0]))
    candidates = Candidates(
        first=np.cumsum([0, *sizes]),
        response=np.asarray(response, np.int64),
        utility=np.asarray(utility, float),
        user=np.asarray(users, np.int64),
    )
    return candidates, len(lines) - len(users)


def read_lists(file: Path | GivenRecords) -> list[Line]:
    """The lines of JSONL files of candidates, checked. Raises UserError with file and line."""
    if isinstance(file, GivenRecords):
        rows = [*file.lines()]
    else:
        rows = [row for path in check_files(file) for row in read_lines(path)]
    return [_line(fields, where) for where, fields in rows]


def _line(fields: object, where: str) -> Line:
    if isinstance(fields, UserError):
        raise fields
    if not isinstance(fields, dict):
        raise UserError(
            f"{where}: expected an object, found {type(fields).__name__}; JSON Lines hold one object a line. Of a file "
            "that is one list: jq -c '.[]' FILE > LINES.jsonl"
        )
    if unknown := [key for key in fields if key not in _KEYS]:
        raise UserError(f"{where}: unknown key '{unknown[0]}'; a list has {', '.join(_KEYS)}.")
    _, responses, scores = check_list(fields, where)
    names = [json.dumps(response, sort_keys=True) for response in responses]
    distinct = list(dict.fromkeys(names))
    place = {name: number for number, name in enumerate(distinct)}
    first = [responses[names.index(name)] for name in distinct]
    return Line(where, fields, first, [place[name] for name in names], scores)


def ranking_line(name: str, figures: Mapping[str, Any]) -> str:
    """Summarise best-of-n figures in one line for people."""
    parts = [f"{name}: {figures['lists']} lists"]
    for who, part in (("", figures), ("users not in the run: ", figures["unknown_users"])):
        if part["lists"]:
            shown = ", ".join(
                f"{figure} {part[figure]:.4f} (random {part['baselines']['random'][figure]:.4f})"
                for figure in FIGURES
            )
            parts.append(f"{who}{part['lists']} lists, {shown}" if who else shown)
    return "; ".join(parts)
