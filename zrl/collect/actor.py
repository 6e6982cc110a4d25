"""The actor's contract: what a policy network must offer to be stepped, recorded and trained.

An actor performs the update ``(x_t, a_{t-1}, r_t, d_t; h_t) → (a_t, h_{t+1})`` for ``B`` environments at once, and over
``T`` rows when it is trained. Everything it takes and returns is ``[T, B, ...]``; recurrent state is ``[L, B, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from zrl.data.fragment import Array
from zrl.errors import ActorError


class ArrayStep(Protocol):
    """A step computed by arrays instead of tensors, with the weights of an actor and the outputs of its `step`, but for
    the last bits and the random numbers."""

    def begin(self, n_steps: int, n_columns: int) -> bool:
        """Once before each fragment; False: this one is to be made by `step`."""

    def __call__(self, obs: Array, fin: Array, hx: Any, t: int) -> tuple[tuple[Array, ...], Any]:
        """At row `t`, from the only leaf of its observation and its ends [B]: the action [B, ...] and the leaves of the
        info dict in the order of their names; and the next recurrent state, tensors like `hx`."""


class BaseActorModule(torch.nn.Module):
    """Base of actors. Define ``forward``; the rest has defaults.

    ``forward(obs, act, rew, fin, *, hx=None) -> (actions, hx, info)``

    - ``obs``, ``act``: nested as the environment nests them, ``[T, B, ...]``; ``act`` is a_{t-1}; ``rew`` float32 and
      ``fin`` bool are ``[T, B]``.
    - ``hx``: ``[L, B, ...]``, any nesting, or ``()``; ``None`` asks for the initial state. A recurrent actor resets its
      state before row t where ``fin[t]`` (`zrl.algo.unroll` does it) and returns a *new* ``hx``.
    - ``actions``: in the values and the nesting of the action space, ``[T, B, ...]``. Box actions are clipped on their
      way into the environment, and recorded as sampled. A Text is integer codes ``[T, B, max_length]``: the
      place of each character among the sorted ones, then nothing but padding, ``len(character_set)``. A OneOf is
      ``(index, (alternative 0, alternative 1, ...))``, index ``[T, B]``: all alternatives, of which the chosen one
      counts. Observations of these spaces look the same.
    - ``info``: a dict whose ``"value"`` is ``[T, B]``; all else in it is recorded beside it.

    An actor must not write its inputs, draws random numbers from torch's default generators only, and samples when
    ``self.training``, acts greedily otherwise. What shall follow the learner during a run must be a parameter or a
    buffer; other attributes are frozen when the run starts, but for what `setup` makes of them.
    """

    def setup(self, worker: int, columns: range, generator: torch.Generator) -> None:
        """Prepare the copy of one worker for its columns: for an ε of its own in each, say. Does nothing by default.

        Called once, on the private copy that acts, on its device, before anything else is asked of it; again, with
        another `generator`, on the copy of a worker that replaces one. Never called on the learner's own actor, nor in
        evaluations: give every attribute that is set here a value in ``__init__`` as well, one that fits any number of
        columns. And let ``info`` say whatever of it a loss must know, such as the ``log_prob`` of the actions taken.

        Set plain attributes. Parameters and buffers, non-persistent ones too, are the learner's: what is written into
        them here is overwritten at the next publish.

        Args:
            worker: index of the worker in the run.
            columns: the numbers of its B columns in the run, ``worker * B`` to ``worker * B + B - 1``.
            generator: on the CPU, seeded for this worker and this life of it from the entropy of the run; nobody else
                draws from it.
        """

    def step(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> tuple[Any, Any, dict[str, Any]]:
        """One step of B environments: all inputs ``[1, B, ...]``; returns as ``forward``."""
        actions, hx, info = self(obs, act, rew, fin, hx=hx)
        return actions, hx, info

    def by_arrays(self) -> ArrayStep | None:
        """What acts in the place of `step` where fragments are made, on the CPU and without debug: for an actor that
        observes one array and takes one action. None, the default: `step` does."""
        return None

    def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
        """v(x_t), ``[1, B]``, with nothing advanced: the new recurrent state is dropped.

        It is also asked for any number of columns that were truncated in any rows of a fragment, side by side, unless
        the actor has a `setup`.
        """
        _, _, info = self(obs, act, rew, fin, hx=hx)
        value: Tensor = info["value"]
        return value

    def reset(self, j: int, hx: Any) -> Any:
        """The recurrent state with column `j`, an int, back at its initial value: zeros unless overridden.

        Override it for a learnt initial state. Mind that ``hx[:, j].zero_()`` with an index *tensor* would change a
        copy.
        """

        def zero_column(h: Tensor) -> Tensor:
            h = h.clone()
            h[:, j].zero_()
            return h

        return optree.tree_map(zero_column, hx)

    def log_prob(self, info: dict[str, Any], act: Any) -> Tensor:
        """log π(act), ``[T, B]``, summed over all components of a nested action.

        The default knows two policies. ``info["logits"]``, a tree over the action's: for an action leaf ``[T, B]``
        logits ``[T, B, n]`` (categorical); for a leaf ``[T, B, k]`` (MultiDiscrete, MultiBinary) logits ``[T, B, k,
        n]``, one categorical a component, shorter ones padded with −inf, or a list of k logits ``[T, B, n_i]``; for a
        Text ``[T, B, max_length, n + 1]``. Of a OneOf all alternatives count, chosen or not. ``info["mean"]`` and
        ``info["log_std"]``: a diagonal Gaussian. Logits need not be normalised; −inf forbids.

        Raises:
            ActorError: neither is in `info`; override the method then.
        """
        return _sum_parts(info, act, _categorical_log_prob, _gaussian_log_prob)

    def entropy(self, info: dict[str, Any]) -> Tensor:
        """Entropy of π in nats, ``[T, B]``, for the policies that `log_prob` knows.

        Raises:
            ActorError: as `log_prob`.
        """
        return _sum_parts(info, None, _categorical_entropy, _gaussian_entropy)


def _sum_parts(
    info: dict[str, Any],
    act: Any,
    categorical: Callable[[Tensor, Tensor | None], Tensor],
    gaussian: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Sum over the leaves of the policy's parameters, each with its leaf of the action, down to ``[T, B]``."""
    if "logits" in info:
        logits = optree.tree_leaves(info["logits"])
        acts = [None] * len(logits) if act is None else _split_like(info["logits"], act)
        parts = [categorical(x, a) for x, a in zip(logits, acts, strict=True)]
    elif "mean" in info and "log_std" in info:
        means, log_stds = optree.tree_leaves(info["mean"]), optree.tree_leaves(info["log_std"])
        acts = [None] * len(means) if act is None else optree.tree_leaves(act)
        parts = [gaussian(m, s, a) for m, s, a in zip(means, log_stds, acts, strict=True)]
    else:
        raise ActorError(
            "no density for this policy: override log_prob and entropy, or return logits, or mean and log_std",
            leaf="info",
            expected="'logits', or 'mean' and 'log_std'",
            found=", ".join(map(repr, sorted(info))),
        )
    flat = [p if p.dim() == 2 else p.flatten(2).sum(-1) for p in parts]
    return flat[0] if len(flat) == 1 else torch.stack(flat).sum(0)


def _split_like(logits: Any, act: Any) -> list[Tensor | None]:
    """Leaves of `act` to pair with the leaves of `logits`: one with k logits in its place is cut into k components."""
    if isinstance(act, Tensor):
        return [act] if isinstance(logits, Tensor) else list(act.unbind(-1))
    pairs: list[Tensor | None] = []
    leaves, tree = optree.tree_flatten(act)
    for a, x in zip(leaves, tree.flatten_up_to(logits), strict=True):
        pairs.extend(_split_like(x, a))
    return pairs


def _categorical_log_prob(logits: Tensor, act: Tensor | None) -> Tensor:
    assert act is not None
    return logits.log_softmax(-1).gather(-1, act.long().unsqueeze(-1)).squeeze(-1)


def _categorical_entropy(logits: Tensor, act: Tensor | None) -> Tensor:
    log_p = logits.log_softmax(-1)
    # an action with log p = −inf adds 0, and must not send NaN back
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def _gaussian_log_prob(mean: Tensor, log_std: Tensor, act: Tensor | None) -> Tensor:
    assert act is not None
    z = (act - mean) * torch.exp(-log_std)
    return -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)


def _gaussian_entropy(mean: Tensor, log_std: Tensor, act: Tensor | None) -> Tensor:
    return (log_std + 0.5 * (1 + math.log(2 * math.pi))).expand_as(mean)
