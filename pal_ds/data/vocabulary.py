"""Comparison of two prepared tokenizers: weights learned with one read the other's ids only if these are equal."""

import json
import logging
from pathlib import Path

from tokenizers import Tokenizer

from pal_ds.data.dataset_info import TokensInfo
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError

logger = logging.getLogger(__name__)

_FORM = ("separator", "chat_template", "max_length", "truncation_side")


def refuse_other_tokenizer(
    origin: str, tokenizer: Path, tokens: TokensInfo, data: PreparedData, *, rewritten: bool
) -> None:
    """Compares what turns text into ids: vocabulary, merges, how text is cut up, and the special tokens around it.

    Args:
        origin: the key and the path that the tokenizer comes from, for messages.
        tokenizer: its folder.
        tokens: the `tokens` entry of its dataset.json.
        data: whose tokenizer must be the same.
        rewritten: the folder's normaliser was changed to write special tokens itself, and a pad token may be new.

    Raises:
        UserError: they differ; the message says in what.
    """
    ours = data.info["tokens"]
    difference = None
    for key, name in (("prefix_ids", "tokens before"), ("end_ids", "tokens behind")):
        if tokens[key] != ours[key]:
            difference = f"the {name} each text are {tokens[key]}, those of the data {ours[key]}"
    difference = difference or _difference(
        tokenizer / "tokenizer.json",
        data.tokenizer_path / "tokenizer.json",
        num_tokens=tokens["vocab_size"],
        rewritten=rewritten,
    )
    if difference:
        raise UserError(
            f"{origin}: its tokenizer is not the one {data.path} was prepared with: {difference}. "
            f"Prepare the data with data.tokenizer: {tokenizer}"
        )
    for key in _FORM:
        if tokens.get(key) != ours.get(key):
            logger.warning(
                "%s: texts with data.%s %r, those of the run have %r",
                origin,
                key,
                tokens.get(key),
                ours.get(key),
            )


def _difference(theirs: Path, ours: Path, *, num_tokens: int, rewritten: bool) -> str | None:
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (theirs, ours))
    old, new = (Tokenizer.from_str(json.dumps(content)).get_vocab() for content in (before, after))
    if rewritten:
        old = {token: row for token, row in old.items() if row < num_tokens or token in new}
    for token in sorted(old.keys() | new.keys(), key=lambda t: old.get(t, new.get(t, 0))):
        if old.get(token) != new.get(token):
            return f"token {token!r} is {_id(old, token)} there and {_id(new, token)} here"
    if before["model"].get("merges") != after["model"].get("merges"):
        return "they merge characters into tokens in another order"
    for part in ("pre_tokenizer", *(() if rewritten else ("normalizer",))):
        if before.get(part) != after.get(part):
            return f"their {part} differs"
    return None


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "none"
