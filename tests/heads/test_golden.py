"""Every number of the PAL reference, through the shipped heads and losses: outputs, loss and all
gradients.

The file in tests/golden was produced by the reference's own code (RamyaLab/pluralistic-alignment,
commit fcfc03c0, fp32 on CPU) on random hidden states; its metadata lists the cases.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pal_ds.heads import Features, Head, PalA, PalB, UserState
from pal_ds.losses import PreferenceLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "pal_reference.safetensors"
TOLERANCE = 1e-5

with safe_open(str(GOLDEN), "pt") as _file:
    _META = json.loads(_file.metadata()["meta"])
    _TENSORS = {key: _file.get_tensor(key) for key in _file.keys()}  # noqa: SIM118
CASES = {case["name"]: case for case in _META["cases"]}
USERS = [f"u{i}" for i in range(5)]
WEIGHTING = {"mean": "mean", "cumulative": "cumulative", "only_last": "last"}


def _group(case: str, group: str) -> dict[str, Tensor]:
    prefix = f"{case}.{group}."
    return {k.removeprefix(prefix): t for k, t in _TENSORS.items() if k.startswith(prefix)}


def _canonical(reference: dict[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Reference parameters (or gradients) under the head's names; users are not parameters of a
    head."""
    named: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for key, tensor in sorted(reference.items()):
        layer = re.search(r"layers\.(\d+)\.(weight|bias)$", key)
        # The reference counts activation and dropout as layers: 0, 3, 6 are its linear maps.
        place = f"layers.{int(layer[1]) // 3}.{layer[2]}" if layer else ""
        if key.startswith("user_learner.projectors."):
            stacks.setdefault(f"prompt_projectors.{place}", []).append(tensor)
        elif key.startswith("projector_f."):
            named[f"response_projector.{place}"] = tensor
        elif key.startswith("projector."):
            named[f"projector.{place}"] = tensor
        elif key == "user_learner.P":
            named["prototypes"] = tensor
        elif key == "logit_scale" and isinstance(head, PalB):
            named["log_scale"] = tensor.reshape(1)
        else:
            assert key == "logit_scale" or key.startswith("user_learner.W."), key
    return named | {name: torch.stack(parts) for name, parts in stacks.items()}


def _head(case: dict) -> Head:
    layers = {"num_layers": 3, "activation": case["name"].split(".")[-2]}
    if case["model"] == "pal_b":
        layers["residual"] = "residual" in case["projector"]
        head = PalB(
            _META["h"],
            _META["K"],
            _META["d"],
            prompt_position="aligned",
            prompt_dropout=0.0,
            **layers,
        )
    else:
        assert case["projector"].endswith("residual")
        point = case["user_point"]
        head = PalA(_META["h"], _META["K"], _META["d"], residual=True, user_point=point, **layers)
    head.load_state_dict(_canonical(_group(case["name"], "param"), head))
    return head


def _features() -> Features:
    left, right, prompt = (_TENSORS[f"hidden.{name}"] for name in ("left", "right", "prompt"))
    num_pairs, num_positions = left.shape[:2]
    pair = torch.arange(num_pairs)
    return Features(
        torch.cat([left, right]),
        torch.stack([pair, pair + num_pairs], dim=1),
        prompt,
        torch.stack([pair, pair], dim=1),
        torch.full((num_pairs,), num_positions),
    )


def _close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).abs().max() / reference.abs().max()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str) -> None:
    case = CASES[name]
    head = _head(case)
    parameters = _group(name, "param")
    table = torch.stack([parameters[f"user_learner.W.{u}"] for u in USERS]).requires_grad_()
    output = head(_features(), UserState(table[_TENSORS["user_row"]]))
    # PAL-A's reference prints the margin, PAL-B's the two rewards, whose cross-entropy is logistic
    # in the margin.
    if case["model"] == "pal_a":
        _close(output.margin, _TENSORS[f"{name}.output"], "margin")
    else:
        _close(output.reward.transpose(1, 2), _TENSORS[f"{name}.output"], "reward")

    kind = {"hinge": "hinge"}.get(case["loss"], "logistic")
    weigh = PreferenceLoss(kind, WEIGHTING[case["weighting"]])
    window = (_TENSORS["window.start"], _TENSORS["window.end"])
    loss = (weigh(output.margin, _TENSORS["label"], *window) + output.penalty).mean()
    _close(loss, _TENSORS[f"{name}.loss"].squeeze(), "loss")

    loss.backward()
    gradients = _group(name, "grad")
    expected = _canonical(gradients, head)
    assert set(expected) == {key for key, _ in head.named_parameters()}
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None
        if key == "projector.layers.2.bias" and case["user_point"] != "Pw":
            # f's last bias moves response and user point alike: its exact gradient is 0, and what
            # either program
            # prints is rounding. So both must vanish beside the gradient of the same layer's
            # weight.
            size = expected["projector.layers.2.weight"].abs().max()
            assert max(parameter.grad.abs().max(), expected[key].abs().max()) <= TOLERANCE * size
            continue
        _close(parameter.grad, expected[key], key)
    for row, user in enumerate(USERS):
        key = f"user_learner.W.{user}"
        if key in gradients:
            _close(table.grad[row], gradients[key], key)
        else:
            assert row not in _TENSORS["user_row"]
            assert (table.grad[row] == 0).all()


def test_every_kind_of_case_is_present() -> None:
    assert {case["model"] for case in CASES.values()} == {"pal_a", "pal_b"}
    assert {case["weighting"] for case in CASES.values()} == set(WEIGHTING)
    points = {case["user_point"] for case in CASES.values() if case["model"] == "pal_a"}
    assert points == {"f(Pw)", "f(P)w", "Pw"}
