"""The exported class by itself: rows of any kind, the prompt's boundary, token scores, gradients."""

import pytest
import torch
from transformers import AutoConfig

from pal_ds.remote_code.modeling_pal import PalForSequenceClassification, PalRewardConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
BOS, EOS, PAD = 1, 2, 0
MARKER = [30, 31]


def make(head: str = "PalA", **changes) -> PalForSequenceClassification:
    torch.manual_seed(0)
    settings = {
        "text_config": LLAMA,
        "head": {"name": head, "init": {"num_prototypes": 2, "num_layers": 2}},
        "mixture": [0.25, 0.75],
        "prefix_ids": [BOS],
        "end_ids": [EOS],
        "marker_ids": MARKER,
        "max_tokens": 12,
        "pad_token_id": PAD,
    }
    return PalForSequenceClassification(PalRewardConfig(**{**settings, **changes})).eval()


def scores(model, rows, side="right", mask=True, **extra):
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    order = (lambda r, p: r + p) if side == "right" else (lambda r, p: p + r)
    ids = torch.tensor([order(row, pad) for row, pad in zip(rows, pads, strict=True)])
    ones = torch.tensor(
        [order([1] * len(r), [0] * len(p)) for r, p in zip(rows, pads, strict=True)]
    )
    return model(ids, ones if mask else None, **extra).logits


PLAIN = [5, 6, *MARKER, 7, 8, 9]
WAYS = [PLAIN, [BOS, *PLAIN], [*PLAIN, EOS], [BOS, *PLAIN, EOS], [BOS, BOS, *PLAIN, EOS, EOS]]


@pytest.mark.parametrize("head", ["PalA", "PalB"])
@pytest.mark.parametrize("encoding", ["joint", "separate"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_special_tokens_and_padding_do_not_matter(head: str, encoding: str, side: str) -> None:
    model = make(head, encoding=encoding)
    batch = scores(model, WAYS, side)
    assert batch.shape == (5, 1) and batch.dtype is torch.float32
    assert torch.allclose(batch, batch[:1].expand_as(batch), atol=1e-5)
    for row in WAYS:
        assert torch.allclose(scores(model, [row], mask=False), batch[:1], atol=1e-5)
    assert torch.allclose(scores(model, WAYS, side, mask=False), batch, atol=1e-6)


@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_prompt_lengths_go_before_the_marker(encoding: str) -> None:
    model = make("PalB", encoding=encoding)
    found = scores(model, [PLAIN, [BOS, *PLAIN]])
    given = scores(model, [PLAIN, [BOS, *PLAIN]], "left", prompt_lengths=torch.tensor([4, 5]))
    assert torch.allclose(found, given, atol=1e-6)
    other = scores(model, [PLAIN], prompt_lengths=[3])
    assert not torch.allclose(found[:1], other, atol=1e-4)
    # With lengths a text may hold any number of markers.
    scores(model, [[*PLAIN, *MARKER, 4]], prompt_lengths=[4])


@pytest.mark.parametrize(
    ("rows", "extra", "words"),
    [
        ([[5, 6, 7]], {}, "no response marker"),
        ([[*PLAIN, *MARKER, 4]], {}, "2 response markers"),
        ([PLAIN], {"prompt_lengths": [7]}, "prompt_lengths says 7"),
        ([PLAIN], {"prompt_lengths": [0]}, "prompt_lengths says 0"),
        ([PLAIN], {"prompt_lengths": [4, 4]}, "2 entries for 1 rows"),
    ],
)
def test_a_boundary_that_cannot_be_is_refused(rows, extra, words) -> None:
    with pytest.raises(ValueError, match=words):
        scores(make("PalB"), rows, **extra)


@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_an_empty_response_has_a_score(encoding: str) -> None:
    """A policy under training ends at once now and then; it must not end the training."""
    model = make("PalB", encoding=encoding)
    empty = [5, 6, *MARKER]
    given = scores(model, [[BOS, *empty, EOS]], prompt_lengths=[5])
    for row in (empty, [BOS, *empty], [*empty, EOS]):
        assert torch.allclose(scores(model, [row, PLAIN])[:1], given, atol=1e-6)


def test_markers_of_earlier_turns_are_explained_by_user_markers() -> None:
    model = make("PalB", user_marker_ids=[29], max_tokens=None)
    talk = [29, 5, *MARKER, 6, 29, 7, *MARKER, 8]
    assert torch.allclose(scores(model, [talk]), scores(model, [talk], prompt_lengths=[9]))
    with pytest.raises(ValueError, match="3 response markers"):
        scores(model, [[*talk, *MARKER, 3]])


def test_long_texts_lose_the_beginning_of_the_prompt() -> None:
    for head in ("PalA", "PalB"):
        model = make(head)
        short = [*range(10, 15), *MARKER, 7, 8, 9]
        assert torch.allclose(
            scores(model, [[*range(3, 10), *short]]), scores(model, [short]), atol=1e-6
        )


def test_padding_that_cannot_be_told_is_refused() -> None:
    model = make(pad_token_id=EOS)
    ids = torch.tensor([PLAIN, PLAIN])
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids)
    assert torch.allclose(model(ids[:1]).logits, model(ids, torch.ones_like(ids)).logits[:1])
    with pytest.raises(ValueError, match="without tokens"):
        model(ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match="must be equal"):
        model(ids, torch.ones(2, 3))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["PalA", "PalB"])
def test_token_scores_stand_at_their_tokens(side: str, head: str) -> None:
    model = make(head, max_tokens=None)
    rows = [[BOS, *PLAIN, EOS], PLAIN[:-1]]
    tokens = scores(model, rows, side, return_token_scores=True)
    width = len(rows[0])
    assert tokens.shape == (2, width)
    assert torch.allclose(tokens[:1, -1], scores(model, rows[:1])[0], atol=1e-6)
    shorter = slice(0, 6) if side == "right" else slice(width - 6, width)
    padding = tokens[1].clone()
    padding[shorter] = 0
    assert torch.equal(padding, torch.zeros(width))
    # A causal model: what follows a token does not change its score.
    assert torch.allclose(tokens[1, shorter], tokens[0, 1:7], atol=1e-5)


def test_token_scores_of_cut_and_separate_texts() -> None:
    row = [*range(3, 10), *range(10, 15), *MARKER, 7, 8, 9]
    cut = scores(make(), [row], return_token_scores=True)[0]
    assert (cut[:7] == 0).all() and (cut[7:] != 0).all()
    apart = scores(make("PalB", encoding="separate"), [PLAIN], return_token_scores=True)[0]
    assert (apart[:4] == 0).all() and (apart[4:] != 0).all()
    with pytest.raises(ValueError, match="encoder"):
        scores(make(pooling="mean"), [PLAIN], return_token_scores=True)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (None, "missing"),
        ([1.0], "1 entries"),
        ([0.6, 0.6], "sums to 1.2"),
        ([1.5, -0.5], "below 0"),
        ([float("nan"), 1.0], "below 0"),
    ],
)
def test_mixtures_off_the_simplex_are_refused(mixture, words) -> None:
    with pytest.raises(ValueError, match=words):
        make(mixture=mixture)


def test_saved_and_loaded_for_another_user(tmp_path) -> None:
    model = make(reward_mean=1.5, reward_std=2.0)
    model.save_pretrained(tmp_path)
    again = PalForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(scores(again, [PLAIN]), scores(model, [PLAIN]))
    assert again.config.reward_mean == 1.5 and again.config.hidden_size == 16
    other = PalForSequenceClassification.from_pretrained(tmp_path, mixture=[1, 0])
    assert torch.equal(scores(other, [PLAIN]), scores(make(mixture=[1.0, 0.0]), [PLAIN]))
    with pytest.raises(ValueError, match="sums to 2"):
        PalForSequenceClassification.from_pretrained(tmp_path, mixture=[1, 1])


def test_gradients_flow() -> None:
    model = make("PalB").train()
    scores(model, [PLAIN]).sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())
    assert model.backbone.embed_tokens.weight.grad[PLAIN[0]].abs().sum() > 0


def test_config_survives_json(tmp_path) -> None:
    config = make().config
    config.save_pretrained(tmp_path)
    again = PalRewardConfig.from_pretrained(tmp_path)
    assert again.num_labels == 1 and again.get_text_config().model_type == "llama"
    assert type(again.text_config) is type(AutoConfig.for_model("llama"))


@pytest.mark.parametrize("head", ["PalA", "PalB"])
def test_texts_cut_in_front_of_the_marker(head: str) -> None:
    """As if what was cut had never been there; a row that fits needs no marker unless the head reads the prompt."""
    model = make(head, truncation_side="right")
    long = [*range(3, 20), *MARKER, 7, 8, 9]
    # 12 ids: BOS, three of them the response, one the end, two the marker; five are left of the prompt.
    short = [*range(3, 8), *MARKER, 7, 8, 9]
    assert torch.allclose(scores(model, [long]), scores(model, [short]), atol=1e-6)
    other = scores(make(head), [long])
    assert not torch.allclose(scores(model, [long]), other, atol=1e-4)
    found = scores(model, [long], return_token_scores=True)[0]
    kept = scores(model, [short], return_token_scores=True)[0]
    assert torch.allclose(found[[*range(5), *range(17, 22)]], kept, atol=1e-6)
    assert (found[5:17] == 0).all() and (kept != 0).all()
    given = scores(model, [long], prompt_lengths=[19])
    assert torch.allclose(given, scores(model, [long]), atol=1e-6)
    if head == "PalA":
        scores(model, [[5, 6, 7]])
        with pytest.raises(ValueError, match="no response marker"):
            scores(model, [[*range(3, 20)]])


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_max"])
@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_pooled_scores_do_not_depend_on_padding(pooling: str, encoding: str) -> None:
    model = make("PalB", pooling=pooling, encoding=encoding)
    batch = scores(model, [*WAYS, [5, *MARKER, 6]], "left")
    assert torch.allclose(batch[:5], batch[:1].expand(5, -1), atol=1e-5)
    assert torch.allclose(scores(model, [PLAIN]), batch[:1], atol=1e-5)
    last = scores(make("PalB", encoding=encoding), [PLAIN])
    assert not torch.allclose(last, batch[:1], atol=1e-4)
