"""A trial of somebody's own head or loss, before weights are read: what breaks their contract is told in words."""

import copy
import inspect
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pal_ds.errors import UserError, mendable
from pal_ds.heads.base import Features, Head, HeadOutput, UserState
from pal_ds.losses import MarginLoss

logger = logging.getLogger(__name__)

NEEDS = ("prompt", "prompt_tokens", "logits", "gumbel", "context", "group", "normal")
"""What a head may ask for."""
_NUM_PAIRS, _NUM_CONTEXT = 3, 2
_RESPONSES, _PROMPTS = [[0, 1], [2, 3], [1, 3]], [[0, 0], [1, 1], [0, 1]]
_TOLERANCE = 1e-3
_FAR = 1e6
"""A margin that no sound training comes to."""
_PACKAGE = Path(__file__).parents[1]


def is_own(value: object) -> bool:
    """Return True for an object of a class that pal_ds does not ship."""
    return type(value).__module__.partition(".")[0] != "pal_ds"


@contextmanager
def naming_place(what: str, cls: type | None) -> Iterator[None]:
    """Raise UserError for what somebody's own code raises in the block, with the place in the file of `cls`.

    `sys.exit()` in such code is told as well: it would end the program without a word. Where no class is known, what
    pal_ds raises itself goes on as it is.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if mendable(error) is not None:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        if cls is None and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            raise
        own = None if cls is None else inspect.getsourcefile(cls)
        place = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        raise UserError(
            f"{what} raised {type(error).__name__} ({error}) at {place.filename}:{place.lineno}. Mend it."
        ) from error


def try_head(head: Head, hidden_size: int, num_positions: int) -> None:
    """Score three drawn comparisons by a copy of an own head, as training and evaluation do; others are left alone.

    `num_positions` is T, the scored positions of a response. The head, and torch's generator, stay as they are.

    Raises:
        UserError: the head raises something, or breaks the contract of `Head`.
    """
    if not is_own(head):
        return
    cls, name = type(head), f"head: {type(head).__module__}.{type(head).__qualname__}"
    if "_parameters" not in vars(head):
        raise UserError(f"{name}.__init__() does not call super().__init__() first. Mend it.")
    _check_attributes(head, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = _features(head, hidden_size, num_positions)
        user, trial = _user(head), copy.deepcopy(head)
        with naming_place(f"{name}, on drawn states in training,", cls), torch.enable_grad():
            reward = trial.train().reward(features, user)
            _check_reward(reward, name, num_positions)
            output = trial(features, user)
        _check_output(output, user, name, num_positions)
        with naming_place(f"{name}, on drawn states in evaluation,", cls), torch.no_grad():
            _check_mixture(trial.eval(), features, user, name)


def try_loss(loss: MarginLoss | None) -> None:
    """Call an own loss on drawn margins. Raises UserError where it raises something or breaks its contract."""
    if loss is None or not is_own(loss):
        return
    cls = type(loss)
    name = f"loss.shape: {cls.__module__}.{cls.__qualname__}"
    margins = torch.linspace(-3, 3, 6)[:, None].requires_grad_()
    with naming_place(f"{name}, on drawn margins,", cls), torch.enable_grad():
        values = loss(margins)
    _check_tensor(values, margins.shape, f"{name} returns", "one loss for each margin")
    if not values.requires_grad:
        raise UserError(f"{name} gives a loss without a gradient in the margins. Mend it.")


def warn_of_no_bound(loss: MarginLoss | None) -> None:
    """Warn of an own loss that goes on falling as margins grow, either way: training follows it without an end."""
    if loss is None or not is_own(loss):
        return
    name = f"loss.shape: {type(loss).__module__}.{type(loss).__qualname__}"
    with naming_place(f"{name}, on large margins,", type(loss)), torch.no_grad():
        near, far = (
            torch.as_tensor(loss(reach * torch.tensor([[-1.0], [1.0]]))).flatten()
            for reach in (_FAR / 1000, _FAR)
        )
    # A factor of a thousand lowers even the negative logarithm by 7. NaN is no fall, -inf is one.
    falls = (far == -torch.inf) | ((far < 0) & (near - far > 1))
    if bool(falls.any()):
        sign = "-" if bool(falls[0]) else ""
        place = int(falls.long().argmax())
        logger.warning(
            "%s has no lower bound that shows: it is %.3g at a margin of %s%g, and %.3g at %s%g. "
            "Training makes such margins grow for ever and ends on a loss that says nothing; give it a bound, as "
            "softplus has",
            name,
            float(near[place]),
            sign,
            _FAR / 1000,
            float(far[place]),
            sign,
            _FAR,
        )


def _check_attributes(head: Head, name: str) -> None:
    needs = getattr(head, "needs", None)
    if not isinstance(needs, set | frozenset) or not needs <= {*NEEDS}:
        raise UserError(
            f"{name}.needs is {needs!r:.100}; it must be a frozenset of what the head reads, of {', '.join(NEEDS)}."
        )
    counts = ["num_prototypes"]
    counts += ["num_context", "num_context_scored"] if "context" in needs else []
    for count in counts:
        value = getattr(head, count, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            said = " (1 for a head without users)" if count == "num_prototypes" else ""
            raise UserError(
                f"{name}.{count} is {value!r:.100}; it must be a number of 1 or more{said}."
            )


def _features(head: Head, hidden_size: int, num_positions: int) -> Features:
    """States as a batch has them, of what the head asks for."""
    responses = torch.randn(4, num_positions, hidden_size).requires_grad_()
    index = torch.tensor(_RESPONSES)
    if "prompt" not in head.needs:
        return Features(responses, index)
    length = torch.tensor([3, 2] if "prompt_tokens" in head.needs else [1, 1])
    prompts = torch.randn(2, int(length.max()), hidden_size)
    return Features(responses, index, prompts, torch.tensor(_PROMPTS), length)


def _user(head: Head) -> UserState:
    """State of users as training gives it, of what the head asks for."""
    shape = _NUM_PAIRS, head.num_prototypes
    drawn = {
        name: torch.randn(shape) for name in ("logits", "gumbel", "normal") if name in head.needs
    }
    if "logits" in drawn:
        drawn["logits"].requires_grad_()
    if "context" in head.needs:
        drawn["context"] = torch.tensor(_RESPONSES)[:, None].expand(-1, head.num_context, -1)
        drawn["context_length"] = torch.tensor([head.num_context, 1, 1])
    if "group" in head.needs:
        drawn["group"] = torch.tensor([0, head.num_prototypes - 1, -1])
    return UserState(**drawn, update=0)


def _check_output(output: object, user: UserState, name: str, num_positions: int) -> None:
    if not isinstance(output, HeadOutput):
        raise UserError(
            f"{name}.compare() returns {_kind(output)}; it must return a HeadOutput, as Head.compare does."
        )
    _check_reward(output.reward, name, num_positions)
    margins = "[B, T], one margin per comparison and scored position"
    _check_tensor(output.margin, (_NUM_PAIRS, num_positions), f"{name} gives as margins", margins)
    _check_tensor(
        output.penalty, (_NUM_PAIRS,), f"{name} gives as penalty", "[B], one per comparison"
    )
    if not output.margin.requires_grad:
        raise UserError(
            f"{name}: its rewards have no gradient (are they detached, or made from no weight?). Mend it."
        )
    if user.logits is not None:
        (gradient,) = torch.autograd.grad(output.margin.sum(), [user.logits], allow_unused=True)
        if gradient is None:
            raise UserError(
                f"{name}.needs has logits, and its rewards do not depend on user.logits. Use them, or take them out."
            )


def _check_reward(reward: object, name: str, num_positions: int) -> None:
    rule = "[B, r, T], one reward per comparison, response and scored position"
    _check_tensor(reward, (_NUM_PAIRS, 2, num_positions), f"{name}.reward() returns", rule)


def _check_mixture(trial: Head, features: Features, user: UserState, name: str) -> None:
    """Raise UserError where rewards by the users' points, as evaluation asks for them, are not those by their state."""
    if not trial.is_personal:
        return
    reads_context = "context" in trial.needs
    method = "encode" if reads_context else "mixture_weights"
    in_evaluation = user._replace(gumbel=None, normal=None, update=None)
    points = getattr(trial, method)(*([features] if reads_context else []), in_evaluation)
    width = _NUM_PAIRS, trial.num_prototypes
    _check_tensor(points, width, f"{name}.{method}() returns", "[B, K], a user's point each")
    rewards = trial.reward(features, UserState(mixture=points))
    again = trial.reward(features, UserState(mixture=points))
    _check_reward(rewards, name, features.response.shape[1])
    if not torch.allclose(rewards, again, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise UserError(
            f"{name}.reward() gives the same texts other rewards each time, in eval mode."
        )
    if reads_context:
        return
    directly = trial.reward(features, in_evaluation)
    if not torch.allclose(rewards, directly, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise UserError(
            f"{name}.reward() gives other rewards where user.mixture, as evaluation and exports have it, takes the "
            "place of the rest. Where it is given, use it as the point that mixture_weights() makes."
        )


def _check_tensor(value: object, shape: tuple[int, ...], whose: str, rule: str) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{whose} {_kind(value)}; it must be {rule}, a tensor.")
    if value.shape != torch.Size(shape):
        raise UserError(
            f"{whose} the shape {list(value.shape)} where it must be {list(shape)}: {rule}."
        )
    if value.dtype != torch.float32:
        raise UserError(
            f"{whose} {value.dtype}; it must be torch.float32, whatever the weights are."
        )
    if not bool(value.isfinite().all()):
        raise UserError(f"{whose} numbers that are not finite, of ordinary ones. Mend it.")


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
