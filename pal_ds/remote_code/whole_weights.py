"""Refuses weights that lack a tensor or hold another: transformers fills gaps with random numbers and only warns.

An exported model folder carries this very file.
"""

from typing import Any

from .versions import check_probe


class WholeWeights:
    """Mixed in before a transformers class: `from_pretrained` gives every tensor of the files, or ValueError."""

    @classmethod
    def from_pretrained(
        cls, *args: object, output_loading_info: bool = False, **kwargs: object
    ) -> Any:
        """Load as transformers does. Raises ValueError where names or shapes are not those of the model, or its scores
        under this version of transformers are others."""
        config: Any = kwargs.get("config")
        if config is not None and getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # Other versions choose SDPA, which cannot do it and does without.
            kwargs.setdefault("attn_implementation", "eager")
        # Told by name below; transformers itself would send the reader to a report.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        problems = {
            "missing": info.get("missing_keys"),
            "no part of this model": info.get("unexpected_keys"),
            "of another shape": info.get("mismatched_keys"),
        }
        for problem, names in problems.items():
            if names:
                first = min(name if isinstance(name, str) else str(name[0]) for name in names)
                raise ValueError(
                    f"{first}: this tensor is {problem} ({len(names)} such). The weights are damaged, "
                    "or another model's."
                )
        check_probe(model)
        return (model, info) if output_loading_info else model
