"""A few texts kept as they were, so that an export can be checked from raw text later."""

import heapq
from collections import deque
from collections.abc import Callable

from pal_ds.data.records import Text

NUM_SAMPLES = 64


class SampleKeeper:
    """Holds candidates for `samples.jsonl` while the splits are not yet known.

    Dev and test are the prompts with the lowest fraction (split: hash), the last ones (ordinal) or
    named (field); a few of each kind are kept, and `choose` takes those that proved to be held out.
    """

    def __init__(
        self, fraction: Callable[[int], float], is_held_out: Callable[[int], bool]
    ) -> None:
        self._fraction = fraction
        self._is_held_out = is_held_out
        self._lowest: list[tuple[float, int, dict]] = []
        self._latest: deque[tuple[int, dict]] = deque(maxlen=NUM_SAMPLES)
        self._named: list[tuple[int, dict]] = []

    def offer(
        self,
        row: int,
        prompt_row: int,
        prompt: Text | None,
        response: Text,
        text: str,
        num_prompt_tokens: int,
    ) -> None:
        sample = {
            "prompt": prompt,
            "response": response,
            "text": text,
            "prompt_tokens": num_prompt_tokens,
        }
        self._latest.append((row, sample))
        if len(self._named) < NUM_SAMPLES and self._is_held_out(prompt_row):
            self._named.append((row, sample))
        entry = (-self._fraction(prompt_row), -row, sample)
        if len(self._lowest) < NUM_SAMPLES:
            heapq.heappush(self._lowest, entry)
        elif entry[:2] > self._lowest[0][:2]:
            heapq.heapreplace(self._lowest, entry)

    def choose(self, split_of_row: dict[int, int]) -> list[dict]:
        """At most 64 rows that were kept: held out, or of train where nothing was."""
        samples = dict([*self._latest, *self._named])
        samples |= {-row: sample for _, row, sample in self._lowest}
        kept = sorted(row for row in samples if row in split_of_row)
        held_out = [row for row in kept if split_of_row[row] != 0]
        return [samples[row] for row in (held_out or kept)[:NUM_SAMPLES]]
