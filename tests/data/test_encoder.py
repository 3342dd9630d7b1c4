"""Boundaries, markers and specials for each kind of tokenizer."""

import pytest

from pal_ds.data.tokenise import TextEncoder, load_tokenizer
from pal_ds.errors import UserError
from pal_ds.remote_code.canonical import canonical_ids, find_prompt_length

PROMPT, RESPONSE = "What is the best way to bake bread?", "Use warm water."


def encode(encoder, prompt, response):
    return encoder.encode([encoder.render(prompt, response)])[0]


def test_plain_text_byte_level(bpe):
    encoder = TextEncoder(bpe)
    got = encode(encoder, PROMPT, RESPONSE)
    assert bpe.decode(got.prompt_ids) == PROMPT + "\n\n### Response:\n"
    assert bpe.decode(got.response_ids) == RESPONSE + "</s>"
    assert bpe.decode(list(got.marker_ids)) == "\n\n### Response:\n"
    whole = got.prompt_ids + got.response_ids
    assert find_prompt_length(whole, got.marker_ids) == len(got.prompt_ids)


def test_no_prompt_leaves_the_prefix_only(llama_like, bert):
    for tokenizer, prefix in ((llama_like, [1]), (bert, [2])):
        got = encode(TextEncoder(tokenizer), None, RESPONSE)
        assert got.prompt_ids == prefix
        assert got.prompt_ids + got.response_ids == canonical_ids(
            tokenizer(RESPONSE)["input_ids"], prefix, got.response_ids[-1:]
        )


def test_no_special_tokens(bert):
    encoder = TextEncoder(bert, special_tokens=False, separator=" [SEP] ")
    got = encode(encoder, "bread", "water")
    assert bert.convert_ids_to_tokens(got.prompt_ids)[-1] == "[SEP]"
    assert 2 not in got.prompt_ids and 3 not in got.response_ids


def test_special_token_written_in_the_separator(bert):
    got = encode(TextEncoder(bert, separator=" [SEP] "), PROMPT, RESPONSE)
    assert got.marker_ids == (3,)
    assert got.prompt_ids[0] == 2 and got.prompt_ids[-1] == 3 and got.response_ids[-1] == 3


def test_separator_without_tokens(bert):
    got = encode(TextEncoder(bert, separator="\n"), PROMPT, RESPONSE)
    assert got.marker_ids == ()
    together = bert(PROMPT + "\n" + RESPONSE)["input_ids"]
    assert got.prompt_ids + got.response_ids == together


@pytest.mark.parametrize("response", ["\n\nnext", "\n\n two"])
def test_response_that_merges_into_the_separator_has_no_boundary(response):
    from pal_ds.data.tokenise import train_tokenizer

    tokenizer = train_tokenizer(["a:\n\n\nb"] * 5 + ["###:\n\n\nnext"] * 5, 300)
    assert encode(TextEncoder(tokenizer), "a", response) is None


def test_chat_template_single_and_multi_turn(chatml):
    encoder = TextEncoder(chatml)
    got = encode(encoder, PROMPT, RESPONSE)
    text = chatml.decode(got.prompt_ids)
    assert text == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(list(got.marker_ids)) == "<|im_start|>assistant\n"
    assert chatml.decode(encoder.user_marker_ids) == "<|im_start|>user\n"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": RESPONSE},
        {"role": "user", "content": "Tell me more."},
    ]
    many = encode(encoder, chat, [{"role": "assistant", "content": "No idea."}])
    whole = many.prompt_ids + many.response_ids
    length = find_prompt_length(whole, many.marker_ids, encoder.user_marker_ids)
    assert length == len(many.prompt_ids)
    assert encode(encoder, [{"role": "user", "content": PROMPT}], RESPONSE) == got


def test_template_without_generation_prompt_and_with_bos(llama_like):
    encoder = TextEncoder(llama_like)
    got = encode(encoder, PROMPT, RESPONSE)
    assert got.prompt_ids.count(1) == 1 and got.prompt_ids[0] == 1
    assert got.response_ids.count(2) == 1 and got.response_ids[-1] == 2
    text = encoder.render(PROMPT, RESPONSE).text
    for add in (True, False):
        ids = llama_like(text, add_special_tokens=add)["input_ids"]
        assert canonical_ids(ids, [1], [2]) == got.prompt_ids + got.response_ids


def test_messages_without_template(bpe):
    encoder = TextEncoder(bpe)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rendered = encoder.render(chat, [{"role": "assistant", "content": "Hi"}])
    assert rendered.text == "system: Be brief.\n\nuser: Hello\n\n### Response:\nHi"


def test_never_ignores_the_template(chatml):
    encoder = TextEncoder(chatml, chat_template="never")
    assert encoder.render("a", "b").text == "a\n\n### Response:\nb"
    assert encoder.user_marker_ids is None


def test_template_that_rewrites_the_prompt_gives_nothing(bpe, chatml):
    import copy

    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}<|im_start|>{% endif %}{{ messages|length }}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
    )
    assert TextEncoder(tokenizer).render("a", "b") is None


def test_info_makes_the_same_encoder_again(chatml, bert, tmp_path):
    for name, tokenizer, separator in (("c", chatml, "\n"), ("b", bert, " [SEP] ")):
        first = TextEncoder(tokenizer, max_length=77, separator=separator, name=name)
        tokenizer.save_pretrained(tmp_path / name)
        again = TextEncoder.from_info(first.describe(None, None), tmp_path / name)
        assert again.describe(None, None) == first.describe(None, None)
        assert encode(again, PROMPT, RESPONSE) == encode(first, PROMPT, RESPONSE)


def test_messages_for_people(bpe, tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer: '.*nothing': cannot be read"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="max_length is 1; it must exceed"):
        TextEncoder(bpe, max_length=1)
    with pytest.raises(UserError, match="must be auto or never"):
        TextEncoder(bpe, chat_template="always")
