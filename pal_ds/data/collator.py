"""Make a batch from row numbers.

It reads prepared tables only; it knows nothing of heads or losses beyond which positions, prompts and contexts are
asked for.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.batch import Batch, answers_of
from pal_ds.data.draws import Contexts, Draws, preferred_first
from pal_ds.data.features import MappedFeatures
from pal_ds.data.packing import pack_joint, pack_pooled, pack_separate, pad_right
from pal_ds.data.ragged import Ragged, windows_from_first_difference
from pal_ds.data.tables import PreparedData, targets
from pal_ds.data.tokenise import truncation_side
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.remote_code.canonical import truncated

ScoredPositions = Literal["last", "all"]


@dataclass(frozen=True)
class Collator:
    """Builds batches from prepared data for one run."""

    data: PreparedData
    scored_positions: ScoredPositions = "last"
    """last: the end token of each response; all: every response token (`mean` and `cumulative` weightings)."""
    encoding: Literal["joint", "separate"] = "joint"
    with_prompt: bool = False
    packed: bool = False
    """All texts in one row without padding; for decoders with each prompt once for all its responses."""
    pooled: bool = False
    """True if one mean stands for each text: encoders."""
    with_answers: bool = False
    """True if batches say where the tokens of preferred responses are predicted; joint encoding of token ids."""
    pad_token_id: int = 0
    response_store: MappedFeatures | None = None
    prompt_store: MappedFeatures | None = None
    """Keyed by response in joint encoding (a truncated prompt differs between responses), else by prompt."""
    table_rows: np.ndarray | None = None
    """User table row of each user of the data, -1 for one the table does not hold; None: the same rows."""
    group_codes: np.ndarray | None = None
    """The run's code of each group of the data, -1 for one it does not know; None: the same codes."""
    generic_row: int = -1
    """User table row of the generic user, of whom nothing is known: no context, no group of a borrowed comparison."""
    contexts: Contexts | None = None
    """Source of a user's other comparisons; given where the head reads them."""

    def __call__(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        draws: Draws | None = None,
        stand_in: int = 0,
        users: np.ndarray | None = None,
        context: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Batch:
        """`rows` of the comparisons table at global `positions`; `draws` asks for what is random in training.

        An empty run becomes the comparison `stand_in` at weight 0, so that its rank takes part in the collectives.
        `users` are the user table rows where they are not those of the comparisons; `context` is (comparisons [B, N],
        how many count [B]) in place of drawn ones.
        """
        weight = np.ones(max(len(rows), 1), np.float32)
        if len(rows) == 0:
            rows, positions = np.full(1, stand_in, np.int64), np.full(1, -1, np.int64)
            weight, users = np.zeros(1, np.float32), None
        users = self.user_rows(rows) if users is None else users
        if context is None and self.contexts is not None and draws is not None:
            context = self.contexts.draw(rows, draws.epoch, draws.num_context)
        is_generic = (users == self.generic_row) & (self.generic_row >= 0)
        # Records that name no user are the generic user's own, and their group is known all the same.
        is_borrowed = is_generic & (self.user_rows(rows) != self.generic_row)
        table = self.data.comparisons[rows]
        groups = table["group"].astype(np.int64)
        if self.group_codes is not None:
            groups = np.append(self.group_codes, -1)[groups]
        pairs = np.stack([table["a"], table["b"]], axis=1)
        others = pairs[:0] if context is None else preferred_first(self.data, context[0].ravel())
        responses, index = np.unique(np.concatenate([pairs, others]), return_inverse=True)
        response_index, index = np.split(index.reshape(-1, 2), [len(pairs)])
        context_inputs = {}
        if context is not None:
            context_inputs["context"] = torch.from_numpy(index.reshape(*context[0].shape, 2))
            context_inputs["context_length"] = torch.from_numpy(np.where(is_generic, 0, context[1]))
        start, end = self._windows(responses, response_index)
        inputs = self._inputs(responses, response_index)
        answers = None
        if self.with_answers and not self.stored:
            preferred = np.where(table["label"] < 0, response_index[:, 0], response_index[:, 1])
            first_scored = self._scored_columns(responses)[:, 0]
            answers = answers_of(inputs, first_scored, responses, self.responses, preferred)
        return Batch(
            **inputs,
            answers=answers,
            response_index=torch.from_numpy(response_index),
            window_start=torch.from_numpy(start),
            window_end=torch.from_numpy(end),
            label=torch.from_numpy(table["label"].astype(np.int64)),
            target=None if self.data.is_hard else torch.from_numpy(targets(table)),
            required_margin=torch.from_numpy(table["margin"].astype(np.float32)),
            weight=torch.from_numpy(weight),
            user_row=torch.from_numpy(users),
            position=torch.from_numpy(positions.astype(np.int64)),
            group=torch.from_numpy(np.where(is_borrowed, -1, groups)),
            **({} if draws is None else draws.noise(positions)),
            **context_inputs,
        )

    @property
    def stored(self) -> bool:
        """True if batches carry states in place of token ids."""
        return self.response_store is not None or self.data.response_vectors is not None

    @property
    def responses(self) -> Ragged:
        assert self.data.responses is not None, "vector records have no token ids"
        return self.data.responses

    @property
    def prompts(self) -> Ragged:
        assert self.data.prompts is not None, "vector records have no token ids"
        return self.data.prompts

    def user_rows(self, rows: np.ndarray) -> np.ndarray:
        """User table row of each comparison, int64; -1 for users the table does not hold."""
        users = self.data.comparisons["user"][rows].astype(np.int64)
        return users if self.table_rows is None else self.table_rows[users]

    def _windows(
        self, responses: np.ndarray, response_index: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scored window [start, end) of each pair."""
        num_pairs = len(response_index)
        if self.scored_positions == "last" or self.data.response_vectors is not None:
            return np.zeros(num_pairs, np.int64), np.ones(num_pairs, np.int64)
        return windows_from_first_difference(self.responses, responses, response_index)

    def _inputs(self, responses: np.ndarray, response_index: np.ndarray) -> dict[str, Any]:
        if self.packed and not self.stored:
            fields, prompt_of_response = self._packed(responses)
        else:
            prompts, prompt_of_response = responses, np.arange(len(responses))
            if self.encoding == "separate" or self.data.response_vectors is not None:
                prompts, prompt_of_response = np.unique(
                    self.data.response_prompt[responses], return_inverse=True
                )
            fields = (self._states if self.stored else self.tokens)(responses, prompts)
        prompt_index = (
            torch.from_numpy(prompt_of_response[response_index]) if self.with_prompt else None
        )
        return {**fields, "prompt_index": prompt_index}

    def _scored_columns(self, responses: np.ndarray) -> np.ndarray:
        """Scored positions of each response, counted from its first token, int64 [R, T]."""
        last = self.responses.lengths_of(responses)[:, None] - 1
        if self.scored_positions == "last":
            return last
        return np.minimum(np.arange(last.max(initial=-1) + 1)[None, :], last)

    def _states(self, responses: np.ndarray, prompts: np.ndarray) -> dict[str, Tensor | None]:
        prompt_states = prompt_length = None
        if self.response_store is None:
            assert self.data.response_vectors is not None, "neither stored states nor vectors"
            response_states = _states_of(self.data.response_vectors, responses)
            if self.with_prompt:
                assert self.data.prompt_vectors is not None, "a head that needs the prompt got none"
                prompt_states = _states_of(self.data.prompt_vectors, prompts)
                prompt_length = torch.ones(len(prompts), dtype=torch.int64)
        else:
            store = self.response_store
            response_states = store.gather(responses, int(store.lengths_of(responses).max()))
            if self.with_prompt:
                assert self.prompt_store is not None, (
                    "a head that needs the prompt got no stored prompt states"
                )
                lengths = self.prompt_store.lengths_of(prompts)
                prompt_states = self.prompt_store.gather(prompts, int(lengths.max()))
                prompt_length = torch.from_numpy(lengths)
        return {
            **dict.fromkeys(("input_ids", "attention_mask", "response_positions", "prompt_rows")),
            "response_states": response_states,
            "prompt_states": prompt_states,
            "prompt_length": prompt_length,
        }

    def tokens(self, responses: np.ndarray, prompts: np.ndarray) -> dict[str, Tensor | None]:
        """Token fields of a batch of these response rows (and, in separate encoding, these prompt rows)."""
        sequences, starts = [], []
        for response in responses:
            head, tail = self.sequence(int(response))
            sequences.append(np.concatenate([head, tail]))
            starts.append(len(head))
        prompt_rows = prompt_length = None
        if self.with_prompt and self.encoding == "joint":
            # An answer that fills max_length leaves no prompt; its first token then stands in, as in the export.
            prompt_rows, prompt_length = np.arange(len(responses)), np.maximum(starts, 1)
        elif self.with_prompt:
            prompt_rows = np.arange(len(responses), len(responses) + len(prompts))
            sequences += [self.prompt_sequence(int(prompt)) for prompt in prompts]
            prompt_length = np.asarray(
                [len(part) for part in sequences[len(responses) :]], np.int64
            )
        ids, mask = pad_right(sequences, self.pad_token_id)
        positions = np.asarray(starts, np.int64)[:, None] + self._scored_columns(responses)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "response_positions": torch.from_numpy(positions),
            "prompt_rows": None if prompt_rows is None else torch.from_numpy(prompt_rows),
            "prompt_length": None if prompt_length is None else torch.from_numpy(prompt_length),
            "response_states": None,
            "prompt_states": None,
        }

    def _packed(self, responses: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """(token fields of one row of these responses and their distinct prompts, prompt slot of each response)."""
        heads, tails = zip(*(self.sequence(int(response)) for response in responses), strict=True)
        prompts, columns = self.data.response_prompt[responses], self._scored_columns(responses)
        if self.encoding == "joint" and not self.pooled:
            texts = pack_joint(heads, prompts, tails)
            return texts.fields(columns, with_prompt=self.with_prompt), texts.prompt_of_response
        whole = [np.concatenate(parts) for parts in zip(heads, tails, strict=True)]
        distinct, slots = np.unique(prompts, return_inverse=True)
        alone = [self.prompt_sequence(prompt) for prompt in distinct] if self.with_prompt else []
        if self.pooled:
            return pack_pooled(whole, alone), slots
        texts = pack_separate(alone, whole, slots)
        return texts.fields(columns + len(heads[0]), with_prompt=self.with_prompt), slots

    def sequence(self, response: int) -> tuple[np.ndarray, np.ndarray]:
        """(what precedes the response, the response) as token ids; the prompt alone is truncated."""
        tokens = self.data.info["tokens"]
        num_prefix, tail = len(tokens["prefix_ids"]), self.responses[response]
        head = self.prompts[int(self.data.response_prompt[response])]
        if self.encoding == "separate":
            return head[:num_prefix], tail
        return self._truncated(head, tokens["max_length"] - len(tail)), tail

    def prompt_sequence(self, prompt: int) -> np.ndarray:
        """The prompt alone, with its marker, as separate encoding reads it."""
        return self._truncated(self.prompts[prompt], self.data.info["tokens"]["max_length"])

    def _truncated(self, ids: np.ndarray, budget: int) -> np.ndarray:
        """Keep at most `budget` of a prompt's ids; the special tokens in front stay."""
        if len(ids) <= budget:
            return ids
        tokens = self.data.info["tokens"]
        num_marker, side = len(tokens["marker_ids"] or ()), truncation_side(tokens)
        first, last = truncated(len(ids), len(tokens["prefix_ids"]), budget, num_marker, side)
        return np.concatenate([ids[:first], ids[last:]])


def _states_of(table: np.ndarray, rows: np.ndarray) -> Float[Tensor, "n one H"]:
    """Rows of a memory-mapped table as states of one position."""
    return torch.from_numpy(np.asarray(table[rows]))[:, None]
