"""A tokenizer's chat template: conversations to text, with a clock that stands still, and what it leaves out."""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pal_ds.data.call_arguments import Form, form_needed, with_arguments
from pal_ds.data.records import (
    CALL_KEYS,
    OTHER_SHOWN_KEYS,
    REASONING_KEYS,
    Message,
    Text,
    Tools,
    as_messages,
)
from pal_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("Pearl 17 glows", "Quartz 29 hums", "Raven 38 sings")
_CLOCK = "strftime_now"
"""The function by which templates ask for the date."""
_FROZEN = "{%- macro " + _CLOCK + "(format) %}"
_DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_UNPADDED = "deHIjklmMSyUVW"
"""Directives that may have a minus before their letter."""


class ChatTemplate:
    """One template of a tokenizer.

    `clock` is what it takes for now, as in `datetime.isoformat`, kept in the tokenizer itself (`freeze_clock`); without
    one it reads the machine's.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", name: str, clock: str | None = None
    ) -> None:
        """Raises UserError where it cannot render one message of a user."""
        self.tokenizer, self.name, self.clock = tokenizer, name, clock
        if clock is not None:
            freeze_clock(tokenizer, clock)
        self.refusal = ""
        """What the template said when it last refused a conversation."""
        self.call_arguments: Form | None = None
        """Form of the arguments of tool calls, where the template shows them well in one form alone."""
        self.header, self.after_plain = self._assistant_header()
        self.call_arguments = form_needed(self.apply)
        self.refusal = ""

    @property
    def reads_clock(self) -> bool:
        """True where the text depends on the date."""
        return _CLOCK in str(self.tokenizer.chat_template)

    def apply(
        self,
        messages: list[Message],
        tools: Tools | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str | None:
        """The rendered conversation; None where the template refuses it, and `refusal` says why."""
        messages = with_arguments(messages, self.call_arguments)
        text = self._apply(messages, tools, add_generation_prompt)
        if all(message["content"] is not None for message in messages):
            return text
        # Some templates look for a content that is null, others cannot read it or write the word None.
        filled = [{**m, "content": "" if m["content"] is None else m["content"]} for m in messages]
        other = self._apply(filled, tools, add_generation_prompt)
        if text is None or (other is not None and text.count("None") > other.count("None")):
            return other
        return text

    def head(self, messages: list[Message], tools: Tools | None) -> str | None:
        """The text before a response to these messages, the assistant's header at its end."""
        if not self.after_plain:
            return self.apply(messages, tools, add_generation_prompt=True)
        text = self.apply(messages, tools)
        return None if text is None else text + self.header

    def _apply(
        self,
        messages: list[Message],
        tools: Tools | None,
        add_generation_prompt: bool,
    ) -> str | None:
        schemas: Any = tools
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=schemas,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
            return str(text)
        # A template is a program of others: whatever it raises is its answer to this conversation.
        except Exception as error:
            self.refusal = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def _assistant_header(self) -> tuple[str, bool]:
        """(what is written between the user's text and the assistant's, whether `head` takes it from here).

        The generation prompt holds it, but for templates that have none, or that open more than the header there (a
        block of reasoning): then a finished conversation shows it.
        """
        question, answer = as_messages(PROBES[0], "user"), as_messages(PROBES[1], "assistant")
        prompted = self.apply(question, add_generation_prompt=True)
        plain = self.apply(question)
        if prompted is None or plain is None or PROBES[0] not in prompted:
            said = f" ({self.refusal})" if self.refusal else ""
            if prompted and plain and _plain(PROBES[0]) in _plain(prompted):
                raise UserError(
                    f"tokenizer {self.name}: its chat template changes the letters or blank space of texts "
                    f"({PROBES[0]!r} is written as {prompted[:80]!r}), so nobody can tell where a text lies; mend "
                    "the template, or set chat_template: never to use the separator instead"
                )
            raise UserError(
                f"tokenizer {self.name}: its chat template cannot render one user message{said}; set "
                "chat_template: never to use the separator instead"
            )
        finished = self.apply([*question, *answer]) or ""
        if finished.startswith(plain) and PROBES[1] in finished:
            between = finished[len(plain) : finished.index(PROBES[1])]
            if between.strip() and (prompted == plain or not finished.startswith(prompted)):
                return between, True
        return _header_of_prompt(prompted, plain), False

    def take_header_of_prompt(self) -> None:
        """Read the header from the generation prompt, whatever a finished conversation shows.

        Data that were prepared before finished conversations were looked at have their boundaries there.
        """
        if self.after_plain:
            question = as_messages(PROBES[0], "user")
            prompted = self.apply(question, add_generation_prompt=True)
            self.header = _header_of_prompt(str(prompted), str(self.apply(question)))
            self.after_plain = False


def _header_of_prompt(prompted: str, plain: str) -> str:
    if prompted.startswith(plain) and len(prompted) > len(plain):
        return prompted[len(plain) :]
    return prompted[prompted.index(PROBES[0]) + len(PROBES[0]) :]


def choose_template(tokenizer: "PreTrainedTokenizerBase", name: str, wanted: str) -> None:
    """Leave the tokenizer with the one template that `data.chat_template` names, where it has several.

    Raises:
        UserError: it has none of that name, or several without a default.
    """
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if odd := [text for text in texts if not isinstance(text, str | None)]:
        raise UserError(
            f"tokenizer {name}: its chat_template holds {odd[0]!r:.60}, which is no text; a chat template is one. Mend "
            "chat_template in its tokenizer_config.json"
        )
    named = templates if isinstance(templates, dict) else {}
    if wanted == "never" or (wanted == "auto" and (not named or "default" in named)):
        return
    listed = ", ".join(sorted(named)) or "none with a name"
    if wanted == "auto":
        raise UserError(
            f"tokenizer {name}: has several chat templates ({listed}) and none is called default; name one as "
            "data.chat_template, or set it to never"
        )
    if wanted not in named:
        raise UserError(
            f"chat_template is '{wanted}'; it must be auto or never, or the name of a template of tokenizer {name}, "
            f"which has {listed}"
        )
    tokenizer.chat_template = named[wanted]


def freeze_clock(tokenizer: "PreTrainedTokenizerBase", clock: str) -> None:
    """Put a clock that stands still at `clock` (ISO 8601) into each template that asks for the date.

    It is a macro of the template's own, so whoever renders with the saved tokenizer gets this date, by any library.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _frozen(text, clock) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _frozen(templates, clock)


def _frozen(template: str, clock: str) -> str:
    """A template whose `strftime_now` is a macro that knows one moment; all else stays as it is, blank space too."""
    if _CLOCK not in template or template.startswith(_FROZEN):
        return template
    # transformers reads a clock that knows of no time zone.
    now = datetime.fromisoformat(clock).replace(tzinfo=None)
    directives = [*_DIRECTIVES, *(f"-{letter}" for letter in _UNPADDED)]
    written = {f"%{name}": now.strftime(f"%{name}") for name in directives}
    replaced = "".join(
        f"|replace({json.dumps(directive)},{json.dumps(text)})"
        for directive, text in written.items()
    )
    # Two percent signs are one that begins no directive.
    said = f'{{% for part in format.split("%%") %}}{{{{part{replaced}}}}}{{{{"" if loop.last else "%"}}}}{{% endfor %}}'
    for literal in dict.fromkeys(_literals(template)):
        # What the directives alone do not say, such as a width.
        if _by_directives(literal, written) != (text := now.strftime(literal)):
            value = f"{{{{{json.dumps(text)}}}}}"
            said = (
                f"{{% if format == {json.dumps(literal)} %}}{value}{{% else %}}{said}{{% endif %}}"
            )
    # The line feed goes, as Jinja drops one after a block; the template begins a line, as before.
    return f"{_FROZEN}{said}{{% endmacro %}}\n{template}"


def _literals(template: str) -> list[str]:
    """The formats that a template gives as such to its clock."""
    called = re.findall(_CLOCK + r"""\(\s*(?:format\s*=\s*)?("[^"\\]*"|'[^'\\]*')""", template)
    return [text[1:-1] for text in called]


def _by_directives(literal: str, written: dict[str, str]) -> str:
    parts = literal.split("%%")
    for directive, text in written.items():
        parts = [part.replace(directive, text) for part in parts]
    return "%".join(parts)


def not_shown(prompt: Text | None, response: Text, tools: Tools | None, text: str) -> set[str]:
    """Name the kinds of content that a rendered text leaves out: a message by its role, reasoning, calls, tools."""
    parts = [as_messages(prompt or [], "user"), as_messages(response, "assistant")]
    missing = set()
    for message in (message for part in parts for message in part):
        content = (message["content"] or "").strip()
        if content and content not in text:
            is_changed = _plain(content) in _plain(text)
            how = "the letters or blank space of a " if is_changed else ""
            missing.add(f"{how}message of role {message['role']}")
        for key in OTHER_SHOWN_KEYS & message.keys():
            if not all(_is_shown(leaf, text) for leaf in _call_leaves(message[key])):
                missing.add(f"{key} of a message")
        for key in REASONING_KEYS:
            if str(message.get(key) or "").strip() not in text:
                missing.add("reasoning")
        calls = [message[key] for key in CALL_KEYS if message.get(key)]
        if not all(_is_shown(leaf, text) for leaf in _call_leaves(calls)):
            missing.add("tool call")
    names = [str((tool.get("function") or tool).get("name", "")) for tool in tools or ()]
    if not all(name in text for name in names):
        missing.add("tools")
    return missing


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _call_leaves(value: object, key: str = "") -> Iterator[object]:
    """Names and arguments of calls; ids and types say nothing."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in ("id", "type", "index"):
                yield from _call_leaves(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _call_leaves(part, key)
    elif key == "arguments" and isinstance(value, str):
        try:
            yield from _call_leaves(json.loads(value))
        except ValueError:
            yield value
    elif value is not None:
        yield value


def _is_shown(leaf: object, text: str) -> bool:
    written = json.dumps(leaf)
    forms = (
        str(leaf),
        written,
        written.strip('"'),
        json.dumps(leaf, ensure_ascii=False).strip('"'),
    )
    return any(form in text for form in forms)
