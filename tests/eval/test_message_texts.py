"""Texts that are read back from tokens hold what was said, without role words, headers and special tokens."""

from typing import Any

import pytest

from pal_ds.data.tokenise import TextEncoder, train_tokenizer
from pal_ds.eval.message_texts import TextsOfTokens
from tests.data.conftest import CHATML, TEXTS

LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
GEMMA = CHATML.replace("{{ m['role'] }}", "{{ m.role | replace('assistant', 'model') }}").replace(
    "assistant\n{% endif %}", "model\n{% endif %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "user\nwhat?"},
    {"role": "assistant", "content": "The model user."},
    {"role": "user", "content": "Tea?"},
]


def texts_of(template: str | None, prompt: Any, response: str) -> tuple[str, str]:
    tokenizer = train_tokenizer(TEXTS, 400)
    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    encoder = TextEncoder(tokenizer)
    rendered = encoder.render(prompt, response)
    assert rendered is not None
    (encoded,) = encoder.encode([rendered])
    assert encoded is not None
    tokens = encoder.describe(list(encoded.marker_ids), encoder.user_marker_ids)
    read = TextsOfTokens(tokenizer, tokens)
    return read.text(encoded.prompt_ids), read.text(encoded.response_ids)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA], ids=["chatml", "llama", "gemma"])
def test_role_words_of_a_template_are_no_text(template: str) -> None:
    prompt, response = texts_of(template, CHAT, "assistant\nYes.")
    assert prompt == "Be brief.\nuser\nwhat?\nThe model user.\nTea?"
    assert response == "assistant\nYes."
    assert texts_of(template, "Tea?", "Yes.") == ("Tea?", "Yes.")


def test_headers_without_special_tokens_are_no_text() -> None:
    prompt, response = texts_of(VICUNA, CHAT[1:], "Yes.")
    assert "Tea?" in prompt and prompt.endswith("Tea?") and response == "Yes."


def test_without_a_template_a_text_is_what_it_was() -> None:
    prompt, response = texts_of(None, "user\nTea?", "assistant\nYes.")
    assert prompt.startswith("user\nTea?") and response == "assistant\nYes."
