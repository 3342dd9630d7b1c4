"""Text -> token ids, once per distinct (prompt, response): the full text is tokenised as a whole.

The response starts where its first token starts; the marker is what stands between it and the
prompt (the separator, or the chat template's assistant header).
"""

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

from pal_ds.data.chat_template import ChatTemplate, choose_template, not_shown
from pal_ds.data.dataset_info import TokensInfo
from pal_ds.data.records import Text, Tools, as_messages, render_plain
from pal_ds.data.special_tokens import special_ids, turn_end, user_marker
from pal_ds.data.verification import MEND
from pal_ds.errors import UserError
from pal_ds.io.boundary import reading
from pal_ds.remote_code.canonical import canonical_ids, num_leading

logger = logging.getLogger(__name__)
DEFAULT_SEPARATOR = "\n\n### Response:\n"


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

    truncation_side: Literal["left", "right"] = "left"
    """Where a reader of the tables cuts long prompts; only passed on to `describe`."""

    def __init__(
        self,
        tokenizer,
        max_length: int = 1024,
        separator: str = DEFAULT_SEPARATOR,
        chat_template: str = "auto",
        special_tokens: bool = True,
        name: str = "trained",
        clock: str | None = None,
    ) -> None:
        """`clock` is what the chat template takes for now (ISO 8601); it is kept where the template reads it."""
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
        choose_template(tokenizer, name, chat_template)
        self.template: ChatTemplate | None = None
        if chat_template != "never" and tokenizer.chat_template:
            self.template = ChatTemplate(tokenizer, name, clock)
        self.prefix_ids, self.end_ids = [], []
        if special_tokens:
            self.prefix_ids, self.end_ids = special_ids(tokenizer, name)
        if max_length <= len(self.prefix_ids) + len(self.end_ids):
            raise UserError(
                f"max_length is {max_length}; it must exceed the {len(self.prefix_ids)} prefix and "
                f"{len(self.end_ids)} end tokens of tokenizer {name}"
            )
        self.header = self.template.header if self.template else ""
        self.end_variants: list[list[int]] | None = None
        if self.template and self.end_ids:
            self.end_ids, self.end_variants = turn_end(self.template, self._tokenise, self.end_ids)
        self.user_marker_ids = user_marker(self.template, self._tokenise) if self.template else None
        self._special = _special_pattern(tokenizer)
        self._last_prompt: tuple[Text | None, object, str | None] = (None, None, None)

    @property
    def uses_template(self) -> bool:
        """True where conversations are rendered by the tokenizer's chat template."""
        return self.template is not None

    @property
    def refusal(self) -> str:
        """The template's own words when it last refused a conversation; empty where it never did."""
        return self.template.refusal if self.template else ""

    def render(
        self, prompt: Text | None, response: Text, tools: Tools | None = None
    ) -> Rendered | None:
        """Full text and boundary; None where the template rewrites what precedes the response."""
        if prompt is None:
            return Rendered(render_plain(response), 0, 0)
        if self.template is None:
            head = render_plain(prompt)
            if tools:
                head = f"{json.dumps(tools, ensure_ascii=False, sort_keys=True)}\n\n{head}"
            start = len(head) + len(self.separator)
            return Rendered(f"{head}{self.separator}{render_plain(response)}", len(head), start)
        messages = as_messages(prompt, "user")
        if prompt is not self._last_prompt[0] or tools is not self._last_prompt[1]:
            self._last_prompt = (prompt, tools, self.template.head(messages, tools))
        head = self._last_prompt[2]
        text = self.template.apply(messages + as_messages(response, "assistant"), tools)
        if head is None or text is None or not text.startswith(head) or len(text) == len(head):
            return None
        has_header = head.endswith(self.header)
        return Rendered(text, len(head) - (len(self.header) if has_header else 0), len(head))

    def not_shown(
        self,
        prompt: Text | None,
        response: Text,
        tools: Tools | None,
        rendered: Rendered,
    ) -> set[str]:
        """Name the kinds of content that the rendered text leaves out."""
        return not_shown(prompt, response, tools, rendered.text)

    def special_in(self, prompt: Text | None, response: Text) -> set[str]:
        """The special tokens of the tokenizer that the contents themselves hold: it reads them as ends of turns."""
        contents = (
            message["content"] or ""
            for text in (prompt, response)
            for message in as_messages(text or "", "user")
        )
        return {token for content in contents for token in self._special.findall(content)}

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
            **({} if self.end_variants is None else {"end_variants": self.end_variants}),
            "marker_ids": marker_ids,
            "user_marker_ids": user_marker_ids,
            "separator": None if self.uses_template else self.separator,
            "chat_template": self.uses_template,
            **({"finished_header": True} if self.template and self.template.after_plain else {}),
            **(
                {"call_arguments": self.template.call_arguments}
                if self.template and self.template.call_arguments
                else {}
            ),
            **(
                {"clock": self.template.clock}
                if self.template and self.template.reads_clock
                else {}
            ),
            "special_tokens": self.special_tokens,
            "pad_token_id": pad if pad is not None else (self.tokenizer.eos_token_id or 0),
        }
        return cast(TokensInfo, tokens)

    @classmethod
    def from_info(cls, tokens: TokensInfo, tokenizer_folder: str | Path) -> "TextEncoder":
        """The encoder that made a dataset, from its `tokens` entry and its `tokenizer/` folder."""
        with reading(tokenizer_folder, "tokenizer of prepared data", MEND):
            encoder = cls(
                load_tokenizer(str(tokenizer_folder)),
                max_length=tokens["max_length"],
                separator=tokens["separator"] or "",
                chat_template="auto" if tokens["chat_template"] else "never",
                special_tokens=tokens["special_tokens"],
                name=tokens["tokenizer"],
                clock=tokens.get("clock"),
            )
        encoder.truncation_side = truncation_side(tokens)
        encoder.take_header(tokens)
        # Data of before end with the end token behind that of the template's turn.
        encoder.end_ids, encoder.end_variants = tokens["end_ids"], tokens.get("end_variants")
        if encoder.template and encoder.template.reads_clock and "clock" not in tokens:
            logger.warning(
                "%s: its chat template writes today's date, and these data were prepared when no date was kept: "
                "scores change from day to day. Prepare again",
                tokenizer_folder,
            )
        return encoder

    def take_header(self, tokens: TokensInfo) -> None:
        """Find a response's beginning, and write calls of tools, as the data with this `tokens` entry have them."""
        if self.template:
            self.template.call_arguments = tokens.get("call_arguments")
        if self.template and not tokens.get("finished_header", False):
            self.template.take_header_of_prompt()
            self.header = self.template.header

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
        ends = {"end_ids": self.end_ids, "end_variants": self.end_variants}
        canonical = canonical_ids(ids, self.prefix_ids, **ends)
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


def _special_pattern(tokenizer) -> re.Pattern[str]:
    """A pattern of all special tokens that the tokenizer finds in a text."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special}
    # Longest first; of a tokenizer without any, what no text matches.
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def truncation_side(tokens: TokensInfo) -> Literal["left", "right"]:
    """Read where prompts of a dataset are cut from the `tokens` entry of its dataset.json."""
    return tokens.get("truncation_side", "left")


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """AutoTokenizer from a folder or hub id; a UserError names what cannot be opened."""
    from transformers import AutoTokenizer

    remedy = "Give a folder that holds tokenizer.json, a hub id this machine can reach, or null to train one."
    with reading(f"data.tokenizer: '{path}'", "tokenizer", remedy):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


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
