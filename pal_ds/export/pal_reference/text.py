"""The form of a text in the PAL reference, as keys of our exported config and a tokenizer.

PAL-A reads prompt, response and end as one text; PAL-B reads prompt and end, and response and end. What
the tokenizer itself puts around a text stands around each of these.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pal_ds.data.response_markers import common_marker
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.export.tokenizer import write_framed_tokenizer

_PROBES = ("Pearl 17 glows", "Is quartz 29 humming?", "Raven 38 sings.", "so it goes\n")


@dataclass(frozen=True)
class TextForm:
    """The place of a text's end: its ids after those of the text, or its text before there are ids."""

    config: dict[str, Any]
    """Keys of PalRewardConfig."""
    written_end: str
    """Text that the tokenizer writes after every text; empty where the model appends ids."""

    @classmethod
    def of(
        cls, source: PreTrainedTokenizerBase, *, end_text: str, prompt_end: str | None
    ) -> "TextForm":
        """Return the form for a tokenizer; `prompt_end`, how every prompt ends, where the head reads the prompt.

        Raises:
            UserError: `prompt_end` cannot be found again in the ids of a text.
        """
        prefix, suffix = _special_ids(source)
        ends = [_appended(source, probe, end_text) for probe in _PROBES]
        by_ids = all(end == ends[0] and end[0] == 0 for end in ends)
        config = {
            "encoding": "joint",
            "prefix_ids": prefix,
            "end_ids": [*(ends[0][1] if by_ids else ()), *suffix],
        }
        if prompt_end is not None:
            replaces, prompt_end_ids = _prompt_end(source, prompt_end, end_text)
            config |= {
                "encoding": "separate",
                "marker_ids": _marker(source, prompt_end),
                "prompt_end_ids": [*prompt_end_ids, *suffix],
                "prompt_end_replaces": replaces,
            }
        return cls(config, "" if by_ids else end_text)

    def write_tokenizer(self, source: Path, folder: Path, max_length: int) -> int:
        return write_framed_tokenizer(
            source,
            folder,
            prefix_ids=self.config["prefix_ids"],
            end_ids=self.config["end_ids"],
            end_text=self.written_end,
            max_length=max_length,
        )


def _appended(source: PreTrainedTokenizerBase, text: str, end_text: str) -> tuple[int, list[int]]:
    """Return (n, ids): with the end after it, a text loses its last n ids and gains these."""
    bare, full = _ids(source, text), _ids(source, text + end_text)
    together = zip(bare, full, strict=False)
    kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], together))
    return len(bare) - kept, full[kept:]


def _prompt_end(
    source: PreTrainedTokenizerBase, prompt_end: str, end_text: str
) -> tuple[int, list[int]]:
    """Return the end after a prompt. All prompts end alike, so it joins with them in one way at most."""
    endings = [_appended(source, probe + prompt_end, end_text) for probe in _PROBES]
    if any(item != endings[0] for item in endings):
        raise UserError(
            f"--prompt_end {prompt_end!r}: {end_text!r} after it becomes other tokens from prompt to "
            "prompt. Give the text that ended every prompt."
        )
    return endings[0]


def _marker(source: PreTrainedTokenizerBase, prompt_end: str) -> list[int]:
    encoder = TextEncoder(source, separator=prompt_end, chat_template="never", special_tokens=False)
    texts = [
        encoder.render(prompt, f" {response}")
        for prompt, response in itertools.permutations(_PROBES[:3], 2)
    ]
    encoded = encoder.encode([text for text in texts if text is not None])
    variants = [item.marker_ids for item in encoded if item is not None]
    marker = common_marker(variants, [1] * len(variants)) if variants else None
    if not marker:
        raise UserError(
            f"--prompt_end {prompt_end!r}: leaves no token of its own in this tokenizer, so the model "
            "could not find where a response begins. Give the text that ended every prompt."
        )
    return marker


def _special_ids(source: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text where special tokens are asked for."""
    bare, full = _ids(source, _PROBES[0]), source(_PROBES[0])["input_ids"]
    starts = [s for s in range(len(full)) if full[s : s + len(bare)] == bare]
    assert starts, "special tokens stand around a text"
    return full[: starts[0]], full[starts[0] + len(bare) :]


def _ids(source: PreTrainedTokenizerBase, text: str) -> list[int]:
    return source(text, add_special_tokens=False)["input_ids"]
