"""The one form of token ids that trainer and exported model both score; stdlib only.

An exported model folder carries this very file, so that text which reached the model with or
without special tokens is scored as the trainer scored it.
"""

from collections.abc import Sequence


def num_leading(ids: Sequence[int], prefix_ids: Sequence[int]) -> int:
    """Count the ids at the front that are (repeats of) the prefix."""
    width, count = len(prefix_ids), 0
    prefix = list(prefix_ids)
    while width and list(ids[count : count + width]) == prefix:
        count += width
    return count


def canonical_ids(
    ids: Sequence[int],
    prefix_ids: Sequence[int],
    end_ids: Sequence[int],
    max_length: int | None = None,
    end_variants: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Prefix + ids + end, each special exactly once, cut from the left to `max_length`.

    Prefixes and ends that the text or the tokenizer already put there are stripped first, and whatever
    else may stand for an end (`end_variants`: the end of a turn with a line feed behind it). The cut
    keeps the prefix and the last ids. Look for the prompt (`find_prompt_length`) before the cut: with
    `max_length=None` nothing is cut.

    >>> canonical_ids([1, 7, 8, 2], prefix_ids=[1], end_ids=[2])
    [1, 7, 8, 2]
    >>> canonical_ids([6, 7, 8], prefix_ids=[1], end_ids=[2], max_length=4)
    [1, 7, 8, 2]
    >>> canonical_ids([7, 8, 2, 9, 2], prefix_ids=[], end_ids=[2], end_variants=[[2], [2, 9]])
    [7, 8, 2]
    """
    body = list(ids[num_leading(ids, prefix_ids) :])
    ends = sorted((list(end) for end in end_variants or [end_ids] if end), key=len, reverse=True)
    while end := next((end for end in ends if body[-len(end) :] == end), None):
        del body[-len(end) :]
    body += end_ids
    if max_length is not None and len(prefix_ids) + len(body) > max_length:
        keep = max_length - len(prefix_ids)
        if keep <= 0:
            raise ValueError(
                f"max_length {max_length} leaves no room after the {len(prefix_ids)} prefix tokens"
            )
        body = body[-keep:]
    return [*prefix_ids, *body]


def truncated(
    length: int, num_prefix: int, budget: int, num_marker: int, side: str
) -> tuple[int, int]:
    """Choose which of a prompt's `length` ids go to leave `budget`: from the first number up to the second.

    The prefix stays. `left` cuts behind it; `right` in front of the response marker, the last
    `num_marker` ids, of which as many stay as there is room for.
    """
    num_cut = max(length - budget, 0)
    first = num_prefix
    if side == "right":
        first = max(length - num_cut - num_marker, num_prefix)
    return first, first + num_cut


def find_runs(ids: Sequence[int], marker_ids: Sequence[int]) -> list[int]:
    """Start of every occurrence of `marker_ids` in `ids`."""
    marker, width = list(marker_ids), len(marker_ids)
    if not width:
        return []
    first = marker[0]
    return [
        start
        for start in range(len(ids) - width + 1)
        if ids[start] == first and list(ids[start : start + width]) == marker
    ]


def find_prompt_length(
    ids: Sequence[int],
    marker_ids: Sequence[int],
    user_marker_ids: Sequence[int] | None = None,
    *,
    may_be_empty: bool = False,
) -> int:
    """Number of ids before the response: just past the response marker.

    Without `user_marker_ids` the marker must occur exactly once. With them, once per user marker,
    and the last one counts. Anything else raises ValueError, for a response that holds a marker
    could otherwise move its own boundary. A marker with nothing after it starts no response and
    is not counted: it is the end token where both are one id ([SEP]). With `may_be_empty` (for ids
    without the end) it starts an empty response where no other marker can be the response's.
    """
    places = find_runs(ids, marker_ids)
    starts = [start for start in places if start + len(marker_ids) < len(ids)]
    num_expected = 1 if not user_marker_ids else len(find_runs(ids, user_marker_ids))
    if may_be_empty and len(starts) < len(places) == num_expected:
        starts = places
    remedy = "pass prompt_lengths to say where the response begins"
    if not starts:
        raise ValueError(f"no response marker {list(marker_ids)} in the text; {remedy}")
    if len(starts) != num_expected:
        raise ValueError(
            f"{len(starts)} response markers {list(marker_ids)} in the text, but the conversation "
            f"explains {num_expected}; {remedy}"
        )
    return starts[-1] + len(marker_ids)
