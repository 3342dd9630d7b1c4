"""What every registered head promises, and what ZeRO-3 and an export ask of it."""

import ast
import importlib
import inspect
import shutil
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import pal_ds.heads
from pal_ds.heads import HEADS, Features, Head, UserState
from pal_ds.heads.base import Placement
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PairFacts

H, T, NUM_PAIRS = 8, 3, 3
FOLDER = Path(pal_ds.heads.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


@pytest.fixture(params=HEADS)
def head(request) -> Head:
    torch.manual_seed(0)
    return HEADS[request.param](H)


def _features(response: torch.Tensor | None = None) -> Features:
    draw = torch.Generator().manual_seed(1)
    return Features(
        torch.randn(4, T, H, generator=draw) if response is None else response,
        torch.tensor([[0, 1], [2, 3], [1, 3]]),
        torch.randn(2, 1, H, generator=draw),
        torch.tensor([[0, 0], [1, 1], [0, 1]]),
        torch.tensor([1, 1]),
    )


def _user(head: Head) -> UserState:
    """Only what the head says it needs."""
    draw = torch.Generator().manual_seed(2)
    needed = {}
    if "logits" in head.needs:
        logits = torch.randn(NUM_PAIRS, head.num_prototypes, generator=draw)
        needed["logits"] = logits.requires_grad_()
    if "context" in head.needs:
        needed["context"] = torch.tensor([[[0, 2], [1, 3]], [[3, 0], [2, 1]], [[1, 0], [0, 0]]])
        needed["context_length"] = torch.tensor([2, 2, 1])
    if "normal" in head.needs:
        needed["normal"] = torch.randn(NUM_PAIRS, head.num_prototypes, generator=draw)
    if "group" in head.needs:
        needed["group"] = torch.tensor([0, 2, -1])
    return UserState(**needed)


def _points(head: Head, features: Features, user: UserState) -> torch.Tensor:
    """Where the head sees each user."""
    reads_context = "context" in head.needs
    return head.encode(features, user) if reads_context else head.mixture_weights(user)


def test_it_is_listed_under_its_name_and_built_from_a_hidden_size() -> None:
    for name, head_class in HEADS.items():
        assert head_class.__name__ == name
        parameters = list(inspect.signature(head_class).parameters.values())
        assert parameters[0].name == "hidden_size"
        assert all(p.default is not p.empty for p in parameters[1:])
        assert head_class.needs <= {"prompt", "logits", "context", "normal", "group"}


def test_shapes_and_dtypes(head: Head) -> None:
    output = head(_features(), _user(head))
    assert output.reward.shape == (NUM_PAIRS, 2, T)
    assert output.margin.shape == (NUM_PAIRS, T)
    assert output.penalty.shape == (NUM_PAIRS,)
    assert all(tensor.dtype == torch.float32 for tensor in output[:3]) and output.total is None
    if type(head).compare is Head.compare:
        assert torch.equal(output.margin, output.reward[:, 1] - output.reward[:, 0])
    weights = _points(head, _features(), _user(head))
    assert weights.shape[1] == head.num_prototypes
    if head.on_simplex:
        assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))


def test_features_of_any_dtype_are_read(head: Head) -> None:
    """Vectors are fp32 in a bf16 run."""
    output = head.bfloat16()(_features(), _user(head))
    assert output.reward.dtype == torch.float32 and output.reward.isfinite().all()


def test_a_judge_of_the_placement_finds_the_same_rewards(head: Head) -> None:
    """What `place` says is all that the rewards depend on, so that a fused loss may replace them."""
    zeros = torch.zeros(NUM_PAIRS, dtype=torch.int64)
    facts = PairFacts(zeros + 1, zeros, zeros + T, torch.zeros(NUM_PAIRS), torch.ones(NUM_PAIRS))

    def placed_loss(placement: Placement) -> tuple[torch.Tensor, ...]:
        return pair_loss(
            placement.response,
            placement.response_index,
            placement.point,
            facts,
            placement.scale,
            "logistic",
            "mean",
            "torch",
        )

    plain, output = head(_features(), _user(head)), head(_features(), _user(head), placed_loss)
    torch.testing.assert_close(output.margin, plain.margin)
    torch.testing.assert_close(output.reward, plain.reward)
    if output.total is not None:
        loss = -torch.nn.functional.logsigmoid(plain.margin).mean(1).sum()
        torch.testing.assert_close(output.total, loss)


def test_what_a_head_offers_to_fit_users_by_agrees_with_its_rewards(head: Head) -> None:
    """Statistics make its rewards; a user's own point is where `place` puts the user."""
    features, user = _features(), _user(head)
    statistics = head.eval().statistics(features)
    assert head.has_statistics == (statistics is not None)
    if statistics is not None:
        mixture = head.mixture_weights(user)
        reward = head.reward(features, user)
        torch.testing.assert_close(statistics.reward(mixture), reward, rtol=1e-4, atol=1e-5)
    point, placement = head.locate(user), head.place(features, user)
    if point is not None:
        assert placement is not None
        torch.testing.assert_close(placement.point, point.unsqueeze(1))


def test_swapping_the_responses_turns_the_margin(head: Head) -> None:
    features, user = _features(), _user(head)
    swapped = features._replace(
        response_index=features.response_index.flip(1), prompt_index=features.prompt_index.flip(1)
    )
    margin = head(features, user).margin
    # To rounding: a matmul may sum rows that lie elsewhere in another order.
    torch.testing.assert_close(margin, -head(swapped, user).margin, rtol=1e-6, atol=1e-6)
    assert margin.abs().min() > 0


def test_more_than_two_responses_have_rewards(head: Head) -> None:
    features, user = _features(), _user(head)
    index = torch.tensor([[0, 1, 2, 3]] * NUM_PAIRS)
    lists = features._replace(response_index=index, prompt_index=torch.zeros_like(index))
    assert head.reward(lists, user).shape == (NUM_PAIRS, 4, T)


def test_gradients_reach_users_only_where_tastes_can_differ(head: Head) -> None:
    user = _user(head)
    head(_features(), user).margin.square().sum().backward()
    if "logits" in head.needs and head.num_prototypes > 1:
        assert (user.logits.grad.abs().sum(-1) > 0).all()
    else:
        assert user.logits is None or not user.logits.grad.any()


def test_every_parameter_learns(head: Head) -> None:
    output = head(_features(), _user(head))
    (output.reward.square().sum() + output.margin.square().sum() + output.penalty.sum()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_comparison_does_not_depend_on_its_neighbours(head: Head) -> None:
    features, user = _features(), _user(head.eval())
    whole = head(features, user).reward
    for b in range(NUM_PAIRS):
        alone = features._replace(
            response_index=features.response_index[b : b + 1],
            prompt_index=features.prompt_index[b : b + 1],
        )
        own = UserState(*(None if part is None else part[b : b + 1] for part in user))
        assert torch.allclose(head.reward(alone, own)[0], whole[b], atol=1e-5)


def test_storing_a_response_twice_changes_nothing(head: Head) -> None:
    features, user = _features(), _user(head)
    index = features.response_index
    # Behind those that were there: contexts point at them.
    spread = features._replace(
        response=torch.cat([features.response, features.response[index.flatten()]]),
        response_index=len(features.response) + torch.arange(index.numel()).view_as(index),
    )
    assert torch.allclose(head(features, user).reward, head(spread, user).reward, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", HEADS)
def test_the_temperature_is_that_of_the_mixture(name: str, temperature: float) -> None:
    """Whoever fits users goes from mixtures back to logits by it."""
    takes_it = "temperature" in inspect.signature(HEADS[name]).parameters
    head = HEADS[name](H, **({"temperature": temperature} if takes_it else {})).eval()
    if not (head.on_simplex and "logits" in head.needs):
        assert head.temperature == 1.0
        return
    assert head.temperature == (temperature if takes_it else 1.0)
    logits = torch.randn(5, head.num_prototypes)
    expected = torch.softmax(logits / head.temperature, 1)
    torch.testing.assert_close(head.mixture_weights(UserState(logits)), expected)


def test_an_explicit_mixture_stands_in_for_the_logits(head: Head) -> None:
    head.eval()
    user, features = _user(head), _features()
    mixed = UserState(mixture=_points(head, features, user).expand(NUM_PAIRS, -1))
    assert torch.allclose(head.reward(features, user), head.reward(features, mixed), atol=1e-6)


@pytest.mark.parametrize("zero_parameters", [False, True])
def test_zero_vectors_are_finite(head: Head, zero_parameters: bool) -> None:
    if zero_parameters:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
    response = torch.zeros(4, T, H, requires_grad=True)
    features = _features(response)
    features = features._replace(prompt=torch.zeros_like(features.prompt).requires_grad_())
    user = _user(head)
    output = head(features, user)
    (output.reward.sum() + output.margin.square().sum()).backward()
    assert torch.isfinite(output.reward).all()
    leaves = [response, features.prompt, user.logits, *head.parameters()]
    assert all(torch.isfinite(x.grad).all() for x in leaves if x is not None and x.grad is not None)


def test_parameters_are_used_in_the_forward_of_their_owner(head: Head) -> None:
    """ZeRO-3 gathers a parameter around the forward of the module that holds it, and nowhere
    else."""
    ran = set()
    owners = [m for m in head.modules() if next(m.parameters(recurse=False), None) is not None]
    for module in owners:
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
    head(_features(), _user(head))
    assert ran == set(owners)


def test_prototypes_add_width_and_not_parameters() -> None:
    for head_class in HEADS.values():
        if "num_prototypes" in inspect.signature(head_class).parameters:
            few, many = (list(head_class(H, num_prototypes=k).parameters()) for k in (2, 16))
            assert len(few) == len(many)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_import_torch_and_siblings_only(path: Path) -> None:
    allowed = (
        set(sys.stdlib_module_names)
        | {"torch"}
        | ({"jaxtyping"} if path.name == "jaxtyping_fallback.py" else set())
    )
    siblings = {file.stem for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_the_files_work_copied_flat_without_jaxtyping(tmp_path, monkeypatch) -> None:
    flat = tmp_path / "flat_export"
    flat.mkdir()
    for path in FILES:
        shutil.copy(path, flat)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    for name, head_class in HEADS.items():
        file = Path(inspect.getfile(head_class)).stem
        module = importlib.import_module(f"flat_export.{file}")
        base = importlib.import_module("flat_export.base")
        copy, original = getattr(module, name)(H).eval(), head_class(H).eval()
        copy.load_state_dict(original.state_dict())
        user = _user(original)
        reward = copy.reward(base.Features(*_features()), base.UserState(*user))
        assert torch.equal(reward, original.reward(_features(), user))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("PalA", {"num_prototypes": 0}, "num_prototypes"),
        ("PalA", {"dim": 4, "residual": True}, "residual"),
        ("PalA", {"user_point": "P"}, "user_point"),
        ("PalA", {"similarity": "angle"}, "similarity"),
        ("PalA", {"temperature": 0}, "temperature"),
        ("PalA", {"bound": -1}, "bound"),
        ("PalA", {"activation": "tanh"}, "activation"),
        ("PalA", {"dropout": 1.0}, "dropout"),
        ("PalB", {"prompt_position": "first"}, "prompt_position"),
        ("PalB", {"mixture": "none"}, "mixture"),
        ("PalB", {"evaluation": "best"}, "evaluation"),
        ("PalB", {"num_layers": 0}, "num_layers"),
        ("BradleyTerry", {"hidden_size": 0}, "hidden_size"),
    ],
)
def test_bad_arguments_are_named(name: str, arguments: dict, message: str) -> None:
    # Where the suite runs with type checks, an unknown choice already stops at the signature.
    with pytest.raises((ValueError, TypeCheckError), match=message):
        HEADS[name](**{"hidden_size": H} | arguments)


def test_a_missing_prompt_is_named() -> None:
    head = HEADS["PalB"](H)
    user = _user(head)
    with pytest.raises(ValueError, match="must carry prompt"):
        head(_features()._replace(prompt=None, prompt_index=None), user)
    with pytest.raises(ValueError, match="aligned"):
        head(_features()._replace(prompt=torch.zeros(2, 5, H)), user)
    with pytest.raises(ValueError, match="prompt_length"):
        HEADS["PalB"](H, prompt_position="aligned")(_features()._replace(prompt_length=None), user)
