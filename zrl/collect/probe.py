"""What an actor gives: its outputs are looked at once, on a scratch observation, before anything is collected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import optree
import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule
from zrl.collect.encoding import action_reader, filler, is_encoded
from zrl.collect.spaces import EnvLayout, describe
from zrl.collect.streams import undrawn
from zrl.collect.writers import nesting_of
from zrl.data.fragment import Inputs, map_leaves
from zrl.data.spec import ArraySpec, FragmentSpec, flatten, tree_paths
from zrl.errors import ActorError, RecordError


class ActorLayout(NamedTuple):
    """Trees of `ArraySpec` of what an actor returns for one column: action, info, recurrent state (with its layers)."""

    act: Any
    info: Any
    hx: Any
    initial_hx: Any


def first_actions(spaces: Any, act: Any) -> list[Any]:
    """The a_{-1} of the first row, one value a leaf: zeros; ``start`` for a shifted Discrete or MultiDiscrete; padding
    for a Text."""
    leaves, specs = flatten(spaces)[0], flatten(act)[0]
    return [filler(space).astype(spec.dtype) for spec, space in zip(specs, leaves, strict=True)]


def check_actor(actor: Any) -> None:
    """Raise an ActorError unless it is one."""
    if not isinstance(actor, BaseActorModule):
        raise ActorError("not an actor", expected="a zrl.BaseActorModule", found=type(actor).__name__)


def probe_actor(actor: BaseActorModule, layout: EnvLayout, n_columns: int, device: torch.device) -> ActorLayout:
    """Run the actor on two rows and find what it returns, by leaf.

    Its random streams are left as they were. The initial recurrent state is what ``forward`` returns for
    ``hx=None`` with every column reset.

    Raises:
        ActorError: not an actor, an exception in it, a missing or misshapen ``value``, actions that do not fit the
            action space, recurrent state without a column axis, a ``reset`` that does not bring the initial state back,
            or inputs that were written to.
    """
    check_actor(actor)
    first, second = _example_inputs(layout, n_columns, device)
    with undrawn(device), torch.inference_mode():
        with untouched(first, None):
            actions, hx, info = _step(actor, first, None)
        act = _action_specs(actions, layout, n_columns)
        infos = _info_specs(info, n_columns)
        _check_state(hx, n_columns)
        initial = own_state(_reset_all(actor, hx, n_columns, device))
        with untouched(second, initial):
            _, again, _ = _step(actor, second, initial)
        if _shapes(again) != _shapes(initial):
            raise ActorError(
                "the recurrent state changes its shape", leaf="hx", expected=_shapes(initial), found=_shapes(again)
            )
        with untouched(second, initial):
            value = _ask("value()", actor.value, *second, initial)
        if not isinstance(value, Tensor) or tuple(value.shape) != (1, n_columns):
            raise ActorError(
                "value() is misshapen", leaf="value()", expected=f"[1, {n_columns}]", found=_shape_text(value)
            )
        _check_reset(initial, _reset_all(actor, again, n_columns, device))
    hx_specs = optree.tree_map(lambda h: _spec_of("hx", h, (h.shape[0], *h.shape[2:])), initial)
    return ActorLayout(act, infos, hx_specs, initial)


def fragment_spec(
    layout: EnvLayout, actor: ActorLayout, n_steps: int, n_columns: int, *, keep_final_obs: bool = False
) -> FragmentSpec:
    """The specification of the fragments that this environment and this actor make together."""
    return FragmentSpec.build(
        n_steps,
        n_columns,
        obs=layout.obs,
        act=actor.act,
        actor=actor.info,
        hx=actor.hx,
        env=layout.env,
        keep_final_obs=keep_final_obs,
    )


@contextlib.contextmanager
def untouched(inputs: Inputs, hx: Any) -> Iterator[None]:
    """Whoever is called inside must leave what it is given alone: containers, tensors and their values.

    Raises:
        ActorError: it wrote into one of them, also if that changed no value (dividing zeros, say).
    """
    names, given = ("obs", "act", "rew", "fin", "hx"), (*inputs, hx)
    leaves = [(x, _version(x)) for x in flatten(given)[0]]
    kept = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    yield
    check_untouched(given, kept, names)
    paths = [path for name, tree in zip(names, given, strict=True) for path in tree_paths(flatten(tree)[1], name)]
    for path, now, (before, version) in zip(paths, flatten(given)[0], leaves, strict=True):
        if now is not before or _version(now) != version:
            raise _touched(path, "the tensors it was given, untouched", "one that was written to")


def check_untouched(inputs: Any, kept: Any, names: Sequence[str] = ("obs", "act", "rew", "fin")) -> None:
    """Compare what the actor was given with the copies made before.

    Raises:
        ActorError: it wrote into one of them.
    """
    for name, now, before in zip(names, inputs, kept, strict=True):
        leaves, tree = flatten(now)
        old, old_tree = flatten(before)
        if tree != old_tree:
            raise _touched(name, nesting_of(before), nesting_of(now))
        for path, x, y in zip(tree_paths(tree, name), leaves, old, strict=True):
            if not same_values(x, y):
                raise _touched(path, "the values it was given", "others")


def _touched(leaf: str, expected: str, found: str) -> ActorError:
    what = "the actor changed its inputs in place; it must allocate what it returns"
    return ActorError(what, leaf=leaf, expected=expected, found=found)


def _version(x: Any) -> int:
    """How often a tensor was written to, through any of its views; tensors of inference mode do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def own_state(hx: Any) -> Any:
    """A copy of recurrent state as tensors that count their writes, wherever `hx` was made."""
    with torch.inference_mode(False), torch.no_grad():
        return map_leaves(lambda h: h.clone() if isinstance(h, Tensor) else h, hx)


def same_values(x: Any, y: Any) -> bool:
    """Equal, with NaN equal to NaN."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x, y) or bool(torch.isclose(x, y, rtol=0.0, atol=0.0, equal_nan=True).all())


def _example_inputs(layout: EnvLayout, n: int, device: torch.device) -> tuple[Inputs, Inputs]:
    """Two rows: the first of all, and one within an episode with the same observation."""
    specs, tree = flatten(layout.obs)
    leaves = tree.flatten_up_to(layout.example)
    spaces, act_tree = optree.tree_flatten(layout.act)
    # as an actor would sample them: torch's integers and floats, whatever width the space has
    act_specs = [ArraySpec("float32" if np.dtype(s.dtype).kind == "f" else "int64", tuple(s.shape)) for s in spaces]

    def row(fin: bool) -> Inputs:
        obs = [_columns_of(np.asarray(x, dtype=s.dtype), n, device) for x, s in zip(leaves, specs, strict=True)]
        acts = [_columns_of(x, n, device) for x in first_actions(spaces, act_specs)]
        rew = torch.zeros(1, n, device=device)
        return tree.unflatten(obs), act_tree.unflatten(acts), rew, torch.full((1, n), fin, device=device)

    with torch.inference_mode(False):  # tensors that count their writes
        return row(True), row(False)


def _columns_of(x: Any, n: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([x] * n)[None]).to(device)


def _ask(what: str, fn: Callable[..., Any], *args: Any) -> Any:
    try:
        return fn(*args)
    except Exception as e:
        raise ActorError(f"{what} of the actor raised {describe(e)} on the first observation") from e


def _step(actor: BaseActorModule, inputs: Inputs, hx: Any) -> tuple[Any, Any, Any]:
    result = _ask("step()", actor.step, *inputs, hx)
    if not isinstance(result, tuple) or len(result) != 3:
        raise ActorError(
            "step() and forward() must return three things", expected="(actions, hx, info)", found=type(result).__name__
        )
    return result


def _action_specs(actions: Any, layout: EnvLayout, n: int) -> Any:
    """One `ArraySpec` a leaf of the action space, dtype as sampled."""
    space_leaves, tree = optree.tree_flatten(layout.act)
    encoded = is_encoded(layout.action_space)
    try:
        leaves: list[Any] = tree.flatten_up_to(actions)
    except (ValueError, TypeError) as e:
        raise ActorError(
            "actions are not nested like the action space",
            leaf="state.act",
            expected=str(layout.act),
            found=nesting_of(actions),
        ) from e
    specs: list[ArraySpec] = []
    for path, x, space in zip(tree_paths(tree, "state.act"), leaves, space_leaves, strict=True):
        want = (1, n, *space.shape)
        if not isinstance(x, Tensor) or tuple(x.shape) != want:
            raise ActorError(
                "an action is misshapen", leaf=path, expected=f"a tensor {list(want)}", found=_shape_text(x)
            )
        if x.is_floating_point() != (np.dtype(space.dtype).kind == "f"):
            raise ActorError("an action is of the wrong kind", leaf=path, expected=str(space), found=str(x.dtype))
        passes = encoded or isinstance(space, gym.spaces.Box)  # is looked at below, or clipped
        if not passes and not all(space.contains(a) for a in x[0].cpu().numpy()):
            raise ActorError(
                "an action is outside of its space", leaf=path, expected=str(space), found=str(x[0].tolist())
            )
        specs.append(_spec_of(path, x, tuple(space.shape)))
    if encoded:
        action_reader(layout.action_space, layout.act).check([x[0].cpu().numpy() for x in leaves], range(n))
    return tree.unflatten(specs)


def _info_specs(info: Any, n: int) -> Any:
    if not isinstance(info, dict) or "value" not in info:
        found = f"keys {sorted(map(str, info))}" if isinstance(info, dict) else type(info).__name__
        raise ActorError("the actor's info lacks its value", leaf="info", expected="a dict with 'value'", found=found)
    leaves, tree = flatten(info)
    specs: list[ArraySpec] = []
    for path, x in zip(tree_paths(tree, "info"), leaves, strict=True):
        value = path == "info['value']"
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != (1, n) or (value and x.dim() != 2):
            want = f"[1, {n}]" if value else f"[1, {n}, ...]"
            what = "a leaf of the actor's info is misshapen"
            if value and isinstance(x, Tensor) and x.dim() > 2:
                what = "the actor's value must be one number a step and column: squeeze its last axis"
            raise ActorError(what, leaf=path, expected=want, found=_shape_text(x))
        specs.append(_spec_of(path, x, tuple(x.shape[2:])))
    return tree.unflatten(specs)


def _check_state(hx: Any, n: int) -> None:
    if hx is None:
        raise ActorError(
            "hx is None; return () if there is no recurrent state", leaf="hx", expected="tensors or ()", found="None"
        )
    leaves, tree = flatten(hx)
    for path, h in zip(tree_paths(tree, "hx"), leaves, strict=True):
        if not isinstance(h, Tensor) or h.dim() < 2 or h.shape[1] != n:
            raise ActorError(
                "recurrent state lacks its column axis", leaf=path, expected=f"[L, {n}, ...]", found=_shape_text(h)
            )


def _reset_all(actor: BaseActorModule, hx: Any, n: int, device: torch.device) -> Any:
    """`hx` with all columns reset; what a random initial state draws is the same at each call."""
    before = _shapes(hx)
    with undrawn(device):
        for j in range(n):
            hx = _ask(f"reset({j}, hx)", actor.reset, j, hx)
            if _shapes(hx) != before:
                raise ActorError(
                    "reset() must return the recurrent state, all columns of it, in the same structure",
                    leaf="hx",
                    expected=before,
                    found=_shapes(hx),
                )
    return hx


def _check_reset(initial: Any, again: Any) -> None:
    """All columns reset after the first step and after the second: the initial state both times."""
    leaves, tree = flatten(initial)
    for path, x, y in zip(tree_paths(tree, "hx"), leaves, flatten(again)[0], strict=True):
        if not same_values(x, y):
            raise ActorError(
                "reset() leaves something of an episode in the recurrent state; mind that hx[:, j] with a tensor j is "
                "a copy",
                leaf=path,
                expected="the initial state",
                found="another one after the second step than after the first",
            )


def _spec_of(path: str, x: Tensor, shape: tuple[int, ...]) -> ArraySpec:
    try:
        return ArraySpec(str(x.dtype).removeprefix("torch."), shape)
    except RecordError as e:
        raise ActorError("a dtype cannot be recorded; cast it", leaf=path, expected=e.expected, found=e.found) from e


def _shape_text(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _shapes(tree: Any) -> str:
    return str(optree.tree_map(_shape_text, tree))
