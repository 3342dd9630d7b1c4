"""Templates that change, refuse or leave out texts, and texts with special tokens: messages name the fault."""

import copy
import logging

import pytest

from pal_ds.data.chat_template import choose_template
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from tests.data.conftest import CHATML


@pytest.fixture
def prepared(chatml, tmp_path, write_lines):
    """Prepares rows with a template of ChatML's tokenizer."""

    def make(rows, template=CHATML):
        tokenizer = copy.deepcopy(chatml)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return prepare(
            DataConfig(
                path=str(tmp_path / "D"),
                source=Jsonl(write_lines(rows)),
                tokenizer=str(tmp_path / "tokenizer"),
            ),
            quiet=True,
        )

    return make


def rows(num: int = 4, **fields) -> list[dict]:
    return [{"prompt": f"Tea {i}", "chosen": "Yes", "rejected": "No", **fields} for i in range(num)]


CHANGES = {
    "lower": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | lower }}"),
    "no blanks": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace(' ', '') }}"),
}


@pytest.mark.parametrize("template", CHANGES.values(), ids=CHANGES)
def test_a_template_that_changes_texts_is_told_as_one(prepared, template):
    with pytest.raises(UserError) as refused:
        prepared(rows(), template)
    assert "changes the letters or blank space of texts ('Pearl 17 glows' is" in str(refused.value)
    assert "Strip" not in str(refused.value)


def test_a_role_whose_texts_are_changed_is_counted_as_changed(prepared, caplog):
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] | lower if m.role == 'system' else m['content'] }}"
    )
    system = {"role": "system", "content": "Be BRIEF."}
    given = rows(prompt=[system, {"role": "user", "content": "Tea"}])
    info = prepared(given, template).info
    assert info["not_shown"] == {"the letters or blank space of a message of role system": 2}


def test_a_trimming_template_is_no_fault(prepared, caplog):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    data = prepared(rows(chosen="  Yes \n", rejected="No "), template)
    assert len(data.comparisons) == 4 and not data.info.get("not_shown")
    assert "leaves something out" not in caplog.text


def test_a_template_that_refuses_asks_for_another_form(prepared):
    template = "{% if messages|length > 2 %}{{ raise_exception('Two only') }}{% endif %}" + CHATML
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(UserError) as refused:
        prepared(rows(prompt=turns), template)
    said = str(refused.value)
    assert "the template says: TemplateError: Two only" in said and "Strip" not in said
    assert "Bring the conversations into the form that the template asks for, or set" in said


def test_a_template_that_rewrites_the_prompt_says_so(prepared):
    template = "{{ messages | length if messages | length > 2 else '' }}" + CHATML
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(UserError) as refused:
        prepared(rows(prompt=turns), template)
    assert "writes a prompt otherwise once a response follows" in str(refused.value)
    assert "Strip" not in str(refused.value)


TOKEN = "<|im_start|>"


@pytest.mark.parametrize(
    "where", [{"chosen": f"Yes {TOKEN}assistant\nyes"}, {"prompt": f"Tea {TOKEN}assistant\n"}]
)
def test_special_tokens_in_contents_are_named(prepared, caplog, where):
    with caplog.at_level(logging.WARNING):
        prepared([*rows(99), *rows(1, **where)])
    num = 1 if "chosen" in where else 2
    assert f"by token: {TOKEN}: {num})" in caplog.text
    assert f"(special tokens in the texts themselves, {TOKEN}: {num}; or turns" in caplog.text


def test_turns_alone_are_told_as_turns(prepared, caplog):
    odd = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Tea?"}]
    with caplog.at_level(logging.WARNING):
        prepared([*rows(99), *rows(1, prompt=odd)])
    assert "begins (turns that do not alternate" in caplog.text
    assert "special tokens" not in caplog.text


def test_special_tokens_without_a_template_are_counted_too(tmp_path, write_lines, caplog):
    given = write_lines([*rows(4), *rows(1, chosen="Yes</s>", prompt="<pad>")])
    config = DataConfig(path=str(tmp_path / "D"), source=Jsonl(given), vocab_size=300)
    with caplog.at_level(logging.WARNING):
        prepare(config, quiet=True)
    assert "by token: <pad>: 2, </s>: 1)" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "Ann"),
        ("recipient", "browser"),
        ("documents", [{"title": "Leaves", "text": "Of tea"}]),
    ],
)
def test_what_a_message_says_beside_its_content_is_counted(chatml, key, value):
    prompt = [{"role": "user", "content": "Tea?", key: value}]
    encoder = TextEncoder(copy.deepcopy(chatml))
    rendered = encoder.render(prompt, "Yes.")
    assert rendered is not None
    assert encoder.not_shown(prompt, "Yes.", None, rendered) == {f"{key} of a message"}
    shows = copy.deepcopy(chatml)
    shows.chat_template = CHATML.replace(
        "{{ m['content'] }}", f"{{{{ m.{key} | default('') | tojson }}}}{{{{ m['content'] }}}}"
    )
    encoder = TextEncoder(shows)
    rendered = encoder.render(prompt, "Yes.")
    assert rendered is not None and not encoder.not_shown(prompt, "Yes.", None, rendered)


@pytest.mark.parametrize("template", [123, ["a"], {"default": 1}, True])
def test_a_template_that_is_no_text_is_named(chatml, template):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = template
    for wanted in ("auto", "never"):
        with pytest.raises(UserError, match=r"tokenizer mine: its chat_template holds .* no text"):
            choose_template(tokenizer, "mine", wanted)
