"""Small networks computed by NumPy where they act. Between two steps of the environments a call of a small torch kernel
takes 5 µs, one of NumPy's 2: for layers of 64 units the calls are what costs.

Each class is the `zrl.collect.actor.ArrayStep` of an actor of `zrl.zoo`, and its arrays are the memory of that actor's
parameters. What a fragment takes of random numbers is drawn at once, by torch's default generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zrl.data.fragment import Array

if TYPE_CHECKING:
    from zrl.zoo.actors import GRUActor, MLPActor, PolicyHead

Outputs = tuple[Array, ...]  # the action, and the leaves of the info dict in the order of their names


def _tanh(x: Array) -> Array:
    return np.tanh(x, out=x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0, out=x)


_IN_PLACE: dict[type[nn.Module], Callable[[Array], Array]] = {nn.Tanh: _tanh, nn.ReLU: _relu}
_Layer = tuple[Array, Array, Callable[[Array], Array] | None]  # weight, transposed; bias; what follows


class MLPByNumpy:
    """Of an `MLPActor` whose observation is one Box."""

    def __init__(self, actor: MLPActor) -> None:
        self._actor = actor
        self._heads = _Heads()
        self._core: list[_Layer] = []
        self._other: list[_Layer] | None = None

    def begin(self, n_steps: int, n_columns: int) -> bool:
        """Look at the actor as it is."""
        actor = self._actor
        parts: Any = actor._modules
        try:
            self._core = _layers(parts["core"])
            self._other = None if actor.value_core is None else _layers(actor.value_core)
            self._heads.begin(actor.policy, actor.value_head, n_steps, n_columns, sample=actor.training)
        except TypeError:
            return False
        return True

    def __call__(self, obs: Array, fin: Array, hx: Any, t: int) -> tuple[Outputs, Any]:
        x = _flat(obs)
        core = _run(self._core, x)
        return self._heads(core, core if self._other is None else _run(self._other, x), t), hx


class GRUByNumpy:
    """Of a `GRUActor` whose observation is one Box."""

    def __init__(self, actor: GRUActor) -> None:
        self._actor = actor
        self._heads = _Heads()
        self._encoder: list[_Layer] = []
        self._of_input: list[_Layer] = []
        self._of_state: list[_Layer] = []

    def begin(self, n_steps: int, n_columns: int) -> bool:
        """Look at the actor as it is."""
        actor, core = self._actor, self._actor.core
        try:
            if not is_cell(core):
                raise TypeError(f"more than a cell, or with hooks: {core}")
            p: Any = core._parameters
            self._encoder = _layers(actor.encoder)
            self._of_input = [(_array(p["weight_ih_l0"]).T, _array(p["bias_ih_l0"]), None)]
            self._of_state = [(_array(p["weight_hh_l0"]).T, _array(p["bias_hh_l0"]), None)]
            self._heads.begin(actor.policy, actor.value_head, n_steps, n_columns, sample=actor.training)
        except TypeError:
            return False
        return True

    def __call__(self, obs: Array, fin: Array, hx: Tensor, t: int) -> tuple[Outputs, Tensor]:
        """One step of the cell that `torch.nn.GRU` documents, its state set to zero where an episode ended."""
        h = hx[0].numpy()
        if fin.any():
            h = np.where(fin[:, None], np.float32(0), h)
        n = h.shape[1]
        x, of_state = _run(self._of_input, _run(self._encoder, _flat(obs))), _run(self._of_state, h)
        gates = x[:, : 2 * n]
        gates += of_state[:, : 2 * n]
        gates *= 0.5  # σ(x) = (tanh(x / 2) + 1) / 2
        np.tanh(gates, out=gates)
        gates += 1.0
        gates *= 0.5
        new, from_state = x[:, 2 * n :], of_state[:, 2 * n :]
        from_state *= gates[:, :n]  # reset
        new += from_state
        np.tanh(new, out=new)
        h = h - new
        h *= gates[:, n:]  # update
        h += new
        return self._heads(h, h, t), torch.from_numpy(h).unsqueeze(0)


class _Heads:
    """From features to actions and what is recorded of them: categorical for Discrete, Gaussian for a Box."""

    def __init__(self) -> None:
        self._policy: list[_Layer] = []
        self._value: list[_Layer] = []
        self._head: PolicyHead | None = None
        self._noise: Any = None  # [T, B, n]; None: acts greedily
        self._log_std: Any = None  # [n]; None: categorical

    def begin(self, head: PolicyHead, value: nn.Module, n_steps: int, n_columns: int, *, sample: bool) -> None:
        """Take the heads as they are, and draw.

        Raises:
            TypeError: they cannot be computed here.
        """
        self._head = head
        self._policy, self._value = _layers([head.linear]), _layers([value])
        self._log_std = _array(head.log_std) if head.is_gaussian else None
        self._noise = None
        if not sample:
            return
        noise = torch.empty(n_steps, n_columns, len(self._policy[0][1]))
        if self._log_std is None:  # the race of `zrl.algo.categorical`
            self._noise = noise.exponential_().log_().numpy()
        else:
            self._noise = noise.normal_().mul_(head.log_std.detach().exp()).numpy()

    def __call__(self, policy: Array, value: Array, t: int) -> Outputs:
        out, v = _run(self._policy, policy), _run(self._value, value)[:, 0]
        head: Any = self._head
        if self._log_std is None:
            index = out.argmax(-1) if self._noise is None else (self._noise[t] - out).argmin(-1)
            return (index + head.start if head.start else index), out, v
        shape = (len(out), *head.shape)
        mean = out.reshape(shape)
        act = mean if self._noise is None else (out + self._noise[t]).reshape(shape)
        return act, self._log_std.reshape(head.shape), mean, v


def _flat(obs: Array) -> Array:
    """``[B, ...]`` as float32 ``[B, k]``."""
    x = obs if obs.ndim == 2 else obs.reshape(len(obs), -1)
    return x if x.dtype == np.float32 else x.astype(np.float32)


def _layers(modules: Any) -> list[_Layer]:
    """Linear layers and the activations behind them.

    Raises:
        TypeError: something else, or not float32 on the CPU, or with hooks.
    """
    layers: list[_Layer] = []
    for module in modules:
        if is_hooked(module):
            raise TypeError(f"has hooks: {module}")
        if type(module) is nn.Linear:
            layers.append((_array(module.weight).T, _array(module.bias), None))
        elif type(module) in _IN_PLACE and layers and layers[-1][2] is None:
            layers[-1] = (*layers[-1][:2], _IN_PLACE[type(module)])
        else:
            raise TypeError(f"neither a linear layer nor an activation behind one: {module}")
    return layers


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_cell(core: nn.Module) -> bool:
    """Whether a step of this core is one of a GRU cell with biases, and nobody listens."""
    if type(core) is not nn.GRU or is_hooked(core):
        return False
    return core.num_layers == 1 and core.bias and not (core.bidirectional or core.batch_first)


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
