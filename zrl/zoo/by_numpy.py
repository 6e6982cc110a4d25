"""A perceptron computed by NumPy where it acts. In the loop, between two steps of the environments, a call of a small
torch kernel takes 5 µs, one of NumPy's 2: for layers of 64 units the calls are what costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zrl.data.fragment import Array

if TYPE_CHECKING:
    from zrl.zoo.actors import MLPActor


def _tanh(x: Array) -> Array:
    return np.tanh(x, out=x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0, out=x)


_IN_PLACE: dict[type[nn.Module], Callable[[Array], Array]] = {nn.Tanh: _tanh, nn.ReLU: _relu}
_Layer = tuple[Array, Array, Callable[[Array], Array] | None]  # weight, transposed; bias; what follows


class MLPByNumpy:
    """`zrl.collect.actor.ArrayStep` of an `MLPActor` with a Discrete action; the arrays are its parameters' memory."""

    def __init__(self, actor: MLPActor) -> None:
        self._actor = actor
        self._noise: Any = None  # [T, B, n]; None: acts greedily
        self._core: list[_Layer] = []
        self._other: list[_Layer] | None = None
        self._policy: list[_Layer] = []
        self._value: list[_Layer] = []

    def begin(self, n_steps: int, n_columns: int) -> bool:
        """Look at the actor as it is, and draw what a fragment takes, by torch's default generator."""
        actor = self._actor
        parts: Any = actor._modules
        try:
            self._core = _layers(parts["core"])
            self._other = None if actor.value_core is None else _layers(actor.value_core)
            self._policy, self._value = _layers([actor.policy.linear]), _layers([actor.value_head])
        except TypeError:
            return False
        n = len(self._policy[0][1])
        self._noise = None
        if actor.training:  # the race of `zrl.algo.categorical`
            self._noise = torch.empty(n_steps, n_columns, n).exponential_().log_().numpy()
        return True

    def __call__(self, obs: Array, t: int) -> tuple[Array, Array, Array]:
        """Actions [B], logits [B, n] and values [B, 1] at ``obs [B, k]``, row `t` of the fragment."""
        core = _run(self._core, obs)
        logits = _run(self._policy, core)
        value = _run(self._value, core if self._other is None else _run(self._other, obs))
        index = logits.argmax(-1) if self._noise is None else (self._noise[t] - logits).argmin(-1)
        start = self._actor.policy.start
        return (index + start if start else index), logits, value[:, 0]


def _layers(modules: Any) -> list[_Layer]:
    """Linear layers and the activations behind them.

    Raises:
        TypeError: something else, or not float32 on the CPU, or with hooks.
    """
    layers: list[_Layer] = []
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(f"has hooks: {module}")
        if type(module) is nn.Linear:
            layers.append((_array(module.weight).T, _array(module.bias), None))
        elif type(module) in _IN_PLACE and layers and layers[-1][2] is None:
            layers[-1] = (*layers[-1][:2], _IN_PLACE[type(module)])
        else:
            raise TypeError(f"neither a linear layer nor an activation behind one: {module}")
    return layers


def _array(x: Tensor | None) -> Array:
    if x is None or not x.is_cpu or x.dtype is not torch.float32:
        raise TypeError("not float32 on the CPU")
    return x.detach().numpy()


def _run(layers: list[_Layer], x: Array) -> Array:
    for weight, bias, activation in layers:
        x = np.dot(x, weight)
        x += bias
        if activation is not None:
            activation(x)
    return x
