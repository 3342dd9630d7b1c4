"""Texts out of tokens, for people: without special tokens, headers and the role words of a chat template."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pal_ds.data.tables import TokensInfo

_ROLE = re.compile(
    r"\s*(?:system|user|assistant|model|tool|developer|human|ipython|function|observation)\s*(?:\n|$)",
    re.IGNORECASE,
)
"""A role word that stands alone in the first line behind a special token, as ChatML, Llama and Gemma write it."""


class TextsOfTokens:
    """Reads texts of prepared data back from their tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: TokensInfo) -> None:
        """`tokenizer` and `tokens` are those of the prepared data."""
        self._tokenizer = tokenizer
        self._special = {*tokenizer.all_special_ids} | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._has_roles = tokens["chat_template"]
        markers = (tokens["marker_ids"], tokens["user_marker_ids"]) if self._has_roles else ()
        self._markers = sorted((list(m) for m in markers if m), key=len, reverse=True)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens; of a conversation each message begins a line."""
        if not self._has_roles:
            return self._decoded(list(ids))
        said = []
        for part, is_behind_special in self._parts(ids):
            text = self._decoded(part)
            role = _ROLE.match(text) if is_behind_special else None
            said.append(text[role.end() :].strip() if role else text)
        return "\n".join(filter(None, said))

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _parts(self, ids: Sequence[int]) -> list[tuple[list[int], bool]]:
        """(tokens between special ones and headers, whether a special one stands in front) in their order."""
        parts: list[tuple[list[int], bool]] = [([], False)]
        place = 0
        while place < len(ids):
            marker = next(
                (m for m in self._markers if list(ids[place : place + len(m)]) == m), None
            )
            if marker is not None:
                parts.append(([], False))
                place += len(marker)
            elif ids[place] in self._special:
                parts.append(([], True))
                place += 1
            else:
                parts[-1][0].append(int(ids[place]))
                place += 1
        return [part for part in parts if part[0]]
