"""What an actor gives: its outputs are looked at once, on a scratch observation, before anything is collected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import optree
import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule
from zrl.collect.spaces import EnvLayout, describe
from zrl.collect.streams import undrawn
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
    """The a_{-1} of the first row, one value a leaf: zeros; ``start`` for a shifted Discrete."""
    leaves, specs = flatten(spaces)[0], flatten(act)[0]
    starts = [s.start if isinstance(s, gym.spaces.Discrete) else 0 for s in leaves]
    return [np.full(spec.shape, start, spec.dtype) for spec, start in zip(specs, starts, strict=True)]


def probe_actor(actor: BaseActorModule, layout: EnvLayout, n_columns: int, device: torch.device) -> ActorLayout:
    """Run the actor on one row and find what it returns, by leaf.

    Its random streams are left as they were. The initial recurrent state is what ``forward`` returns for
    ``hx=None`` with every column reset.

    Raises:
        ActorError: not an actor, an exception in it, a missing or misshapen ``value``, actions that do not fit the
            action
            space, recurrent state without a column axis, or inputs that were written to.
    """
    if not isinstance(actor, BaseActorModule):
        raise ActorError("not an actor", expected="a zrl.BaseActorModule", found=type(actor).__name__)
    inputs = _example_inputs(layout, n_columns, device)
    kept = map_leaves(torch.clone, inputs)
    with undrawn(device), torch.inference_mode():
        actions, hx, info = _call(actor, inputs, None)
        check_untouched(inputs, kept)
        act = _action_specs(actions, layout.act, n_columns)
        infos = _info_specs(info, n_columns)
        initial = _initial(actor, hx, n_columns)
        kept_hx = map_leaves(torch.clone, initial)
        _, again, _ = _call(actor, inputs, initial)
        check_untouched((initial,), (kept_hx,), names=("hx",))
        if _shapes(again) != _shapes(initial):
            raise ActorError(
                "the recurrent state changes its shape", leaf="hx", expected=_shapes(initial), found=_shapes(again)
            )
        value = actor.value(*inputs, initial)
        if not isinstance(value, Tensor) or tuple(value.shape) != (1, n_columns):
            raise ActorError("value() is misshapen", expected=f"[1, {n_columns}]", found=_shape_text(value))
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


def check_untouched(inputs: Any, kept: Any, names: Sequence[str] = ("obs", "act", "rew", "fin")) -> None:
    """Compare what the actor was given with the copies made before.

    Raises:
        ActorError: it wrote into one of them.
    """
    for name, now, before in zip(names, inputs, kept, strict=True):
        leaves, tree = flatten(now)
        for path, x, y in zip(tree_paths(tree, name), leaves, flatten(before)[0], strict=True):
            if not _same(x, y):
                raise ActorError(
                    "the actor changed its inputs in place; it must allocate what it returns",
                    leaf=path,
                    expected="the values it was given",
                    found="others",
                )


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    return torch.equal(x, y) or bool(torch.isclose(x, y, rtol=0.0, atol=0.0, equal_nan=True).all())


def _example_inputs(layout: EnvLayout, n: int, device: torch.device) -> Inputs:
    specs, tree = flatten(layout.obs)
    leaves = tree.flatten_up_to(layout.example)
    obs = [_columns_of(np.asarray(x, dtype=s.dtype), n, device) for x, s in zip(leaves, specs, strict=True)]
    spaces, act_tree = optree.tree_flatten(layout.act)
    # as an actor would sample them: torch's integers and floats, whatever width the space has
    specs = [ArraySpec("float32" if np.dtype(s.dtype).kind == "f" else "int64", tuple(s.shape)) for s in spaces]
    acts = [_columns_of(x, n, device) for x in first_actions(spaces, specs)]
    rew = torch.zeros(1, n, device=device)
    return tree.unflatten(obs), act_tree.unflatten(acts), rew, torch.ones(1, n, dtype=torch.bool, device=device)


def _columns_of(x: Any, n: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([x] * n)[None]).to(device)


def _call(actor: BaseActorModule, inputs: Inputs, hx: Any) -> tuple[Any, Any, Any]:
    try:
        result = actor.step(*inputs, hx)
    except Exception as e:
        raise ActorError(f"the actor raised {describe(e)} on the first observation") from e
    if not isinstance(result, tuple) or len(result) != 3:
        raise ActorError(
            "step() and forward() must return three things", expected="(actions, hx, info)", found=type(result).__name__
        )
    return result


def _action_specs(actions: Any, spaces: Any, n: int) -> Any:
    """One `ArraySpec` a leaf of the action space, dtype as sampled."""
    space_leaves, tree = optree.tree_flatten(spaces)
    try:
        leaves = tree.flatten_up_to(actions)
    except (ValueError, TypeError) as e:
        raise ActorError(
            "actions are not nested like the action space", leaf="state.act", expected=str(spaces), found=str(e)
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
        if not isinstance(space, gym.spaces.Box) and not all(space.contains(a) for a in x[0].cpu().numpy()):
            raise ActorError(
                "an action is outside of its space", leaf=path, expected=str(space), found=str(x[0].tolist())
            )
        specs.append(_spec_of(path, x, tuple(space.shape)))
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
            raise ActorError("a leaf of the actor's info is misshapen", leaf=path, expected=want, found=_shape_text(x))
        specs.append(_spec_of(path, x, tuple(x.shape[2:])))
    return tree.unflatten(specs)


def _initial(actor: BaseActorModule, hx: Any, n: int) -> Any:
    leaves, tree = flatten(hx)
    for path, h in zip(tree_paths(tree, "hx"), leaves, strict=True):
        if not isinstance(h, Tensor) or h.dim() < 2 or h.shape[1] != n:
            raise ActorError(
                "recurrent state lacks its column axis", leaf=path, expected=f"[L, {n}, ...]", found=_shape_text(h)
            )
    for j in range(n):
        hx = actor.reset(j, hx)
    if [tuple(h.shape) for h in flatten(hx)[0]] != [tuple(h.shape) for h in leaves]:
        raise ActorError(
            "reset() changed the shape of the recurrent state", leaf="hx", expected=_shapes(leaves), found=_shapes(hx)
        )
    return hx


def _spec_of(path: str, x: Tensor, shape: tuple[int, ...]) -> ArraySpec:
    try:
        return ArraySpec(str(x.dtype).removeprefix("torch."), shape)
    except RecordError as e:
        raise ActorError("a dtype cannot be recorded; cast it", leaf=path, expected=e.expected, found=e.found) from e


def _shape_text(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _shapes(tree: Any) -> str:
    return str(optree.tree_map(_shape_text, tree))
