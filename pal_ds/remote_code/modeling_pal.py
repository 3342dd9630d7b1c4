"""A personalised reward model as one transformers class: token ids in, one score per text out.

An exported model folder carries this code in one file, so it needs torch and transformers alone. It scores a text as
the trainer did, however it was tokenised: with or without special tokens, padded on either side, alone or in a batch.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from .canonical import canonical_ids, find_prompt_length, num_leading, truncated
from .deviation import RewardOutput, standard_deviation
from .encoding import drop_unused_modules, hidden_states, read_states, state_size_of
from .exported_head import Features, UserState, build_head
from .rows import Text, pad_right, spread, token_mask
from .simplex import check_point
from .versions import known_config
from .whole_weights import WholeWeights


class PalRewardConfig(PretrainedConfig):
    """Configuration of the exported model: its parts, and how its texts were prepared."""

    model_type = "pal_reward"
    # transformers reads it from the class.
    sub_configs = {"text_config": AutoConfig}  # type: ignore  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        head: dict | None = None,
        mixture: list[float] | None = None,
        encoding: str = "joint",
        pooling: str = "last",
        prefix_ids: list[int] | None = None,
        end_ids: list[int] | None = None,
        marker_ids: list[int] | None = None,
        user_marker_ids: list[int] | None = None,
        max_tokens: int | None = None,
        prompt_end_ids: list[int] | None = None,
        prompt_end_replaces: int = 0,
        truncation_side: str = "left",
        reward_mean: float | None = None,
        reward_std: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps what it is given; the model checks it, since `from_pretrained` may set keys later.

        Args:
            text_config: the backbone's config, or its dictionary.
            head: {"name", "init"}: the head's class and its constructor's arguments.
            mixture: the user's point: of the simplex over the head's prototypes, for most heads.
            encoding: `joint` (the response after its prompt in one pass) or `separate`.
            pooling: a score reads a row's last token, or the mean or largest entry over the row, or both of these.
            prefix_ids, end_ids: special tokens around every text.
            kwargs: `end_variants`, all that may stand for the end; `probe`: check_probe; `posterior`: see `forward`.
            marker_ids, user_marker_ids: tokens that open a response, and a user's message.
            max_tokens, truncation_side: longer texts lose the beginning of their prompt, or (`right`)
                its end in front of the response marker.
            prompt_end_ids, prompt_end_replaces: tokens at the end of a prompt that is read by itself
                (`separate`), and how many of its own last tokens they stand for (a tokenizer may
                join an end with what precedes it).
            reward_mean, reward_std: of the rewards on the run's own data, for whoever wants to
                normalise; logits are as the trainer scored.
        """
        if isinstance(text_config, dict):
            text_config = known_config(text_config, kwargs.get("transformers_version"))
        self.text_config = text_config
        self.head = head
        self.mixture = mixture
        self.encoding = encoding
        self.pooling = pooling
        self.truncation_side = truncation_side
        self.prefix_ids = prefix_ids or []
        self.end_ids = end_ids or []
        self.marker_ids = marker_ids
        self.user_marker_ids = user_marker_ids
        self.max_tokens = max_tokens
        self.prompt_end_ids = prompt_end_ids or []
        self.prompt_end_replaces = prompt_end_replaces
        self.reward_mean = reward_mean
        self.reward_std = reward_std
        if text_config is not None:
            kwargs.setdefault("hidden_size", state_size_of(text_config, "last"))
        if kwargs.get("id2label") is None:
            kwargs["num_labels"] = 1
        super().__init__(**kwargs)


class PalForSequenceClassification(WholeWeights, PreTrainedModel):
    """Backbone and head of a run, scoring for the user whose mixture the config holds.

    `from_pretrained(FOLDER, mixture=[...])` is another user from the same files.
    """

    backbone: Any
    head: Any
    config_class = PalRewardConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PalRewardConfig) -> None:
        """Raises ValueError where the mixture is no point that the head's users may have."""
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.text_config)
        drop_unused_modules(self.backbone)
        head: dict = config.head or {}
        state_size = state_size_of(config.text_config, config.pooling)
        self.head = build_head(head["name"], state_size, head["init"])
        self.reads_prompt = "prompt" in self.head.needs
        if self.head.is_personal:
            sizes, on_simplex = self.head.point_sizes, self.head.on_simplex
            config.mixture = check_point(config.mixture, sizes, on_simplex)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_lengths: Tensor | list[int] | None = None,
        return_token_scores: bool = False,
        return_std: bool = False,
        **kwargs: Any,
    ) -> RewardOutput:
        """fp32 logits [B, 1] of token rows [B, L].

        Args:
            input_ids: rows as the tokenizer gave them.
            attention_mask: 0 on padding. Needed wherever the pad id may also end a text.
            prompt_lengths: tokens before the response in each row as passed, padding not counted.
                Where the model must know the prompt, this goes before the response marker.
            return_token_scores: logits [B, L] instead: the score of the text as if it ended at each
                token; 0 on padding and on what was cut to fit. Not where a text is pooled.
            return_std: also `std` [B, 1], how sure rewards are of the user of `config.posterior`, whose `mixture` and
                `covariance` that is.

        Raises:
            ValueError: a row without tokens, padding that cannot be told, a boundary that cannot be
                found or lies outside its row, token scores asked of an encoder.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds is not supported: scores are defined on token ids.")
        if return_token_scores and self.config.pooling != "last":
            raise ValueError(
                "return_token_scores: an encoder, and a model that pools, scores whole texts."
            )
        config = self.config
        mask = token_mask(input_ids, attention_mask, config.pad_token_id, config.end_ids)
        given = [ids[keep].tolist() for ids, keep in zip(input_ids.cpu(), mask, strict=True)]
        ends = config.end_ids, None, getattr(config, "end_variants", None)
        rows = [canonical_ids(ids, config.prefix_ids, *ends) for ids in given]
        texts = self._texts(rows, self._response_starts(given, rows, prompt_lengths))
        if not return_token_scores:
            features = self._read(texts, [[len(text.ids) - 1] for text in texts])
            reward = partial(self._reward, features)
            if not return_std:
                return RewardOutput(logits=reward(config.mixture))
            std = standard_deviation(reward, config.mixture, getattr(config, "posterior", None))
            return RewardOutput(logits=reward(config.mixture), std=std)
        places = [
            [self._place(token, ids, row, text) for token in range(len(ids))]
            for ids, row, text in zip(given, rows, texts, strict=True)
        ]
        rewards = self._reward(self._read(texts, places), config.mixture)
        return RewardOutput(logits=spread(rewards, places, mask))

    def _response_starts(
        self, given: list[list[int]], rows: list[list[int]], prompt_lengths: Any
    ) -> list[int] | None:
        """Find where the response begins in each canonical row, if anything here depends on it."""
        config = self.config
        always = self.reads_prompt or config.encoding == "separate"
        cuts_right = config.truncation_side == "right" and any(map(self._is_long, rows))
        if not always and not cuts_right:
            return None
        if prompt_lengths is None:
            if not config.marker_ids:
                raise ValueError("this model has no response marker: pass prompt_lengths.")
            # Without the end, which may be the marker's own token (BERT's [SEP]).
            bodies = [row[: len(row) - len(config.end_ids)] for row in rows]
            markers = config.marker_ids, config.user_marker_ids
            # A policy may end at once; its empty response has a score like any other.
            return [
                find_prompt_length(body, *markers, may_be_empty=True)
                if always or self._is_long(row)
                else len(config.prefix_ids)
                for body, row in zip(bodies, rows, strict=True)
            ]
        lengths = torch.as_tensor(prompt_lengths).tolist()
        if len(lengths) != len(rows):
            raise ValueError(f"prompt_lengths has {len(lengths)} entries for {len(rows)} rows.")
        starts = []
        for ids, length in zip(given, lengths, strict=True):
            if not 0 < length < len(ids):
                raise ValueError(
                    f"prompt_lengths says {length} for a row of {len(ids)} tokens; it must lie "
                    "between the two ends, in tokens of the row as passed without padding."
                )
            num_leads = num_leading(ids, config.prefix_ids)
            starts.append(len(config.prefix_ids) + max(length - num_leads, 0))
        return starts

    def _texts(self, rows: list[list[int]], starts: list[int] | None) -> list[Text]:
        """Cut each canonical row to what the backbone reads."""
        num_prefix = len(self.config.prefix_ids)
        texts = []
        for index, row in enumerate(rows):
            start = num_prefix if starts is None else starts[index]
            if self.config.encoding == "separate":
                ids, _ = self._cut(row[:num_prefix] + row[start:], num_prefix)
                prompt = row[: start - self.config.prompt_end_replaces]
                prompt = prompt + self.config.prompt_end_ids
                prompt, _ = self._cut(prompt, len(prompt))
                texts.append(Text(ids, num_prefix, len(row) - len(ids), prompt, 0))
            else:
                ids, first_cut = self._cut(row, start)
                num_cut = len(row) - len(ids)
                length = max(start - num_cut, num_prefix, 1)
                texts.append(Text(ids, first_cut, num_cut, [], length))
        return texts

    def _is_long(self, row: list[int]) -> bool:
        limit = self.config.max_tokens
        return limit is not None and len(row) > limit

    def _cut(self, row: list[int], start: int) -> tuple[list[int], int]:
        """(at most `max_tokens` ids of a row whose response begins at `start`, where the cut is).

        A response that is too long by itself loses its beginning, which no text of training did.
        """
        limit, num_prefix = self.config.max_tokens, len(self.config.prefix_ids)
        if limit is None or len(row) <= limit:
            return row, num_prefix
        budget, num_marker = limit - (len(row) - start), len(self.config.marker_ids or [])
        if self.config.truncation_side == "right" and budget >= num_prefix:
            first, last = truncated(start, num_prefix, budget, num_marker, "right")
        else:
            first, last = truncated(len(row), num_prefix, limit, 0, "left")
        return row[:first] + row[last:], first

    def _place(self, token: int, given: list[int], row: list[int], text: Text) -> int:
        """Index in `text.ids` of a token of the row as passed; -1 where it is not read there."""
        prefix_ids = self.config.prefix_ids
        num_leads = num_leading(given, prefix_ids)
        if token < num_leads:
            return token % len(prefix_ids)
        # Repeated end tokens all stand for the one that is kept.
        kept = min(len(prefix_ids) + token - num_leads, len(row) - 1)
        if kept < text.first_cut:
            return kept
        return kept - text.num_cut if kept >= text.first_cut + text.num_cut else -1

    def _read(self, texts: list[Text], positions: list[list[int]]) -> Features:
        """Features of each text at T positions of its ids; shorter rows repeat."""
        device = self.device
        width = max(map(len, positions))
        columns = [[max(p, 0) for p in row] + [0] * (width - len(row)) for row in positions]
        sequences = [text.ids for text in texts]
        prompt_rows = prompt_length = None
        index = torch.arange(len(texts), device=device)
        if self.reads_prompt:
            prompt_rows, lengths = index, [text.prompt_length for text in texts]
            if self.config.encoding == "separate":
                sequences = sequences + [text.prompt for text in texts]
                prompt_rows, lengths = index + len(texts), [len(text.prompt) for text in texts]
            prompt_length = torch.tensor(lengths, device=device)
        ids, mask = pad_right(sequences, self.config.pad_token_id, device)
        response, prompt, prompt_length = read_states(
            hidden_states(self.backbone, ids, mask),
            mask,
            torch.tensor(columns, device=device),
            prompt_rows,
            prompt_length,
            pooling=self.config.pooling,
            prompt_tokens=False,
        )
        index = index[:, None]
        return Features(response, index, prompt, index, prompt_length)

    def _reward(self, features: Features, point: list[float] | Tensor | None) -> Tensor:
        """fp32 [B, T] for the user at this point."""
        index = features.response_index
        if self.head.is_personal:
            weights = torch.as_tensor(point, device=index.device).expand(len(index), -1)
            return self.head.reward(features, UserState(None, None, weights))[:, 0]
        return self.head.reward(features, UserState())[:, 0]


# Not registered with AutoConfig: a folder of another head would then be opened with this one's code.
__all__ = ["PalForSequenceClassification", "PalRewardConfig"]
