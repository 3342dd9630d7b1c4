"""Text -> token ids, once per distinct (prompt, response): the full text is tokenised as a whole.

The response starts where its first token starts; the marker is what stands between it and the
prompt (the separator, or the chat template's assistant header).
"""

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

from pal_ds.data.records import Text, as_messages, render_plain
from pal_ds.data.tables import TokensInfo
from pal_ds.errors import UserError
from pal_ds.remote_code.canonical import canonical_ids, num_leading

DEFAULT_SEPARATOR = "\n\n### Response:\n"
_PROBES = ("Pearl 17 glows", "Quartz 29 hums", "Raven 38 sings")


class Rendered(NamedTuple):
    """A full text, where its marker starts and where its response starts (in characters)."""

    text: str
    marker_start: int
    response_start: int


class Encoded(NamedTuple):
    """Token ids before and from the response on, and the tokens that lie wholly in the marker."""

    prompt_ids: list[int]
    response_ids: list[int]
    marker_ids: tuple[int, ...]


class TextEncoder:
    """Renders and tokenises (prompt, response) pairs for one tokenizer, template and separator."""

    def __init__(
        self,
        tokenizer,
        max_length: int = 1024,
        separator: str = DEFAULT_SEPARATOR,
        chat_template: Literal["auto", "never"] = "auto",
        special_tokens: bool = True,
        truncation_side: str = "left",
        name: str = "trained",
    ) -> None:
        if chat_template not in ("auto", "never"):
            raise UserError(f"chat_template is '{chat_template}'; it must be auto or never")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer {name}: has no fast (Rust) version, so token positions are unknown; "
                "choose a model whose folder holds tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.name = name
        self.max_length = max_length
        self.separator = separator
        self.special_tokens = special_tokens
        self.truncation_side = truncation_side
        self.uses_template = chat_template == "auto" and bool(tokenizer.chat_template)
        self.prefix_ids, self.end_ids = [], []
        if special_tokens:
            self.prefix_ids, self.end_ids = _special_ids(tokenizer, name)
        if max_length <= len(self.prefix_ids) + len(self.end_ids):
            raise UserError(
                f"max_length is {max_length}; it must exceed the {len(self.prefix_ids)} prefix and "
                f"{len(self.end_ids)} end tokens of tokenizer {name}"
            )
        self.header = self._assistant_header() if self.uses_template else ""
        self.user_marker_ids = self._user_marker() if self.uses_template else None
        self._last_prompt: tuple[Text | None, str | None] = (None, None)

    def render(self, prompt: Text | None, response: Text) -> Rendered | None:
        """Full text and boundary; None where the template rewrites what precedes the response."""
        if prompt is None:
            return Rendered(render_plain(response), 0, 0)
        if not self.uses_template:
            head = render_plain(prompt)
            start = len(head) + len(self.separator)
            return Rendered(f"{head}{self.separator}{render_plain(response)}", len(head), start)
        messages = as_messages(prompt, "user")
        if prompt is not self._last_prompt[0]:
            self._last_prompt = (prompt, self._apply(messages, add_generation_prompt=True))
        head = self._last_prompt[1]
        text = self._apply(messages + as_messages(response, "assistant"))
        if head is None or text is None or not text.startswith(head) or len(text) == len(head):
            return None
        has_header = head.endswith(self.header)
        return Rendered(text, len(head) - (len(self.header) if has_header else 0), len(head))

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded | None]:
        """Canonical ids of each text; None where no token starts at the response."""
        batch = self._tokenise([item.text for item in rendered])
        texts = zip(batch["input_ids"], batch["offset_mapping"], rendered, strict=True)
        return [self._divide(ids, offsets, item) for ids, offsets, item in texts]

    def describe(
        self, marker_ids: list[int] | None, user_marker_ids: list[int] | None
    ) -> TokensInfo:
        """The `tokens` entry of dataset.json, from which `from_info` makes this encoder again."""
        pad = self.tokenizer.pad_token_id
        tokens = {
            "tokenizer": self.name,
            "vocab_size": len(self.tokenizer),
            "max_length": self.max_length,
            **({} if self.truncation_side == "left" else {"truncation_side": "right"}),
            "prefix_ids": self.prefix_ids,
            "end_ids": self.end_ids,
            "marker_ids": marker_ids,
            "user_marker_ids": user_marker_ids,
            "separator": None if self.uses_template else self.separator,
            "chat_template": self.uses_template,
            "special_tokens": self.special_tokens,
            "pad_token_id": pad if pad is not None else (self.tokenizer.eos_token_id or 0),
        }
        return cast(TokensInfo, tokens)

    @classmethod
    def from_info(cls, tokens: TokensInfo, tokenizer_folder: str | Path) -> "TextEncoder":
        """The encoder that made a dataset, from its `tokens` entry and its `tokenizer/` folder."""
        return cls(
            load_tokenizer(str(tokenizer_folder)),
            max_length=tokens["max_length"],
            separator=tokens["separator"] or "",
            chat_template="auto" if tokens["chat_template"] else "never",
            special_tokens=tokens["special_tokens"],
            truncation_side=truncation_side(tokens),
            name=tokens["tokenizer"],
        )

    def _tokenise(self, texts: list[str]) -> dict:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )

    def _divide(self, ids: list[int], offsets: list, item: Rendered) -> Encoded | None:
        start = bisect_right(offsets, item.response_start, key=lambda offset: offset[1])
        if start == len(ids) or offsets[start][0] < item.response_start:
            return None
        canonical = canonical_ids(ids, self.prefix_ids, self.end_ids)
        num_stripped = num_leading(ids, self.prefix_ids)
        if item.response_start == 0:
            start = num_stripped
        num_prompt = len(self.prefix_ids) + start - num_stripped
        response = canonical[num_prompt:]
        if num_prompt < len(self.prefix_ids) or len(response) <= len(self.end_ids):
            return None
        first = start
        while first and offsets[first - 1][0] >= item.marker_start:
            first -= 1
        return Encoded(canonical[:num_prompt], response, tuple(ids[first:start]))

    def _apply(self, messages: list[dict], add_generation_prompt: bool = False) -> str | None:
        """The rendered conversation; None where the template refuses it."""
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError:
            return None

    def _assistant_header(self) -> str:
        """Find the text that the template writes between the user's text and the assistant's."""
        question = as_messages(_PROBES[0], "user")
        prompted = self._apply(question, add_generation_prompt=True)
        plain = self._apply(question)
        if prompted is None or plain is None or _PROBES[0] not in prompted:
            raise UserError(
                f"tokenizer {self.name}: its chat template cannot render one user message; set "
                "chat_template: never to use the separator instead"
            )
        if prompted.startswith(plain) and len(prompted) > len(plain):
            return prompted[len(plain) :]
        return prompted[prompted.index(_PROBES[0]) + len(_PROBES[0]) :]

    def _user_marker(self) -> list[int] | None:
        """Tokens that open every user message; None where they are not always the same."""
        first, answer, second = _PROBES
        turns = [*as_messages(first, "user"), *as_messages(answer, "assistant")]
        text = self._apply(turns + as_messages(second, "user"))
        if text is None or not all(probe in text for probe in _PROBES):
            return None
        before_first = text[: text.index(first)]
        before_second = text[text.index(answer) + len(answer) : text.index(second)]
        shared = _common_suffix(before_first, before_second)
        batch = self._tokenise([text])
        ids, offsets = batch["input_ids"][0], batch["offset_mapping"][0]
        ends = text.index(first), text.index(second)
        markers = [_inside(ids, offsets, end - shared, end) for end in ends]
        width = _common_suffix(*markers)
        return markers[0][len(markers[0]) - width :] or None


def truncation_side(tokens: TokensInfo) -> Literal["left", "right"]:
    """Read where prompts of a dataset are cut from the `tokens` entry of its dataset.json."""
    return tokens.get("truncation_side", "left")


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """AutoTokenizer from a folder or hub id; a UserError names what cannot be opened."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.tokenizer: cannot open '{path}' ({reason}); give a folder that holds "
            "tokenizer.json, a hub id this machine can reach, or null to train one"
        ) from error


def _special_ids(tokenizer, name: str) -> tuple[list[int], list[int]]:
    """(prefix, end) as the tokenizer adds them; one end-of-sequence token if it adds no end."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    width = len(bare)
    start = next((s for s in range(len(full) - width + 1) if full[s : s + width] == bare), None)
    if start is None:
        raise UserError(
            f"tokenizer {name}: its special tokens change the text's own tokens; set "
            "special_tokens: false"
        )
    prefix, end = full[:start], full[start + width :]
    if not end:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {name}: has no end token (eos) to append to responses; give it one or "
                "set special_tokens: false"
            )
        end = [tokenizer.eos_token_id]
    return prefix, end


def _common_suffix(first: Sequence, second: Sequence) -> int:
    alike = (a == b for a, b in zip(reversed(first), reversed(second), strict=False))
    return sum(itertools.takewhile(bool, alike))


def _inside(ids: list[int], offsets: list, start: int, stop: int) -> list[int]:
    """The tokens that lie wholly in characters [start, stop)."""
    return [
        token
        for token, (low, high) in zip(ids, offsets, strict=True)
        if low >= start and high <= stop and high > low
    ]


PAD_TOKEN, END_TOKEN = "<pad>", "</s>"


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Train a byte-level BPE, the same for the same texts; <pad> is 0, </s> is 1, there is no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        clean_up_tokenization_spaces=False,
    )
