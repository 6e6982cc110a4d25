"""Actors for the usual spaces: observations flattened into features, one core, a policy head and a value head."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from zrl import algo
from zrl.collect.actor import ArrayStep, BaseActorModule
from zrl.collect.encoding import TextCodes
from zrl.collect.spaces import space_leaves
from zrl.data.spec import flatten
from zrl.errors import ActorError
from zrl.zoo.by_numpy import GRUByNumpy, MLPByNumpy, is_cell, is_hooked


class Features(nn.Module):
    """Observations of any nesting as one vector: ``[T, B, n]`` float32, where `n` is `size`.

    Box and MultiBinary leaves are flattened, Discrete and MultiDiscrete ones become one-hot vectors, and so does every
    character of a Text, with padding as one more. Of a OneOf all alternatives are there, beside a one-hot index.
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        self._spaces, tree = flatten(space_leaves(space, "observation_space"))
        self._paths = tree.paths()
        self.size = sum(map(_size, self._spaces))
        self._plain = isinstance(space, gym.spaces.Box) and len(space.shape) == 1

    def forward(self, obs: Any) -> Tensor:
        if self._plain:
            x: Tensor = obs
            return x if x.dtype == torch.float32 else x.float()
        # one by one: for a Tuple space a list or a namedtuple will do too
        leaves = [functools.reduce(operator.getitem, path, obs) for path in self._paths]
        return torch.cat([_encode(s, x) for s, x in zip(self._spaces, leaves, strict=True)], dim=-1)


def _size(space: gym.Space[Any]) -> int:
    if isinstance(space, TextCodes):
        return space.text.max_length * (space.padding + 1)
    return gym.spaces.flatdim(space)


def _encode(space: gym.Space[Any], x: Tensor) -> Tensor:
    if isinstance(space, TextCodes):
        return nn.functional.one_hot(x.long(), space.padding + 1).flatten(2).float()
    if isinstance(space, gym.spaces.Discrete):
        return nn.functional.one_hot(x.long() - int(space.start), int(space.n)).float()
    if isinstance(space, gym.spaces.MultiDiscrete):
        x, sizes, starts = x.flatten(2), space.nvec.ravel().tolist(), space.start.ravel().tolist()
        hot = [nn.functional.one_hot(x[..., i].long() - starts[i], n) for i, n in enumerate(sizes)]
        return torch.cat(hot, dim=-1).float() if hot else x.float()
    return x.flatten(2).float() if x.dim() > 2 else x.unsqueeze(-1).float()


class PolicyHead(nn.Module):
    """From features to the parameters of a policy over one action space, and to actions.

    Discrete: categorical. MultiDiscrete, MultiBinary: one categorical a component. Box: a diagonal Gaussian whose
    standard deviation does not depend on the state.

    Attributes:
        shape: of an action.
        start: the least action.
        is_gaussian: else categorical.

    Raises:
        ActorError: another action space.
    """

    _absent: Tensor | None

    def __init__(self, n_features: int, space: gym.Space[Any]) -> None:
        super().__init__()
        self.shape = space.shape or ()
        start: Any = 0
        self.is_gaussian = isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f"
        if self.is_gaussian:
            self.log_std = nn.Parameter(torch.zeros(math.prod(self.shape)))
            self.linear = _linear(n_features, math.prod(self.shape), gain=0.01)
        elif isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)):
            sizes, start = _sizes(space)
            self.linear = _linear(n_features, len(sizes) * max(sizes), gain=0.01)
            self._logits = (*self.shape, max(sizes))
            real = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(-1)).reshape(self._logits)
            self.register_buffer("_absent", ~real if not real.all() else None, persistent=False)
        else:
            raise ActorError(
                "no default policy for this action space; write an actor of your own (zrl.BaseActorModule)",
                leaf="action_space",
                expected="Discrete, MultiDiscrete, MultiBinary, or Box of floats",
                found=str(space),
            )
        self._start = None if not np.any(start) else start
        self.start: Any = start

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return self.parameters_of(self.linear(features))

    def parameters_of(self, out: Tensor) -> dict[str, Tensor]:
        """Those of the policy, from what the last layer says."""
        if not (self.is_gaussian or self.shape):
            return {"logits": out}
        lead = out.shape[:-1]
        if self.is_gaussian:
            return {
                "mean": out.reshape(*lead, *self.shape),
                "log_std": self.log_std.expand_as(out).reshape(*lead, *self.shape),
            }
        logits = out.reshape(*lead, *self._logits)
        return {"logits": logits if self._absent is None else logits.masked_fill(self._absent, -torch.inf)}

    def act(self, info: dict[str, Tensor], *, sample: bool) -> Tensor:
        """Actions in the values of the space: sampled, or the most likely ones."""
        if "mean" in info:
            mean = info["mean"]
            return torch.normal(mean, info["log_std"].exp()) if sample else mean
        logits = info["logits"]
        index = algo.categorical(logits) if sample else logits.argmax(-1)
        return self.shift(index, 1)

    def shift(self, act: Tensor, sign: int) -> Tensor:
        """From indices to actions (`sign` 1), or back (−1), where a space does not start at 0."""
        if self._start is None:
            return act
        return act + sign * torch.as_tensor(self._start, device=act.device)


def _sizes(space: gym.Space[Any]) -> tuple[list[int], Any]:
    """Sizes of the categoricals of a space, and its least values."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)], int(space.start)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec.ravel().tolist(), space.start
    return [2] * math.prod(space.shape or ()), 0


def _linear(n_in: int, n_out: int, gain: float) -> nn.Linear:
    """Orthogonal weights and no bias at the start, as policy gradients like it."""
    layer = nn.Linear(n_in, n_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer` on ``x [B, n]``, where no gradient is wanted: the same kernel on the same numbers, without the call of a
    module around it, which takes as long. What is no plain linear layer, or has hooks, is called as ever on one row."""
    if type(layer) is nn.Linear and not is_hooked(layer):
        p = layer._parameters
        return nn.functional.linear(x, p["weight"], p["bias"])  # type: ignore[arg-type]
    return layer(x.unsqueeze(0))[0]  # type: ignore[no-any-return]


def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The same for all `layers`; an activation writes into what the linear layer before it made."""
    before = None  # kind of the layer before, if nobody else can have seen what it made
    for layer in layers._modules.values():
        assert layer is not None
        hooked = is_hooked(layer)
        in_place = None if hooked or before is not nn.Linear else _IN_PLACE.get(type(layer))
        x = _apply(layer, x) if in_place is None else in_place(x)
        before = None if hooked else type(layer)
    return x


_IN_PLACE: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.Tanh: Tensor.tanh_, nn.ReLU: Tensor.relu_}


def _mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [_linear(n_in, n_out, gain=math.sqrt(2)), activation()]
    return nn.Sequential(*layers)


class _Actor(BaseActorModule):
    """What the actors here share: heads on the features of ``self._features``, and the density of the policy."""

    def __init__(self, n_features: int, action_space: gym.Space[Any]) -> None:
        super().__init__()
        self.policy = PolicyHead(n_features, action_space)
        self.value_head = _linear(n_features, 1, gain=1.0)

    def _heads(self, policy: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        info = self.policy(policy)
        actions = self.policy.act(info, sample=self.training)
        info["value"] = self.value_head(value).squeeze(-1)
        return actions, info

    def step(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> tuple[Any, Any, dict[str, Tensor]]:
        """As `forward`, number for number, and up to twice as fast: see `_apply`."""
        if torch.is_grad_enabled() or type(self) not in _OURS:  # a class of one's own may have a `forward` of its own
            return super().step(obs, act, rew, fin, hx)
        policy, value, hx = self._row(obs, fin, hx)
        parts: Any = self._modules  # attributes of a module take as long to find as a small layer takes to compute
        head = parts["policy"]
        info = head.parameters_of(_apply(head._modules["linear"], policy).unsqueeze(0))
        actions = head.act(info, sample=self.training)
        info["value"] = _apply(parts["value_head"], value).view(1, -1)
        return actions, hx, info

    def _row(self, obs: Any, fin: Tensor, hx: Any) -> tuple[Tensor, Tensor, Any]:
        """Of one row: features for the policy and for the value, each ``[B, n]``, and the next state."""
        raise NotImplementedError

    def log_prob(self, info: dict[str, Any], act: Any) -> Tensor:
        return super().log_prob(info, self.policy.shift(act, -1))


class MLPActor(_Actor):
    """A perceptron over flattened observations.

    Args:
        hidden: sizes of the hidden layers.
        shared: one core for policy and value; otherwise each has its own.
        numpy: make fragments by NumPy, where that can be: on the CPU, with one Box observed, an action that is Discrete
            or a Box, and Tanh or ReLU. Between the steps of environments it is twice as fast; what it records differs
            in the last bits from what `step` and `forward` would, and the random numbers are others.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        hidden: Sequence[int] = (64, 64),
        shared: bool = False,
        activation: type[nn.Module] = nn.Tanh,
        numpy: bool = False,
    ) -> None:
        super().__init__(hidden[-1], action_space)
        self.features = Features(observation_space)
        self._by_numpy = numpy and _can_be_arrays(observation_space, self.policy)
        self.core = _mlp([self.features.size, *hidden], activation)
        self.value_core = None if shared else _mlp([self.features.size, *hidden], activation)

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        x = self.features(obs)
        core = self.core(x)
        actions, info = self._heads(core, core if self.value_core is None else self.value_core(x))
        return actions, (), info

    def by_arrays(self) -> ArrayStep | None:
        return MLPByNumpy(self) if self._by_numpy and type(self) is MLPActor else None

    def _row(self, obs: Any, fin: Tensor, hx: Any) -> tuple[Tensor, Tensor, Any]:
        parts: Any = self._modules
        x = parts["features"].forward(obs)[0]
        core = _run(parts["core"], x)
        return core, core if self.value_core is None else _run(self.value_core, x), ()


def _can_be_arrays(observation_space: gym.Space[Any], policy: PolicyHead) -> bool:
    return isinstance(observation_space, gym.spaces.Box) and (policy.is_gaussian or not policy.shape)


class CNNActor(_Actor):
    """The convolutional network of Mnih et al. (2015) over images, channels first or last, uint8 or float.

    Args:
        hidden: size of the layer behind the convolutions.
    """

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any], hidden: int = 512) -> None:
        super().__init__(hidden, action_space)
        if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 3:
            raise ActorError(
                "not an image",
                leaf="observation_space",
                expected="Box [C, H, W] or [H, W, C]",
                found=str(observation_space),
            )
        shape = observation_space.shape
        # channels are the few: 1 to 4 colours or stacked frames
        self._last = shape[2] < shape[0]
        channels, height, width = (shape[2], shape[0], shape[1]) if self._last else shape
        self._scale = 255.0 if observation_space.dtype == np.uint8 else 1.0
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
        )
        try:
            n = self.convolutions(torch.zeros(1, channels, height, width)).numel()
        except RuntimeError as e:
            raise ActorError(
                "the image is too small", leaf="observation_space", expected="36 x 36 or more", found=str(shape)
            ) from e
        self.core = _mlp([n, hidden], nn.ReLU)

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        core = self.core(self.convolutions(self._images(obs)).flatten(1)).unflatten(0, fin.shape)
        actions, info = self._heads(core, core)
        return actions, (), info

    def _images(self, obs: Tensor) -> Tensor:
        x = obs.movedim(-1, -3) if self._last else obs
        # what is made of bytes is ours to write into
        x = x.float().div_(self._scale) if x.dtype == torch.uint8 else x.float() / self._scale
        return x.flatten(0, 1)

    def _row(self, obs: Any, fin: Tensor, hx: Any) -> tuple[Tensor, Tensor, Any]:
        core = _run(self.core, self.convolutions(self._images(obs)).flatten(1))
        return core, core, ()


class GRUActor(_Actor):
    """A gated recurrent core over features of the observation; its state is reset where an episode ended.

    Args:
        hidden: size of the recurrent state, ``[1, B, hidden]``.
        numpy: as of `MLPActor`.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        hidden: int = 64,
        numpy: bool = False,
    ) -> None:
        super().__init__(hidden, action_space)
        self.features = Features(observation_space)
        self._by_numpy = numpy and _can_be_arrays(observation_space, self.policy)
        self.encoder = _mlp([self.features.size, hidden], nn.Tanh)
        self.core = nn.GRU(hidden, hidden)

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        x = self.encoder(self.features(obs))
        if hx is None:
            hx = x.new_zeros(1, fin.shape[1], self.core.hidden_size)
        core, hx = algo.unroll(self.core, x, hx, fin)
        actions, info = self._heads(core, core)
        return actions, hx, info

    def by_arrays(self) -> ArrayStep | None:
        return GRUByNumpy(self) if self._by_numpy and type(self) is GRUActor else None

    def _row(self, obs: Any, fin: Tensor, hx: Any) -> tuple[Tensor, Tensor, Any]:
        x = _run(self.encoder, self.features.forward(obs)[0]).unsqueeze(0)
        if hx is None:
            hx = x.new_zeros(1, fin.shape[1], self.core.hidden_size)
        if not is_cell(self.core):
            core, hx = algo.unroll(self.core, x, hx, fin)
            return core[0], core[0], hx
        h = hx[0].masked_fill(fin.view(-1, 1), 0)
        p: Any = self.core._parameters
        core = torch.gru_cell(x[0], h, p["weight_ih_l0"], p["weight_hh_l0"], p["bias_ih_l0"], p["bias_hh_l0"])
        return core, core, core.unsqueeze(0)


_OURS = frozenset((MLPActor, CNNActor, GRUActor))


def default_actor(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> BaseActorModule:
    """The actor that ``zrl train`` uses unless told otherwise: a CNN for images of at least 36 x 36, else an MLP.

    Raises:
        ActorError: no default actor for these spaces.
        EnvError: an observation space without a fixed shape.
    """
    if isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 3:
        small = sorted(observation_space.shape)[1] < 36
        return (MLPActor if small else CNNActor)(observation_space, action_space)
    return MLPActor(observation_space, action_space)
