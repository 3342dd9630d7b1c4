"""PersonalLLM: simulated users who weigh the scores of ten reward models, each in their own way."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import numpy as np

from pal_ds.data.records import Record
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource, PromptSplits, text_of
from pal_ds.data.sources.table_files import as_number
from pal_ds.errors import UserError

SPLITS = ("train", "test")
NUM_RESPONSES = 8
REWARD_MODELS = (
    "gemma_2b",
    "gemma_7b",
    "mistral_raft",
    "mistral_ray",
    "mistral_weqweasdas",
    "llama3_sfairx",
    "oasst_deberta_v3",
    "beaver_7b",
    "oasst_pythia_7b",
    "oasst_pythia_1b",
)
_RESPONSES = tuple(f"response_{i}" for i in range(1, NUM_RESPONSES + 1))
_SCORES = tuple(f"{response}_{model}" for response in _RESPONSES for model in REWARD_MODELS)


@final
@dataclass(eq=False)
class PersonalLlm(HubSource):
    """User u's reward is w_u . (ten scores), w_u ~ Dirichlet(alpha, .., alpha); best against worst of 8.

    w_u and the prompts that u judges are keyed by (seed, u), so more users leave the others as
    they are. Scores are taken as published, each model on its own scale, as the authors do. The
    defaults are LoRe's: 1000 seen users with 0.5% of the train prompts, 500 new ones (seen: false)
    with 0.1%; of the test prompts each user judges `test_prompts_per_user` (LoRe: all 1000).

    The records' own split is the hub's train and test. Dropped and counted, in comparisons:
    `no_score`, `empty_prompt`, `empty_response`, `tie`, `prompt_in_two_splits`.

    Args:
        path: hub id, folder, or {train: file, test: file}.
        num_users: seen users, user_0000 and so on.
        num_unseen_users: new users, numbered after them.
        alpha: concentration of the weights; small: most users listen to one or two models.
        prompts_per_user: train prompts that a seen user judges.
        prompts_per_unseen_user: train prompts that a new user judges.
        test_prompts_per_user: test prompts that each user judges.
        seed: of weights and draws.
    """

    licence = "CC BY 4.0 (namkoong-lab/PersonalLLM)"

    path: HubPath = "namkoong-lab/PersonalLLM"
    num_users: int = 1000
    num_unseen_users: int = 500
    alpha: float = 0.1
    prompts_per_user: int = 47
    prompts_per_unseen_user: int = 9
    test_prompts_per_user: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_users < 1 or self.num_unseen_users < 0 or self.alpha <= 0:
            raise UserError(
                "personalllm: num_users must be 1 or more, num_unseen_users 0 or more and alpha "
                f"above 0; got {self.num_users}, {self.num_unseen_users} and {self.alpha}"
            )
        self._rows = HubRows(
            self.path,
            SPLITS,
            ("prompt", *_RESPONSES, *_SCORES),
            typed=dict.fromkeys(_SCORES, as_number),
        )

    def records(self) -> Iterator[Record]:
        """Prompt by prompt, every user who judges it."""
        self.dropped.clear()
        yield from self.each_row(
            self._rows.with_splits(), partial(self._choices, PromptSplits(), Counter())
        )

    def _choices(
        self,
        prompts: PromptSplits,
        rows_done: Counter[str],
        where: str,
        split_and_row: tuple[str, dict[str, Any]],
    ) -> Iterator[Record]:
        split, row = split_and_row
        users = self._users_of_prompts[split].get(rows_done[split], [])
        rows_done[split] += 1
        prompt = text_of(row["prompt"], where, "prompt")
        texts = [text_of(row[key], where, key) for key in _RESPONSES]
        scores = np.array([row[key] for key in _SCORES], np.float64)
        scores = scores.reshape(NUM_RESPONSES, -1)
        is_new = prompts.admits(prompt, split)
        for user in users:
            rewards = scores @ self.weights(user)
            best, worst = int(rewards.argmax()), int(rewards.argmin())
            if not prompt:
                self.dropped["empty_prompt"] += 1
            elif not is_new:
                self.dropped["prompt_in_two_splits"] += 1
            elif not np.isfinite(scores).all():
                self.dropped["no_score"] += 1
            elif rewards[best] == rewards[worst]:
                self.dropped["tie"] += 1
            elif not texts[best] or not texts[worst]:
                self.dropped["empty_response"] += 1
            else:
                yield Record(
                    user_id=f"user_{user:04d}",
                    label=-1,
                    prompt=prompt,
                    responses=(texts[best], texts[worst]),
                    split=split,
                    seen=user < self.num_users,
                )

    def weights(self, user: int) -> np.ndarray:
        """[10] fp64, >= 0, sum 1: how much each reward model counts for this user."""
        return self._weights[user]

    @cached_property
    def _weights(self) -> list[np.ndarray]:
        concentration = np.full(len(REWARD_MODELS), self.alpha)
        return [
            np.random.default_rng([self.seed, user, 0]).dirichlet(concentration)
            for user in range(self.num_users + self.num_unseen_users)
        ]

    @cached_property
    def _users_of_prompts(self) -> dict[str, dict[int, list[int]]]:
        """split -> row -> the users who judge it."""
        num_rows = self._rows.num_rows
        users_of: dict[str, dict[int, list[int]]] = {}
        for code, split in enumerate(SPLITS):
            users_of[split] = defaultdict(list)
            for user in range(self.num_users + self.num_unseen_users):
                wanted = self.test_prompts_per_user
                if split == "train":
                    is_seen = user < self.num_users
                    wanted = self.prompts_per_user if is_seen else self.prompts_per_unseen_user
                rng = np.random.default_rng([self.seed, user, 1 + code])
                order = rng.permutation(num_rows.get(split, 0))
                for row in order[:wanted].tolist():
                    users_of[split][row].append(user)
        return users_of
