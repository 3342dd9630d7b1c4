"""Arguments of tool calls stand in the text once, verbatim, whichever form a record has and a template needs."""

import copy
import json

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tokenise import TextEncoder
from tests.data.conftest import CHATML

ARGUMENTS = {"item": "green tea", "note": 'Zoë said "yes"', "cups": 2}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
ONE_CALL = "{% for c in m.tool_calls or [] %}<call>CALL</call>{% endfor %}<|im_end|>"
TEMPLATES = {
    "qwen2.5, llama, hermes": ("{{ c.function.arguments | tojson }}", "object"),
    "deepseek": ("{{ c.function.name + '\n' + c.function.arguments }}", "text"),
    "as written": ("{{ c.function.arguments }}", "text"),
    "xml": (
        "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",
        "object",
    ),
    "qwen3": (
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
        None,
    ),
    "shows none": ("", None),
}


@pytest.fixture
def encoder_with(chatml):
    def make(call: str) -> TextEncoder:
        tokenizer = copy.deepcopy(chatml)
        tokenizer.chat_template = CHATML.replace(
            "{{ m['content'] }}<|im_end|>",
            "{{ m['content'] or '' }}" + ONE_CALL.replace("CALL", call),
        )
        return TextEncoder(tokenizer)

    return make


def answer(arguments: object) -> list[dict]:
    call = {"type": "function", "function": {"name": "order", "arguments": arguments}}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


def call_in(text: str) -> str:
    return text.partition("<call>")[2].partition("</call>")[0]


@pytest.mark.parametrize(("call", "form"), TEMPLATES.values(), ids=TEMPLATES)
def test_both_forms_of_a_record_give_one_text(encoder_with, call, form):
    encoder = encoder_with(call)
    assert encoder.template is not None and encoder.template.call_arguments == form
    assert encoder.refusal == ""
    rendered = [encoder.render("Tea?", answer(given)) for given in (ARGUMENTS, TEXT)]
    assert rendered[0] is not None and rendered[1] is not None
    shown = [call_in(one.text) for one in rendered]
    assert shown[0] == shown[1]
    if "arguments" in call and "items" not in call:
        assert json.loads(shown[0].rpartition("\n")[2]) == ARGUMENTS
    if "items" in call:
        assert "<item>green tea</item>" in shown[0]


def test_arguments_that_are_no_json_stay_as_they_are(encoder_with):
    for given in ("not json", "3", '"text"'):
        rendered = encoder_with("{{ c.function.arguments }}").render("Tea?", answer(given))
        assert call_in(rendered.text) == given
        quoted = encoder_with("{{ c.function.arguments | tojson }}").render("Tea?", answer(given))
        assert json.loads(call_in(quoted.text)) == given


def test_records_are_not_altered(encoder_with):
    for name, given in (("qwen2.5, llama, hermes", TEXT), ("deepseek", ARGUMENTS)):
        response = answer(given)
        before = copy.deepcopy(response)
        encoder_with(TEMPLATES[name][0]).render(response, response)
        assert response == before


def test_the_form_is_kept_with_the_data_and_data_of_before_keep_theirs(
    encoder_with, tmp_path, write_lines
):
    encoder = encoder_with(TEMPLATES["qwen2.5, llama, hermes"][0])
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "Tea", "chosen": answer(TEXT), "rejected": "no"}]
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines(rows)),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    data = prepare(config, quiet=True)
    tokens = data.info["tokens"]
    assert tokens is not None and tokens["call_arguments"] == "object"
    again = TextEncoder.from_info(tokens, data.tokenizer_path).render("Tea", answer(TEXT))
    assert again is not None and json.loads(call_in(again.text)) == ARGUMENTS
    del tokens["call_arguments"]
    old = TextEncoder.from_info(tokens, data.tokenizer_path).render("Tea", answer(TEXT))
    assert old is not None and json.loads(call_in(old.text)) == TEXT
