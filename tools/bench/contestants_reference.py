"""The PAL reference in `bench_step.py`: its own modules, run from a checkout; lightning is stubbed where absent.

The stub runs the reference's manual optimisation and drops its logging, which only makes it faster. The rung
`vectorised` keeps its forward and replaces its loop over tokens by `pal_ds.losses`.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tools.bench.contestants_pal_ds import LOSSES, Method
from tools.bench.step_case import MAX_LENGTH, PAD, Case, Contestant, Pairs, Unavailable

RATES = {"lr": 1e-4, "weight_decay": 0.0}


class Reference(Contestant):
    """One training step of the reference: rows of 512, two or three backbone calls, a loop over tokens, Adam."""

    def __init__(
        self,
        case: Case,
        method: Method,
        checkout: Path,
        weights: dict[str, Tensor],
        *,
        vectorised: bool = False,
    ) -> None:
        """Starts from pal_ds's weights. Raises Unavailable where the checkout cannot be imported."""
        self.method, self.vectorised = method, vectorised
        self.with_prompt = method != "pal_a"
        module, self.divergence = load_reference(checkout, "b" if self.with_prompt else "a")
        with contextlib.redirect_stdout(None):
            self.learner = self._learner(module, case)

        self.samples = self._samples(case.timed, 0, num_padding_at_beginning=1)
        # One pad earlier than the reference ends its windows: there they hold no pad (see README.md).
        self.parity = self._samples(case.parity, len(case.timed), num_padding_at_beginning=0)
        users = [sample[0]["input"][0] for sample in self.samples + self.parity]
        self.learner.prefLearner.user_learner.init_weight(users)
        self.names = names_of(self.learner.prefLearner, [s[0]["input"][0] for s in self.parity])
        with torch.no_grad():
            for name, parameters in self.names.items():
                for parameter, value in zip(
                    parameters, split_weight(name, weights[name], len(parameters)), strict=True
                ):
                    parameter.copy_(value.view_as(parameter))
        self.learner.prefLearner.update_trainable_params()
        self.learner.set_mode("new_pair")
        with warnings.catch_warnings():
            # PAL-A lists its one projector twice.
            warnings.filterwarnings("ignore", message="optimizer contains")
            self.optimizer = self.learner.configure_optimizers()["optimizer"]
        self.learner.optimizers = lambda: self.optimizer
        self.learner.train()
        self.num_padded_tokens = len(case.timed) * MAX_LENGTH * (3 if self.with_prompt else 2)

    def _learner(self, module: Any, case: Case) -> Any:
        return module.LearnerWrapLightning(
            Options(**learner_options(case, self.with_prompt)),
            optimizer_options(),
            {
                "loss_type": "CE" if self.with_prompt else "hinge",
                "loss_weighting": "cumulative",
                "upper_bound": 23.0,
                "lmd": 1.0,
            },
        )

    def loss_and_gradients(self) -> dict[str, Tensor]:
        loss = self._loss(default_collate(self.parity))
        self.learner.zero_grad()
        loss.backward()
        result = {"loss": loss.detach()}
        for name, parameters in self.names.items():
            parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
            result[name] = joined_weight(name, parts)
        self.learner.zero_grad()
        return result

    def step(self) -> None:
        batch = default_collate(self.samples)
        if not self.vectorised:
            self.learner.training_step(batch, 0)
            return
        self.optimizer.zero_grad()
        self._loss(batch).backward()
        self.optimizer.step()

    def _loss(self, batch: Any) -> Tensor:
        if not self.vectorised:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="To copy construct")
                return self.learner._wrap_forward(batch, 0)[0]
        sample, label = batch
        output = self.learner.prefLearner(sample["input"])
        margin = output[..., 1] - output[..., 0] if self.with_prompt else output
        return LOSSES[self.method](margin, label, *sample["inds"]).mean()

    def _samples(
        self, pairs: Pairs, first_user: int, *, num_padding_at_beginning: int
    ) -> list[Any]:
        """Samples as the reference's data set holds them: rows padded to 512, the window by its own function."""
        made = []
        for index, (prompt, responses) in enumerate(
            zip(pairs.prompts, pairs.responses, strict=True)
        ):
            if not self.with_prompt:
                responses = tuple(np.concatenate([prompt, response]) for response in responses)
            left, right = (padded_row(ids) for ids in responses)
            tokens = {
                "left_input_ids": left["input_ids"],
                "left_attention_mask": left["attention_mask"],
                "right_input_ids": right["input_ids"],
                "right_attention_mask": right["attention_mask"],
            }
            window = self.divergence(
                left["input_ids"], right["input_ids"], num_padding_at_beginning, MAX_LENGTH, PAD
            )
            user = f"u{first_user + index}"
            read = (user, padded_row(prompt), tokens) if self.with_prompt else (user, tokens)
            made.append(({"input": read, "inds": list(window)}, int(pairs.labels[index])))
        return made


class Options(dict):
    """Keys as attributes too, as the reference's configuration has them."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def optimizer_options() -> dict[str, Any]:
    """Arguments of the reference's `init_optim`.

    The shipped file names `projector`, which PAL-B does not have: its projectors would stay as they start, so both
    of its own names are given here, for the same work on both sides.
    """
    trained = ("llm", "projector", "projector_f", "projectors_gk", "P", "W", "logit_scale")
    return {
        "optimizer_hyperparams": dict.fromkeys(trained, RATES),
        "epochs_new_pair": 1,
        "epochs_new_user": 1,
        "warmup_ratio": 0.0,
    }


def learner_options(case: Case, with_prompt: bool) -> dict[str, Any]:
    """Arguments of the reference's learner, as in its configurations for opt-350m but for sizes."""
    own: dict[str, Any] = {"user_learner_type": "f(Pw)", "pref_learner_type": "dist"}
    arch = "mlp2-relu-dropout0-residual"
    if with_prompt:
        own, arch = {"pref_learner_type": "angle"}, "mlp2-gelu-dropout0"
    return {
        "d_hid": case.hidden_size,
        "d_pref": case.hidden_size,
        "k": 2,
        "llm_name": str(case.backbone),
        "proj_arch": arch,
        "initializer_type": "gaussian",
        "is_expectation_norm_init": False,
        "sfx_type": "softmax",
        "sfx_temperature": 1.0,
        "is_temperature_learnable": False,
        "is_gumbel_hard": None,
        "seed": 42,
        **own,
    }


def load_reference(checkout: Path, letter: str) -> tuple[Any, Callable[..., tuple[int, int]]]:
    """(lightning module of PAL-A or PAL-B, the function that finds a pair's window)."""
    if not (checkout / "src" / f"pal_rm_{letter}").is_dir():
        raise Unavailable(f"{checkout} holds no src/pal_rm_{letter}")
    if "lightning" not in sys.modules and importlib.util.find_spec("lightning") is None:
        stub: Any = types.ModuleType("lightning")
        stub.LightningModule = _Module
        sys.modules["lightning"] = stub
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module(f"src.pal_rm_{letter}.lightningmodule")
        window = importlib.import_module("src.rm_dataset_utils").get_divergence
    except ImportError as error:
        raise Unavailable(f"the reference cannot be imported: {error}") from None
    finally:
        sys.path.remove(str(checkout))
    return module, window


class _Module(nn.Module):
    """The part of lightning that the reference uses: manual optimisation, and logging that does nothing."""

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def log(self, *_: Any, **__: Any) -> None:
        pass


def padded_row(ids: np.ndarray) -> dict[str, Tensor]:
    """Ids and mask of one text, right-padded to 512."""
    row, mask = torch.full((MAX_LENGTH,), PAD), torch.zeros(MAX_LENGTH, dtype=torch.int64)
    row[: len(ids)], mask[: len(ids)] = torch.from_numpy(ids), 1
    return {"input_ids": row, "attention_mask": mask}


def names_of(learner: Any, users: list[str]) -> dict[str, list[nn.Parameter]]:
    """pal_ds's name of each weight -> the reference's parameters that make it up (K projectors, one row per user)."""
    names = {f"backbone.model.{name}": [p] for name, p in learner.llm.named_parameters()}
    names["users"] = [learner.user_learner.W[user] for user in users]
    if hasattr(learner, "projector"):
        names["head.prototypes"] = [learner.user_learner.P]
        names |= _layers("head.projector", [learner.projector])
        return names
    names["head.log_scale"] = [learner.logit_scale]
    names |= _layers("head.response_projector", [learner.projector_f])
    return names | _layers("head.prompt_projectors", list(learner.projectors_gk))


def _layers(prefix: str, connectors: list[Any]) -> dict[str, list[nn.Parameter]]:
    linears = [[m for m in c.mlp.layers if isinstance(m, nn.Linear)] for c in connectors]
    return {
        f"{prefix}.layers.{index}.{kind}": [getattr(layer, kind) for layer in layers]
        for index, layers in enumerate(zip(*linears, strict=True))
        for kind in ("weight", "bias")
    }


def split_weight(name: str, value: Tensor, num_parts: int) -> list[Tensor]:
    """A weight of pal_ds as the reference's parts."""
    stacked = name == "users" or name.startswith("head.prompt_projectors")
    return list(value) if stacked else [value] * num_parts


def joined_weight(name: str, parts: list[Tensor]) -> Tensor:
    """The inverse of `split_weight`."""
    stacked = name == "users" or name.startswith("head.prompt_projectors")
    return torch.stack(parts) if stacked else parts[0]
