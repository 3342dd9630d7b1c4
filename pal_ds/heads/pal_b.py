"""PAL-B: the user mixes K maps of the prompt, a direction for responses (arXiv 2406.08469).

With f the response projector, g_1..g_K the prompt projectors and s_u the user's mixture,
    z_u(c) = sum_k s_uk g_k(h(c))      reward(x; c, u) = min(exp(t), 100) cos(f(h(x)), z_u(c))
"""

from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from .base import Features, Head, Placement, UserState
from .checks import check_choice, check_positive
from .geometry import bounded_scale, new_log_scale, take, unit
from .jaxtyping_fallback import Float, Int
from .mixture import Mixture, MixtureEvaluation, MixtureKind
from .projector import Activation, Projector, StackedProjector
from .sufficient_statistics import MixtureStatistics, cosine_statistics

PromptPosition = Literal["last", "aligned"]


@final
class PalB(Head):
    """The prompt-conditioned head. With K = 1 no user can move a margin, user gradients are 0."""

    needs: frozenset[str] = frozenset({"prompt", "logits"})
    family: ClassVar[str] = "pal_b"

    def __init__(
        self,
        hidden_size: int,
        num_prototypes: int = 4,
        dim: int | None = None,
        num_layers: int = 3,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        residual: bool = False,
        prompt_position: PromptPosition = "last",
        temperature: float = 1.0,
        mixture: MixtureKind = "softmax",
        evaluation: MixtureEvaluation = "soft",
        prompt_dropout: float = 0.5,
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H, the width of the backbone's hidden states.
            num_prototypes: K.
            dim: d, the width of the reward space; H where unset.
            num_layers: linear layers of f and of each g_k.
            activation: between those layers.
            dropout: after each activation.
            residual: f(x) = x + layers(x), and likewise g_k; needs d = H.
            prompt_position: `last`, or `aligned` (response position t looks at prompt position t, and at the prompt's
                last one from there on) for parity with the reference. The scale's t starts at log(1 / 0.07).
            temperature: tau of the mixture.
            mixture: `softmax`, `gumbel` or `signed`.
            evaluation: `soft`, or `hard` for the largest logit alone.
            prompt_dropout: share of prompts that the head does not see, in training: it reads zeros in their place.
                Users who have prompts of their own are otherwise known by them, and what is learnt is each prompt's
                own direction, which says nothing of others. The paper's form is 0.
        """
        super().__init__()
        check_positive("num_prototypes", num_prototypes)
        check_choice("prompt_position", prompt_position, get_args(PromptPosition))
        if not 0 <= prompt_dropout < 1:
            raise ValueError(
                f"prompt_dropout is {prompt_dropout}; it must be at least 0 and below 1."
            )
        dim = hidden_size if dim is None else dim
        shape: dict[str, Any] = {"input_size": hidden_size, "output_size": dim}
        shape |= {"num_layers": num_layers, "activation": activation, "dropout": dropout}
        shape |= {"residual": residual}
        self.num_prototypes = num_prototypes
        self.prompt_position = prompt_position
        # A module, as fits of new users turn those off, in training mode otherwise: they see every prompt.
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        if prompt_position == "aligned":
            self.needs = self.needs | {"prompt_tokens"}
        self.response_projector = Projector(**shape)
        self.prompt_projectors = StackedProjector(num_prototypes, **shape)
        self.has_statistics = prompt_position == "last"  # aligned positions have K maps per token
        self.temperature = temperature
        self.mixture = Mixture(temperature, mixture, evaluation)
        self.needs, self.space = self.needs | self.mixture.needs, self.mixture.space
        self.log_scale = new_log_scale()

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """s_u, fp32."""
        return self.mixture(user)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Scaled cosines, fp32. Raises ValueError where the features lack what the head reads."""
        projected = unit(self.response_projector(features.response))
        response = take(projected, features.response_index)
        direction = unit(self.direction(features, user))
        if self.prompt_position == "aligned":
            direction = _align(direction, features, response.shape[2])
        return bounded_scale(self.log_scale) * (response * direction).sum(-1)

    def place(self, features: Features, user: UserState) -> Placement | None:
        """Projected responses and z_u of each one's prompt; None for aligned positions."""
        if self.prompt_position == "aligned":
            return None
        return Placement(
            self.response_projector(features.response),
            features.response_index,
            self.direction(features, user)[:, :, 0],
            bounded_scale(self.log_scale),
        )

    def statistics(self, features: Features) -> MixtureStatistics | None:
        """By the K maps of each prompt."""
        if not self.has_statistics:
            return None
        maps, prompt_index = self.maps(features)
        maps = maps[:, 0]
        # A response is projected once and meets each of its prompts once: as a rule there is one.
        keys = features.response_index * len(maps) + prompt_index
        pairs, index = torch.unique(keys, return_inverse=True)
        projected = self.response_projector(features.response)[pairs // len(maps)]
        scale, tau = bounded_scale(self.log_scale), self.temperature
        return cosine_statistics(projected, index, maps, pairs % len(maps), scale, tau, self.space)

    def direction(self, features: Features, user: UserState) -> Float[Tensor, "B r C d"]:
        """z_u at every given prompt position, fp32."""
        # The K maps run once per distinct prompt; only their mixing depends on the user.
        maps = take(*self.maps(features))
        return torch.einsum("bk,brckd->brcd", self.mixture(user), maps)

    def maps(self, features: Features) -> tuple[Float[Tensor, "P C K d"], Int[Tensor, "B r"]]:
        """g_1..g_K at every given prompt position, fp32, and which prompt each response answers."""
        if features.prompt is None or features.prompt_index is None:
            raise ValueError("PalB reads the prompt: features must carry prompt and prompt_index.")
        num_positions = features.prompt.shape[1]
        if self.prompt_position == "last" and num_positions != 1:
            raise ValueError(
                f"prompt_position is 'last' but the features hold {num_positions} positions per "
                "prompt: give the last token only, or set prompt_position to 'aligned'."
            )
        prompt = features.prompt
        if self.prompt_dropout.training and self.prompt_dropout.p:
            # All positions of a prompt or none; not rescaled, as a bias alone is what an unseen prompt leaves.
            seen = torch.rand(len(prompt), 1, 1, device=prompt.device) >= self.prompt_dropout.p
            prompt = prompt * seen
        return self.prompt_projectors(prompt).float(), features.prompt_index


def _align(
    direction: Float[Tensor, "B r C d"], features: Features, num_positions: int
) -> Float[Tensor, "B r T d"]:
    """Entry min(t, prompt length - 1) of each direction, for t in [0, num_positions)."""
    if features.prompt_length is None:
        raise ValueError("prompt_position is 'aligned': features must carry prompt_length.")
    last = features.prompt_length[features.prompt_index].unsqueeze(-1) - 1
    position = torch.arange(num_positions, device=last.device).minimum(last)
    owner = torch.arange(last.numel(), device=last.device).view_as(last)
    return take(direction.flatten(0, 2), owner * direction.shape[2] + position)
