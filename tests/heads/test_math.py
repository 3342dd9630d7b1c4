"""What the golden file lacks, against fp64 autograd through loops written straight from the
formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pal_ds.heads import BradleyTerry, Features, Head, PalA, PalB, UserState
from pal_ds.heads.mixture import Mixture
from pal_ds.heads.projector import Projector, StackedProjector
from pal_ds.losses import PreferenceLoss
from pal_ds.users import UsersConfig, UserTable

H, T, C = 6, 4, 5
NUM_PAIRS = 4
TOLERANCE = 1e-5
USER_POINTS = ["f(Pw)", "f(P)w", "Pw"]
ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}
Parameters = dict[str, Tensor]


def _features(num_prompt_positions: int = C) -> Features:
    """Five distinct responses over four comparisons, one seen three times; two prompts, one shorter
    than T."""
    draw = torch.Generator().manual_seed(1)
    return Features(
        torch.randn(5, T, H, generator=draw),
        torch.tensor([[0, 1], [2, 0], [3, 4], [0, 3]]),
        torch.randn(2, num_prompt_positions, H, generator=draw),
        torch.tensor([[0, 0], [0, 0], [1, 1], [0, 1]]),
        torch.tensor([2, 5]) if num_prompt_positions > 1 else torch.tensor([1, 1]),
    )


def _logits(num_prototypes: int) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(NUM_PAIRS, num_prototypes, generator=draw)


def _project(x: Tensor, p: Parameters, name: str, head: Head, stack: int | None = None) -> Tensor:
    settings = getattr(head, name)
    y = x
    for i in range(len(settings.layers)):
        weight, bias = p[f"{name}.layers.{i}.weight"], p[f"{name}.layers.{i}.bias"]
        if stack is not None:
            weight, bias = weight[stack], bias[stack]
        y = weight @ (ACTIVATIONS[settings.activation](y) if i else y) + bias
    return x + y if settings.residual else y


def _softmax(w: Tensor) -> Tensor:
    return w.exp() / w.exp().sum()


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / ((x @ x).sqrt() * (y @ y).sqrt())


def _pal_a(head: PalA, p: Parameters, features: Features, logits: Tensor) -> Tensor:
    rewards = []
    for b in range(NUM_PAIRS):
        s, prototypes = _softmax(logits[b] / head.mixture.temperature), p["prototypes"]
        num = len(prototypes)
        if head.user_point == "f(P)w":
            a = sum(s[k] * _project(prototypes[k], p, "projector", head) for k in range(num))
        else:
            a = sum(s[k] * prototypes[k] for k in range(num))
            a = _project(a, p, "projector", head) if head.user_point == "f(Pw)" else a
        for index in features.response_index[b]:
            for t in range(T):
                z = _project(features.response[index, t].double(), p, "projector", head)
                if head.similarity == "distance":
                    rewards.append(-((z - a) @ (z - a)).sqrt())
                else:
                    rewards.append(p["log_scale"][0].exp().clamp(max=100) * _cosine(z, a))
    return torch.stack(rewards).view(NUM_PAIRS, 2, T)


def _pal_b(head: PalB, p: Parameters, features: Features, logits: Tensor) -> Tensor:
    rewards = []
    for b in range(NUM_PAIRS):
        s = _softmax(logits[b] / head.mixture.temperature)
        for side in range(2):
            prompt = features.prompt_index[b, side]
            for t in range(T):
                last = int(features.prompt_length[prompt]) - 1
                at = min(t, last) if head.prompt_position == "aligned" else last
                h = features.prompt[prompt, at].double()
                maps = [_project(h, p, "prompt_projectors", head, k) for k in range(len(s))]
                z = sum(s[k] * maps[k] for k in range(len(s)))
                h = features.response[features.response_index[b, side], t].double()
                y = _project(h, p, "response_projector", head)
                rewards.append(p["log_scale"][0].exp().clamp(max=100) * _cosine(y, z))
    return torch.stack(rewards).view(NUM_PAIRS, 2, T)


def _bradley_terry(head: BradleyTerry, p: Parameters, features: Features, _: Tensor) -> Tensor:
    return features.response.double()[features.response_index] @ p["direction"]


REFERENCES = {PalA: _pal_a, PalB: _pal_b, BradleyTerry: _bradley_terry}


def _close(ours: Tensor, reference: Tensor, what: str) -> None:
    assert ours.shape == reference.shape
    error = (ours.double() - reference).abs().max() / reference.abs().max()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def _doubles(head: Head) -> Parameters:
    return {k: v.detach().double().requires_grad_() for k, v in head.named_parameters()}


def _close_gradients(head: Head, doubles: Parameters) -> None:
    largest = max(float(p.grad.abs().max()) for p in doubles.values())
    for key, parameter in head.named_parameters():
        expected = doubles[key].grad
        # f's last bias moves response and user point alike, so a distance has no gradient for it:
        # fp64 shows 1e-16.
        if expected.abs().max() < 1e-12 * largest:
            assert parameter.grad.abs().max() <= TOLERANCE * largest, key
        else:
            _close(parameter.grad, expected, key)


def _check(head: Head, features: Features) -> None:
    """Rewards and every gradient of a random combination of them."""
    logits = _logits(head.num_prototypes).requires_grad_()
    doubles, logits64 = _doubles(head), logits.detach().double().requires_grad_()
    reward = head(features, UserState(logits)).reward
    reference = REFERENCES[type(head)](head, doubles, features, logits64)
    _close(reward, reference, "reward")
    weight = torch.randn(reward.shape, generator=torch.Generator().manual_seed(3))
    (reward * weight).sum().backward()
    (reference * weight).sum().backward()
    _close_gradients(head, doubles)
    if "logits" in head.needs:
        _close(logits.grad, logits64.grad, "logits")


@pytest.mark.parametrize("user_point", USER_POINTS)
@pytest.mark.parametrize("similarity", ["distance", "cosine"])
def test_pal_a(user_point: str, similarity: str) -> None:
    torch.manual_seed(0)
    shape = {"num_prototypes": 3, "dim": 5, "num_layers": 2, "activation": "gelu"}
    _check(
        PalA(H, **shape, user_point=user_point, similarity=similarity, temperature=0.7), _features()
    )


STATISTICS = [
    *(
        lambda p=p, s=s: PalA(H, 3, 5, 2, "gelu", user_point=p, similarity=s, temperature=0.7)
        for p in ("f(P)w", "Pw")
        for s in ("distance", "cosine")
    ),
    lambda: PalA(H, 3, 5, 1, user_point="f(Pw)", temperature=0.7),
    lambda: PalB(H, 3, dim=5, num_layers=2, temperature=0.7, prompt_dropout=0.0),
    lambda: PalB(H, 1, dim=5, prompt_dropout=0.0),
]


@pytest.mark.parametrize("make", STATISTICS)
def test_statistics_say_all_that_a_reward_says_of_a_mixture(make: Callable[[], Head]) -> None:
    torch.manual_seed(0)
    head, features = make(), _features(1)
    logits = _logits(head.num_prototypes)
    statistics = head.statistics(features)
    assert statistics is not None and statistics.linear.shape[1:] == (T, head.num_prototypes)
    found = statistics.reward(torch.softmax(logits / statistics.temperature, 1))
    _close(found, REFERENCES[type(head)](head, _doubles(head), features, logits.double()), "reward")


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_statistics_of_a_space_far_from_its_origin(offset: float) -> None:
    """Without a centre, squares of the offset would cancel."""
    torch.manual_seed(0)
    head = PalA(H, 3, 5, 1, user_point="Pw")
    with torch.no_grad():
        head.projector.layers[0].bias += offset
        head.prototypes += offset
    found = head.statistics(_features(1)).reward(torch.softmax(_logits(3), 1))
    reference = _pal_a(head, _doubles(head), _features(1), _logits(3).double())
    assert (found - reference).abs().max() <= 2e-4


def test_a_user_who_sits_on_a_response_has_finite_statistics() -> None:
    head = PalA(H, 3, 5, 1, user_point="Pw")
    features = _features(1)
    with torch.no_grad():
        head.prototypes[1] = head.projector(features.response[0, 0])
    mixture = torch.eye(3)[[1] * NUM_PAIRS]
    reward = head.statistics(features).reward(mixture)
    assert reward.isfinite().all() and -1e-2 < reward[0, 0, 0] <= 0


def test_heads_without_statistics() -> None:
    without = [PalA(H, 3, num_layers=2), PalB(H, 3, prompt_position="aligned"), BradleyTerry(H)]
    for head in without:
        assert head.statistics(_features()) is None and not head.has_statistics


def test_pal_a_is_residual_by_default_where_the_widths_allow_it() -> None:
    assert PalA(H).projector.residual
    assert not PalA(H, dim=5).projector.residual
    assert not PalA(H, residual=False).projector.residual


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_pal_b_aligned_with_prompts_shorter_than_responses(num_layers: int, residual: bool) -> None:
    torch.manual_seed(0)
    shape = {"num_prototypes": 3, "num_layers": num_layers, "residual": residual}
    _check(
        PalB(H, **shape, prompt_position="aligned", temperature=1.5, prompt_dropout=0.0),
        _features(),
    )


def test_pal_b_last() -> None:
    torch.manual_seed(0)
    _check(
        PalB(H, 3, dim=4, activation="relu", prompt_dropout=0.0), _features(num_prompt_positions=1)
    )


@pytest.mark.parametrize("head_class", [PalA, PalB])
def test_sixty_four_prototypes(head_class: type[Head]) -> None:
    torch.manual_seed(0)
    # In training PalB would not see some of the prompts.
    head = head_class(H, num_prototypes=64, num_layers=2).eval()
    _check(head, _features(num_prompt_positions=1))


def test_bradley_terry() -> None:
    torch.manual_seed(0)
    _check(BradleyTerry(H), _features())


def test_a_stack_of_projectors_is_its_projectors() -> None:
    torch.manual_seed(0)
    stack = StackedProjector(3, H, 5, num_layers=3)
    x = torch.randn(2, 4, H)
    for k in range(3):
        one = Projector(H, 5, num_layers=3)
        one.load_state_dict({key: value[k] for key, value in stack.state_dict().items()})
        assert torch.allclose(stack(x)[..., k, :], one(x), atol=1e-6)
    for layer in StackedProjector(50, 64, 32, num_layers=2).layers:
        bound = 1 / math.sqrt(layer.weight.shape[-1])
        for tensor in (layer.weight, layer.bias):
            assert tensor.abs().max() <= bound
            assert float(tensor.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "smooth_hinge"])
def test_a_repeated_user_gets_the_sum_through_the_table(kind: str) -> None:
    """Head, loss, leaf and table against one fp64 graph in which the user is a single shared
    vector."""
    torch.manual_seed(0)
    head, features = PalA(H, 3, num_layers=2), _features()
    table = UserTable(3, ["a", "b"], UsersConfig(init_std=1.0))
    rows = table.rows(["b", "a", "b", "b"])
    label, required = torch.tensor([1, -1, -1, 1]), torch.tensor([0.0, 0.3, 0.0, 1.0])
    start, end = torch.tensor([0, 1, 0, 2]), torch.tensor([4, 3, 1, 4])

    doubles, users = _doubles(head), table.logits.double().requires_grad_()
    reward = _pal_a(head, doubles, features, users[rows])
    shapes = {
        "logistic": lambda m: -torch.log(torch.sigmoid(m)),
        "hinge": lambda m: (1 - m).clamp(min=0),
        "smooth_hinge": lambda m: 0.5 - m if m <= 0 else (1 - m).clamp(min=0) ** 2 / 2,
    }
    total = 0.0
    for b in range(NUM_PAIRS):
        n = int(end[b] - start[b])
        for step in range(n):
            margin = reward[b, 1, start[b] + step] - reward[b, 0, start[b] + step]
            m = label[b] * margin - required[b].double()
            total = total + shapes[kind](m) * (step + 1) / (n * (n + 1) / 2)
    total.backward()

    leaf = table.leaf(rows)
    margin = head(features, UserState(leaf)).margin
    loss = PreferenceLoss(kind, "cumulative")(margin, label, start, end, required).sum()
    loss.backward()
    _close(loss, total, "loss")
    _close_gradients(head, doubles)
    table.apply(rows, leaf.grad, torch.tensor([3, 1, 0, 2]), 0.05)
    _close(table.exp_avg * 10, users.grad, "summed user gradients")


def test_mixtures() -> None:
    w, g = _logits(5), torch.rand(NUM_PAIRS, 5)
    state = UserState(w, gumbel=g)
    soft = torch.stack([_softmax(row / 0.5) for row in w.double()]).float()
    noisy = torch.stack([_softmax(row / 0.5) for row in (w + g).double()]).float()
    hard = torch.zeros_like(w)
    for b in range(NUM_PAIRS):
        hard[b, max(range(5), key=lambda k, b=b: float(w[b, k]))] = 1
    for kind, evaluation, training, expected in [
        ("softmax", "soft", True, soft),
        ("softmax", "hard", True, soft),
        ("softmax", "hard", False, hard),
        ("gumbel", "soft", True, noisy),
        ("gumbel", "soft", False, soft),
        ("gumbel", "hard", True, noisy),
        ("gumbel", "hard", False, hard),
    ]:
        mixture = Mixture(0.5, kind, evaluation).train(training)
        assert torch.allclose(mixture(state), expected, atol=1e-6), (kind, evaluation, training)
        assert torch.equal(mixture(UserState(w, g, mixture=noisy)), noisy)
    assert torch.allclose(Mixture(0.5, "gumbel").train()(UserState(w)), soft, atol=1e-6)
    with pytest.raises(ValueError, match="neither logits nor a mixture"):
        Mixture()(UserState())
