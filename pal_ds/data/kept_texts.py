"""A few texts kept as they were, so that an export can be checked from raw text later."""

import heapq
from collections import deque

from pal_ds.data.splits import Membership

NUM_SAMPLES = 64


class SampleKeeper:
    """Holds candidates for `samples.jsonl` while the splits are not yet known.

    Dev and test are the prompts with the lowest fraction (split: hash), the last ones (ordinal) or
    named (field); a few of each kind are kept, and `choose` takes those that proved to be held out.
    """

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._lowest: list[tuple[float, int, dict]] = []
        self._latest: deque[tuple[int, dict]] = deque(maxlen=NUM_SAMPLES)
        self._named: list[tuple[int, dict]] = []

    def offer(self, row: int, prompt_row: int, sample: dict) -> None:
        """Consider the sample of response `row`: a line of `samples.jsonl`."""
        self._latest.append((row, sample))
        if len(self._named) < NUM_SAMPLES and self._members.prompt_field[prompt_row] > 0:
            self._named.append((row, sample))
        heapq.heappush(self._lowest, (-self._members.prompt_fraction[prompt_row], -row, sample))
        if len(self._lowest) > NUM_SAMPLES:
            heapq.heappop(self._lowest)

    def choose(self, split_of_row: dict[int, int]) -> list[dict]:
        """At most 64 rows that were kept: held out, or of train where nothing was."""
        samples = dict([*self._latest, *self._named])
        samples |= {-row: sample for _, row, sample in self._lowest}
        kept = sorted(row for row in samples if row in split_of_row)
        held_out = [row for row in kept if split_of_row[row] != 0]
        return [samples[row] for row in (held_out or kept)[:NUM_SAMPLES]]
