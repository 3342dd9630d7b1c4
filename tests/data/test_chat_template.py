"""Chat templates: whole messages, a clock that stands still, headers, and refusals that are quoted."""

import copy
import json
import logging
from datetime import datetime, timedelta

import pytest
from transformers.utils import chat_template_utils

from pal_ds.data.chat_template import choose_template, freeze_clock
from pal_ds.data.parse import parse_record
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tokenise import TextEncoder, load_tokenizer
from pal_ds.errors import UserError
from pal_ds.remote_code.canonical import canonical_ids
from tests.data.conftest import CHATML

CALL = {"type": "function", "function": {"name": "order", "arguments": '{"item": "oolong"}'}}
TOOL = {"type": "function", "function": {"name": "order", "parameters": {}}}
SHOWS_ALL = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments }})</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def with_template(chatml):
    def make(template):
        tokenizer = copy.deepcopy(chatml)
        tokenizer.chat_template = template
        return tokenizer

    return make


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(name: str) -> list[dict]:
    call = {"type": "function", "function": {"name": name, "arguments": '{"item": "oolong"}'}}
    return [assistant(None, tool_calls=[call])]


def test_two_responses_that_call_different_tools_differ(with_template):
    encoder = TextEncoder(with_template(SHOWS_ALL))
    row = {"prompt": [user("Tea")], "chosen": calls("order"), "rejected": calls("cancel")}
    record = parse_record({**row, "tools": [TOOL]}, "x")
    texts = [encoder.render(record.prompt, r, record.tools).text for r in record.responses]
    assert "order(" in texts[0] and "cancel(" in texts[1] and "None" not in texts[0]
    assert texts[0].startswith('<tools>[{"type": "function"')
    for response, text in zip(record.responses, texts, strict=True):
        rendered = encoder.render(record.prompt, response, record.tools)
        assert rendered.text == text
        assert not encoder.not_shown(record.prompt, response, record.tools, rendered)


def test_without_a_template_calls_and_reasoning_are_text(bpe):
    encoder = TextEncoder(bpe)
    record = parse_record(
        {
            "prompt": [
                user("Tea"),
                assistant(None, tool_calls=[CALL]),
                {"role": "tool", "content": "ok"},
            ],
            "chosen": [assistant("Done.", reasoning_content="It came.")],
            "rejected": [assistant("No.")],
        },
        "x",
    )
    text = encoder.render(record.prompt, record.responses[0]).text
    assert '"name": "order"' in text and "oolong" in text and "tool: ok" in text
    assert text.endswith("### Response:\nIt came.\nDone.")
    assert encoder.render(record.prompt, record.responses[1]).text.endswith("### Response:\nNo.")


def test_parts_of_text_are_joined_and_pictures_refused():
    parts = [{"type": "text", "text": "Tea"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert parse_record(row, "x").prompt == [user("Tea?")]
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(UserError, match=r"x: 'prompt' message 0 holds .*must be of text"):
        parse_record(row, "x")
    with pytest.raises(UserError, match="message 0 is"):
        parse_record({**row, "prompt": [assistant(None)]}, "x")


def test_pairs_that_read_alike_say_what_is_not_shown(chatml, tmp_path, write_lines):
    chatml.save_pretrained(tmp_path / "tokenizer")
    pair = {
        "prompt": [user("Tea")],
        "chosen": [{**calls("order")[0], "content": "One moment."}],
        "rejected": [{**calls("cancel")[0], "content": "One moment."}],
    }
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines([pair])),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    with pytest.raises(UserError, match=r"identical 1; the chat template leaves out: tool call\)"):
        prepare(config, quiet=True)


def test_keys_that_a_table_fills_with_null_are_no_content():
    row = {"chosen": "a", "rejected": "b", "prompt": [{**user("Tea"), "tool_calls": None}]}
    assert parse_record(row, "x").prompt == [user("Tea")]


def test_what_a_template_leaves_out_is_counted_and_warned_of(
    with_template, tmp_path, write_lines, caplog
):
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with_template(template).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be a pirate."}, user(f"Tea {i}")],
            "chosen": [assistant("yes", reasoning_content="They like tea.")],
            "rejected": [assistant("no")],
        }
        for i in range(4)
    ]
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines(rows)),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    with caplog.at_level(logging.WARNING):
        data = prepare(config, quiet=True)
    assert data.info["not_shown"] == {"message of role system": 8, "reasoning": 4}
    assert caplog.text.count("leaves something out") == 1


def test_pairs_that_differ_only_in_what_is_not_shown_say_so(chatml, tmp_path, write_lines):
    chatml.save_pretrained(tmp_path / "tokenizer")
    pair = {"prompt": [user("Tea")], "chosen": calls("order"), "rejected": calls("cancel")}
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines([pair])),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    # Nothing of either response is left, not even a token.
    with pytest.raises(
        UserError, match=r"boundary 2; the template leaves out: tool call \(2 texts\)"
    ):
        prepare(config, quiet=True)


DATED = (
    "Today is {{ strftime_now('%d %b %Y') }}, {{ strftime_now(fmt or '%H:%M:%S.%f') }}\n" + CHATML
)


def test_the_clock_stands_still_from_prepare_on(with_template, tmp_path, write_lines, monkeypatch):
    with_template("{% set fmt = '' %}" + DATED).save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Tea {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines(rows)),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    data = prepare(config, quiet=True)
    clock = data.info["tokens"]["clock"]
    assert clock is not None
    assert abs(datetime.fromisoformat(clock) - datetime.now().astimezone()) < timedelta(minutes=5)
    encoder = TextEncoder.from_info(data.info["tokens"], data.tokenizer_path)
    day = datetime.fromisoformat(clock)
    rendered = encoder.render("Tea 0", "yes")
    assert rendered is not None
    assert rendered.text.startswith(day.strftime("Today is %d %b %Y, %H:%M:%S.%f\n"))
    kept = [json.loads(line) for line in (data.path / "samples.jsonl").read_text().splitlines()]
    assert {sample["text"].partition("\n")[0] for sample in kept} == {
        rendered.text.partition("\n")[0]
    }
    # Whoever opens the tokenizer without us gets the day of its preparation, as the exported folder's does.
    other = load_tokenizer(str(data.tokenizer_path))
    assert day.strftime("%d %b %Y") in other.apply_chat_template([user("a")], tokenize=False)


FORMATS = (
    *(
        "%d %b %Y",
        "%%d",
        "%%%d%%",
        "%s",
        "100%",
        "%-d.%-m.",
        "%B, %A %j %U %Z|%z",
        "%c %x %X %D %T",
    ),
    *("%10Y", "%_d", "%^a", "%e %k %l %P %C %G %h %r %R %F %f", "it is", "é %d", ""),
)


class Noon(datetime):
    """A clock as transformers reads it, of one moment."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 6, 5, 4, 3, 21)


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "format='{}'", "'{}' | trim"])
@pytest.mark.parametrize(
    "before",
    [
        "",
        "\n",
        "\n\n  ",
        "   {% set x = 1 %}\n",
        "  {%- set x = 1 %}  \n\n",
        "{# of 2024 #}\n",
        "\t{% macro m() %}a{% endmacro %}",
        "{% if strftime_now is defined %} {% endif %}",
    ],
)
def test_a_frozen_text_differs_in_nothing_but_the_moment(
    with_template, monkeypatch, before, written
):
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)
    said = "".join(f"[{{{{ strftime_now({written.format(each)}) }}}}]\n" for each in FORMATS)
    tokenizer = with_template(f"{before}{said}  {{% set y = 2 %}}\n{CHATML}")
    running = tokenizer.apply_chat_template([user("a")], tokenize=False)
    freeze_clock(tokenizer, Noon.now().astimezone().isoformat(timespec="microseconds"))
    monkeypatch.undo()
    assert tokenizer.apply_chat_template([user("a")], tokenize=False) == running
    assert "[06 Jul 2024]" in running and "[%d]" in running


def test_a_clock_of_another_day_is_another_text(with_template):
    texts = set()
    for day in ("2024-07-26T12:00:00", "2025-01-01T12:00:00", "2025-01-01T12:00:00"):
        tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + CHATML)
        texts.add(TextEncoder(tokenizer, clock=day).render("a", "b").text.partition("<")[0])
        freeze_clock(tokenizer, day)
        assert TextEncoder(tokenizer).render("a", "b").text.partition("<")[0] in texts
    assert texts == {"26 Jul 2024", "01 Jan 2025"}


def test_data_of_before_say_that_their_clock_runs(with_template, tmp_path, caplog):
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + CHATML)
    tokens = TextEncoder(tokenizer).describe(None, None)
    tokenizer.save_pretrained(tmp_path)
    del tokens["clock"]
    assert TextEncoder.from_info(tokens, tmp_path).render("a", "b") is not None
    assert "scores change from day to day" in caplog.text
    assert "clock" not in TextEncoder(with_template(CHATML)).describe(None, None)


THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_PROMPT = CHATML.partition("{% if add")[0]


@pytest.mark.parametrize("template", [THINKS, NO_PROMPT], ids=["opens <think>", "no prompt"])
def test_the_header_is_that_of_a_finished_conversation(with_template, template, chatml):
    encoder, usual = TextEncoder(with_template(template)), TextEncoder(chatml)
    assert encoder.header == usual.header == "<|im_start|>assistant\n"
    chat = [user("Tea"), assistant("Yes."), user("More")]
    for prompt in ("Tea", chat):
        assert encoder.render(prompt, "No.") == usual.render(prompt, "No.")


def test_data_of_before_keep_the_header_that_they_were_made_with(with_template, tmp_path):
    tokenizer = with_template(NO_PROMPT)
    tokens = TextEncoder(tokenizer).describe(None, None)
    tokenizer.save_pretrained(tmp_path)
    assert tokens["finished_header"]
    new = TextEncoder.from_info(tokens, tmp_path).render("Tea?", "Yes.")
    del tokens["finished_header"]
    old = TextEncoder.from_info(tokens, tmp_path).render("Tea?", "Yes.")
    assert new is not None and old is not None and new.text == old.text
    assert new.text[new.response_start :] == "Yes.<|im_end|>\n"
    assert old.text[old.response_start :] == "<|im_start|>assistant\nYes.<|im_end|>\n"


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


@pytest.mark.parametrize(
    "odd",
    [
        [assistant("Hello, I am Bert."), user("Tea?")],
        [user("Tea?"), user("Now?")],
        [user("Tea?"), assistant("A moment."), {"role": "tool", "content": "42 sorts"}],
        [user("Tea?"), assistant("Sure:")],
    ],
    ids=["greeting", "two turns", "tool", "prefill"],
)
def test_conversations_of_any_shape_are_rendered_where_the_template_can(
    with_template, tmp_path, write_lines, odd
):
    rows = [{"prompt": f"Tea {i}", "chosen": "yes", "rejected": "no"} for i in range(99)]
    rows.append({"prompt": odd, "chosen": "yes", "rejected": "no"})
    path = write_lines(rows)
    for name, template in (("chatml", CHATML), ("alternates", ALTERNATES)):
        with_template(template).save_pretrained(tmp_path / name)
        config = DataConfig(
            path=str(tmp_path / f"D_{name}"), source=Jsonl(path), tokenizer=str(tmp_path / name)
        )
        if name == "chatml":
            assert len(prepare(config, quiet=True).comparisons) == 100
        else:
            with pytest.raises(UserError, match=r"the template says: .*Roles must alternate"):
                prepare(config, quiet=True)


def test_a_head_that_reads_the_prompt_is_refused_such_data(chatml, tmp_path, write_lines):
    from pal_ds.heads import PalB
    from pal_ds.modeling.combination_checks import check_head

    rows = [{"prompt": f"Tea {i}", "chosen": "yes", "rejected": "no"} for i in range(99)]
    rows.append({"prompt": [assistant("Hi."), user("Tea?")], "chosen": "yes", "rejected": "no"})
    chatml.save_pretrained(tmp_path / "tokenizer")
    config = DataConfig(
        path=str(tmp_path / "D"),
        source=Jsonl(write_lines(rows)),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    data = prepare(config, quiet=True)
    assert data.info["tokens"]["marker_ids"] is None
    assert data.info["tokens"]["marker_kept"] == pytest.approx(0.99)
    with pytest.raises(
        UserError, match=r"it reads the prompt, and only 99.0% of the conversations"
    ):
        check_head(data, PalB(8, num_prototypes=2, dim=4))


def test_templates_by_name(with_template):
    tokenizer = with_template({"tool_use": CHATML, "rag": "{{ messages | length }}" + CHATML})
    with pytest.raises(
        UserError, match=r"several chat templates \(rag, tool_use\) and none is call"
    ):
        TextEncoder(tokenizer)
    with pytest.raises(UserError, match=r"'rga'; it must be auto or never, or the name of a templ"):
        choose_template(tokenizer, "t", "rga")
    choose_template(tokenizer, "t", "tool_use")
    assert tokenizer.chat_template == CHATML
    assert TextEncoder(tokenizer).uses_template


def test_what_a_template_raises_is_told(with_template):
    with pytest.raises(UserError, match=r"cannot render one user message \(TypeError: "):
        TextEncoder(with_template("{{ tools | length }}" + CHATML))


GEMMA = (
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("template", [CHATML, GEMMA])
def test_a_text_ends_once_where_a_policy_ends_it(with_template, template, eos):
    """Not `<|im_end|>\\n<|im_end|>`: every form in which a program hands the text over has the ids of training."""
    tokenizer = with_template(template)
    tokenizer.eos_token = eos
    encoder = TextEncoder(tokenizer)
    rendered = encoder.render("Tea?", "Yes.")
    (encoded,) = encoder.encode([rendered])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.response_ids[-1] == end and encoded.response_ids.count(end) == 1
    trained = [*encoded.prompt_ids, *encoded.response_ids]
    tokens = encoder.describe(None, None)
    text = rendered.text.removesuffix("<|im_end|>\n")
    for tail in ("", "<|im_end|>", "<|im_end|>\n", eos, f"<|im_end|>{eos}", f"<|im_end|>\n{eos}"):
        ids = tokenizer(text + tail, add_special_tokens=False)["input_ids"]
        ends = {"end_ids": tokens["end_ids"], "end_variants": tokens["end_variants"]}
        assert canonical_ids(ids, [], **ends) == trained, tail
    # A line feed that belongs to the response stays.
    ids = tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
    assert canonical_ids(ids, [], **ends) != trained


def test_data_of_before_keep_the_end_that_they_were_made_with(chatml, tmp_path):
    tokens = TextEncoder(chatml).describe(None, None)
    chatml.save_pretrained(tmp_path)
    old = {**tokens, "end_ids": [chatml.eos_token_id]}
    del old["end_variants"]
    encoder = TextEncoder.from_info(old, tmp_path)
    (encoded,) = encoder.encode([encoder.render("Tea?", "Yes.")])
    assert chatml.decode(encoded.response_ids) == "Yes.<|im_end|>\n</s>"
    assert encoder.describe(None, None) == {**old, "tokenizer": tokens["tokenizer"]}


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 // 0 }}", "{{ 10.0 ** 1000 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_whatever_a_template_raises_is_its_answer(with_template, fault):
    """Arithmetic, overflow and endless recursion, for one conversation or from the first word on."""
    encoder = TextEncoder(
        with_template("{% if messages|length > 2 %}" + fault + "{% endif %}" + CHATML)
    )
    assert encoder.render([user("a"), assistant("b"), user("c")], [assistant("d")]) is None
    assert "Error: " in encoder.refusal
    assert encoder.render([user("a")], [assistant("d")])
    with pytest.raises(
        UserError, match=r"its chat template cannot render one user message \(\w+Err"
    ):
        TextEncoder(with_template(fault))
