"""Collector of given vectors: records that carry features in place of text."""

from array import array

import numpy as np

from pal_ds.errors import UserError


class VectorStore:
    """Distinct response vectors and, where records have them, prompt vectors."""

    kind = "vectors"

    def __init__(self) -> None:
        self.size: int | None = None
        self.response_values, self.prompt_values = array("f"), array("f")
        self.response_prompt = array("q")
        self.num_prompts = 0
        self._has_prompts: bool | None = None

    def add(
        self, prompt_row: int, prompt: tuple[float, ...] | None, vector: tuple[float, ...]
    ) -> None:
        """Append a response, and its prompt when that is new."""
        has_prompt, where = prompt is not None, f"response {len(self.response_prompt)}"
        if self.size is None:
            self.size, self._has_prompts = len(vector), has_prompt
        if has_prompt != self._has_prompts:
            raise UserError(
                f"{where}: some records have prompt_features and some do not; give them in every "
                "record or in none"
            )
        for name, values in (("response", vector), ("prompt", prompt)):
            if values is not None and len(values) != self.size:
                raise UserError(
                    f"{where}: a {name} vector of size {len(values)}, but the first has "
                    f"{self.size}; all vectors of a dataset must have one size"
                )
        if prompt_row == self.num_prompts:
            self.num_prompts += 1
            if prompt is not None:
                self.prompt_values.extend(prompt)
        self.response_values.extend(vector)
        self.response_prompt.append(prompt_row)

    def finish(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(response vectors [R, H], prompt vectors [P, H] or None, prompt of each response)."""
        size = self.size or 1
        responses = np.frombuffer(self.response_values, np.float32).reshape(-1, size)
        prompts = None
        if self._has_prompts:
            prompts = np.frombuffer(self.prompt_values, np.float32).reshape(-1, size)
        for name, values in (("response", responses), ("prompt", prompts)):
            if values is not None and not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise UserError(
                    f"{name} vector {row} holds a number that is not finite in float32; mend or "
                    "drop its records"
                )
        return responses, prompts, np.frombuffer(self.response_prompt, np.int64)
