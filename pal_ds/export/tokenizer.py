"""The tokenizer of an exported folder.

Our own model class brings any ids to the trainer's form. A stock class cannot, so for it the
tokenizer itself writes the special tokens: into the text, by its normaliser, which runs whether or
not a caller asks for special tokens (TRL does not).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from pal_ds.data.dataset_info import TokensInfo
from pal_ds.data.tokenise import Encoded, load_tokenizer
from pal_ds.errors import UserError

_NEW_PAD = "<|pal_pad|>"
_OF_ANOTHER_CLASS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "backend",
    "is_local",
    "local_files_only",
)
"""Entries of tokenizer_config.json that alter what tokenizer.json says, or are nothing of the tokenizer's own."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer as the data were made with it; without a pad token, its end token pads."""
    tokenizer = load_tokenizer(str(source))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    if (folder / "tokenizer.json").is_file():
        _write_config(folder, {})


def write_canonical_tokenizer(
    source: Path, folder: Path, tokens: TokensInfo, vocab_size: int, *, in_text: bool = True
) -> int:
    """Write a tokenizer whose every text carries its prefix and end tokens exactly once.

    Not every tokenizer can: one that prepends a character to each text cannot find specials again.
    It is then written as it was, but for a pad token that ends no text; `is_exact` tells.

    Args:
        source: the data's tokenizer.
        folder: where the files go.
        tokens: the `tokens` entry of dataset.json.
        vocab_size: rows of the model's embedding.
        in_text: False keeps the normaliser from writing special tokens even where it could.

    Returns:
        The pad id, which never ends a text. It may be `vocab_size`: then the embedding needs one more row, never read.
    """
    tokenizer = load_tokenizer(str(source))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own = [token for token in (tokenizer.pad_token, tokenizer.bos_token) if token is not None]
    may_pad = [t for t in own if tokenizer.convert_tokens_to_ids(t) not in tokens["end_ids"]]
    pad = (*may_pad, _NEW_PAD)[0]
    if pad == _NEW_PAD:
        backend.add_special_tokens([AddedToken(pad, special=True)])
    if in_text and _keeps_specials(backend):
        prefix, end = (
            "".join(str(backend.id_to_token(token)) for token in tokens[key])
            for key in ("prefix_ids", "end_ids")
        )
        variants = [
            backend.decode(v, skip_special_tokens=False) for v in tokens.get("end_variants", ())
        ]
        backend = _with_specials(backend, prefix, end, variants)
    pad_id = _save(tokenizer, backend, folder, pad, tokens["max_length"])
    assert pad_id <= vocab_size, f"pad token {pad} has id {pad_id} beyond {vocab_size} rows"
    return pad_id


def write_framed_tokenizer(
    source: Path,
    folder: Path,
    *,
    prefix_ids: list[int],
    end_ids: list[int],
    end_text: str,
    max_length: int,
) -> int:
    """Write the tokenizer, with these tokens around a text where a caller asks for special tokens; returns its pad id.

    `end_text` goes after every text, asked for or not, before it becomes tokens. Raises UserError for a
    tokenizer whose normaliser cannot write it.
    """
    tokenizer = load_tokenizer(str(source))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if end_text:
        if not _keeps_specials(backend):
            raise UserError(f"tokenizer {source}: cannot write {end_text!r} after every text.")
        backend = _with_specials(backend, "", end_text)
    prefix = [(f"prefix {place}", token) for place, token in enumerate(prefix_ids)]
    end = [(f"end {place}", token) for place, token in enumerate(end_ids)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*(name for name, _ in prefix), "$A", *(name for name, _ in end)],
        special_tokens=[*prefix, *end],
    )
    pad = tokenizer.pad_token or tokenizer.eos_token or str(backend.id_to_token(0))
    return _save(tokenizer, backend, folder, pad, max_length)


def _keeps_specials(backend: Tokenizer) -> bool:
    """Return True where the normaliser leaves special tokens as they are, so that they are found after it."""
    names = [token["content"] for token in json.loads(backend.to_str())["added_tokens"]]
    normalizer = backend.normalizer
    return normalizer is None or all(normalizer.normalize_str(name) == name for name in names)


def _with_specials(
    backend: Tokenizer, prefix: str, end: str, end_variants: Sequence[str] = ()
) -> Tokenizer:
    """Put prefix and end into every text unless they are there already; the end in place of what may stand for it.

    Special tokens are found after the normaliser has run (`normalized`), else each piece of text
    between two of them would get a prefix and an end. The library runs the normaliser over the
    special tokens themselves too, hence the exceptions for a text that is one of them.
    """
    state = json.loads(backend.to_str())
    names = [re.escape(token["content"]) for token in state["added_tokens"]]
    steps = [] if backend.normalizer is None else [backend.normalizer]
    if prefix:
        pattern = rf"\A(?!{re.escape(prefix)})(?!(?:{'|'.join(names)})\z)"
        steps.append(normalizers.Replace(Regex(pattern), prefix))
    if end_variants:
        forms = "|".join(re.escape(form) for form in sorted(end_variants, key=len, reverse=True))
        # Not at the start: a special token is no text that ends.
        steps.append(normalizers.Replace(Regex(rf"(?<!\A)(?:{forms})+\z"), end))
    if end:
        not_alone = "".join(rf"(?<!\A{name})" for name in names)
        steps.append(normalizers.Replace(Regex(rf"(?<!{re.escape(end)}){not_alone}\z"), end))
    backend.normalizer = normalizers.Sequence(steps)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = True
    # The template would add the same specials again where a caller asks for them.
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))


def _save(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, folder: Path, pad: str, max_length: int
) -> int:
    """Write the class that takes tokenizer.json as it is, padding right and cutting left; return the pad id."""
    tokenizer.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    sides = {"padding_side": "right", "truncation_side": "left"}
    _write_config(folder, {"pad_token": pad, "model_max_length": max_length, **sides})
    pad_id = backend.token_to_id(pad)
    assert pad_id is not None, f"{pad} is a token of the tokenizer"
    return pad_id


def _write_config(folder: Path, changes: dict[str, object]) -> None:
    """Make tokenizer_config.json name the class that takes tokenizer.json as it is, for transformers 4 and 5."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in _OF_ANOTHER_CLASS:
        config.pop(key, None)
    extra = config.pop("extra_special_tokens", None)
    if extra:
        # transformers 4 knows names for them (a dictionary) or the other key.
        key = "extra_special_tokens" if isinstance(extra, dict) else "additional_special_tokens"
        config[key] = extra
    # No class of ours reads token types, and some stock classes refuse them.
    config |= {"model_input_names": ["input_ids", "attention_mask"]}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", **changes}
    path.write_text(json.dumps(config, indent=2) + "\n")


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open an exported folder's tokenizer; AutoTokenizer by itself would ask about the model's code.

    Raises:
        UserError: the folder holds none, or one that needs code of its own.
    """
    try:
        return _opened(folder)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be opened ({error}). Export again."
        ) from None


def _opened(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        folder, config=PretrainedConfig(), local_files_only=True, trust_remote_code=False
    )


def is_exact(folder: Path, texts: list[str], encoded: list[Encoded]) -> bool:
    """Return True where the folder's tokenizer gives the trainer's ids with and without special tokens."""
    tokenizer = open_tokenizer(folder)
    return all(
        ids == [*item.prompt_ids, *item.response_ids]
        for special in (True, False)
        for ids, item in zip(
            tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"],
            encoded,
            strict=True,
        )
    )
