"""The networks: one body, a head for the policy and one for the value. Systems with networks of their own get the same
sizes; whoever takes a module gets these.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

N_ACTIONS = {"cartpole": 2, "pong": 6, "cheetah": 6, "minigrid": 7}
N_FEATURES = {"cartpole": 64, "pong": 512, "cheetah": 256, "minigrid": 64}
CONTINUOUS = frozenset({"cheetah"})


class Pixels(nn.Module):
    """The convolutions of Mnih et al. (2015) over uint8 [B, 4, 84, 84]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.layers(obs.float() / 255.0)  # type: ignore[no-any-return]


class Cells(nn.Module):
    """A layer over the flattened grid of MiniGrid."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(147, 64)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.layer(obs.flatten(-3).float()))


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())))


class Doubles(nn.Module):
    """A perceptron over observations in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(17, 256, 256)

    def forward(self, obs: Tensor) -> Tensor:
        return self.layers(obs.float())  # type: ignore[no-any-return]


def body(env: str) -> nn.Module:
    """From observations [B, ...] to [B, `N_FEATURES`]."""
    if env == "cartpole":
        return mlp(4, 64, 64)
    return {"pong": Pixels, "cheetah": Doubles, "minigrid": Cells}[env]()


class Net(nn.Module):
    """Policy and value of a batch of observations. MiniGrid's has a recurrent state [B, 64]."""

    def __init__(self, env: str) -> None:
        super().__init__()
        n = N_FEATURES[env]
        self.body = body(env)
        self.core = nn.GRUCell(64, 64) if env == "minigrid" else None
        self.policy, self.baseline = nn.Linear(n, N_ACTIONS[env]), nn.Linear(n, 1)
        self.log_std = nn.Parameter(torch.zeros(N_ACTIONS[env])) if env in CONTINUOUS else None

    def forward(self, obs: Tensor, hx: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Logits or means [B, A], values [B], and the next recurrent state."""
        x = self.body(obs)
        if self.core is not None:
            x = hx = self.core(x, hx)
        return self.policy(x), self.baseline(x).squeeze(-1), hx

    def sample(self, out: Tensor, *, race: bool = False) -> Tensor:
        """Actions [B] or [B, A]: softmax and multinomial, or, with `race`, the Gumbel-max trick; a Gaussian's."""
        if self.log_std is not None:
            return torch.normal(out, self.log_std.exp().expand_as(out))
        if race:
            return torch.empty_like(out).exponential_().log_().sub_(out).argmin(-1)
        return torch.multinomial(out.softmax(-1), 1).squeeze(-1)

    def distribution(self, out: Tensor) -> torch.distributions.Distribution:
        if self.log_std is not None:
            return torch.distributions.Independent(torch.distributions.Normal(out, self.log_std.exp()), 1)
        return torch.distributions.Categorical(logits=out, validate_args=False)
