"""The tokenizer of a stock export ends a text as its training did, whichever program hands it over."""

import pytest

from pal_ds.data.tokenise import TextEncoder, load_tokenizer, train_tokenizer
from pal_ds.export.tokenizer import open_tokenizer, write_canonical_tokenizer
from tests.data.conftest import CHATML, TEXTS


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_every_form_of_the_end_has_the_ids_of_training(tmp_path, eos):
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = eos
    source, folder = tmp_path / "source", tmp_path / "out"
    tokenizer.save_pretrained(source)
    encoder = TextEncoder(load_tokenizer(str(source)))
    rendered = encoder.render("Tea?", "Yes.")
    assert rendered is not None
    (encoded,) = encoder.encode([rendered])
    assert encoded is not None
    trained = [*encoded.prompt_ids, *encoded.response_ids]
    folder.mkdir()
    write_canonical_tokenizer(source, folder, encoder.describe(None, None), len(tokenizer))
    exported = open_tokenizer(folder)
    text = rendered.text.removesuffix("<|im_end|>\n")
    for tail in ("", "<|im_end|>", "<|im_end|>\n", eos, f"<|im_end|>\n{eos}"):
        for special in (True, False):
            ids = exported(text + tail, add_special_tokens=special)["input_ids"]
            assert ids == trained, (tail, special)
