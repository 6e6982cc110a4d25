"""A look at an environment before a run: what of it is recorded, what that costs, and what speaks against it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

import gymnasium as gym
import torch
from gymnasium.utils.env_checker import check_env

from zrl.collect.actor import BaseActorModule
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.collect.envs import shorten
from zrl.collect.spaces import describe, make_env, probe_env, reset_env
from zrl.config import TrainConfig
from zrl.data.fragment import Slot
from zrl.data.spec import ArraySpec, FragmentSpec, flatten, tree_paths
from zrl.errors import ActorError, EnvError, RecordError
from zrl.nodes.buffers import HostBuffers
from zrl.rollout import same
from zrl.train.allowed import Allowed
from zrl.train.named import EnvFactory, make_named_actor
from zrl.train.rollouts import SLOTS

SECONDS = 1.0  # of each measurement
N_ACTIONS = 256  # random ones, drawn before the measurement

#: What to do about a refusal, by the phase in which an environment failed.
_HINTS = {
    "factory": "make it with gymnasium.make in a Python shell to see more; --env-kwargs has arguments for it",
    "spaces": "put a wrapper around it (gymnasium.ObservationWrapper) whose spaces have fixed shapes",
    "reset": "let reset() return what the observation space says, or correct the space",
    "step": "let step() return (obs, reward, terminated, truncated, info), the reward as one finite number",
}


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """One array of a fragment: its shape ``[rows, B, ...]``, and bytes of one row of all columns, and of all rows."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    row_nbytes: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """What speaks against an environment, and what to do about it; `refused`: a run would not begin."""

    text: str
    hint: str
    refused: bool


@dataclasses.dataclass
class Report:
    """What `check` found. What could not be found out is None or empty.

    Attributes:
        env, env_kwargs: what was looked at.
        autoreset: how a vector environment resets; empty for plain ones.
        max_episode_steps: time limit that its registration states.
        n_envs, n_steps, workers, n_slots: the set-up: columns of a batch, T, worker processes, slots of all of them.
        leaves: arrays of a fragment; without an actor those of the environment alone.
        slot_nbytes, slots_nbytes, batches_nbytes: of one slot, of all slots, of the batch buffers.
        actor: class of the actor; n_parameters: its numbers to train.
        env_steps_per_s, steps_per_s: of the environment alone, and with the actor, in one process.
        problems: the refusals of zrl, and hints; gymnasium: what Gymnasium's own checker says.
    """

    env: str
    env_kwargs: Mapping[str, Any]
    n_envs: int
    n_steps: int
    workers: int
    n_slots: int
    observation_space: str = ""
    action_space: str = ""
    autoreset: str = ""
    max_episode_steps: int | None = None
    leaves: list[LeafSize] = dataclasses.field(default_factory=list)
    slot_nbytes: int = 0
    slots_nbytes: int = 0
    batches_nbytes: int = 0
    actor: str = ""
    n_parameters: int | None = None
    env_steps_per_s: float | None = None
    steps_per_s: float | None = None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    gymnasium: list[str] = dataclasses.field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether a run would not begin."""
        return any(problem.refused for problem in self.problems)

    @property
    def columns(self) -> int:
        """B, environments of one worker."""
        return self.n_envs // max(1, self.workers)

    def refuse(self, e: RecordError) -> None:
        """Note an error that would end a run before its first step."""
        hint = _HINTS[e.phase] if isinstance(e, EnvError) else "write an actor of your own: --actor module:function"
        self.problems.append(Problem(str(e), hint, refused=True))

    def hint(self, text: str, hint: str) -> None:
        self.problems.append(Problem(text, hint, refused=False))


def check(
    config: TrainConfig,
    *,
    slots: int = SLOTS,
    steps: int | None = None,
) -> Report:
    """Look at the environment of a config, in this process, without an update.

    Args:
        config: environment, actor, ``n_envs``, ``n_steps`` and ``workers`` count.
        slots: of each worker.
        steps: of each measurement; as many as fit into a second, if None.

    Raises:
        ConfigError: a setting makes no sense, or there is no such actor.
    """
    config = config.resolved(0)
    assert config.n_envs is not None
    assert config.n_steps is not None
    n_slots = slots * config.workers if config.workers else same.N_SLOTS
    report = Report(config.env, dict(config.env_kwargs or {}), config.n_envs, config.n_steps, config.workers, n_slots)
    factory = EnvFactory(config.env, report.env_kwargs)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with _warnings_into(report.gymnasium):
            env = _make(factory, report)
        if env is not None:
            with contextlib.closing(env):
                try:
                    _look(env, factory, config, report, steps)
                except RecordError as e:
                    report.refuse(e)
            _gymnasium_says(factory, report)
    finally:
        torch.set_num_threads(threads)
    return report


def _make(factory: EnvFactory, report: Report) -> Any:
    """An environment, or None with the reason in the report."""
    try:
        return make_env(factory, 0, -1)
    except EnvError as e:
        report.autoreset = _autoreset(factory)
        if report.autoreset:
            report.problems.append(
                Problem(
                    "only a vector environment: zrl cannot collect from those yet",
                    "register a plain one (entry_point); --envs of them are stepped side by side",
                    refused=True,
                )
            )
        else:
            report.refuse(e.__cause__ if isinstance(e.__cause__, EnvError) else e)
    return None


def _autoreset(factory: EnvFactory) -> str:
    """The autoreset mode of an id that has a vector environment only; empty otherwise."""
    try:
        spec = gym.spec(factory.env_id)
        if spec.entry_point is not None or spec.vector_entry_point is None:
            return ""
        with contextlib.closing(
            gym.make_vec(factory.env_id, 2, vectorization_mode="vector_entry_point", **(factory.kwargs or {}))
        ) as envs:
            mode = envs.metadata.get("autoreset_mode")
            return str(getattr(mode, "value", mode or "unknown"))
    except Exception:  # whatever keeps it from being made was told by the one who asked for a plain one
        return ""


def _look(env: Any, factory: EnvFactory, config: TrainConfig, report: Report, steps: int | None) -> None:
    """Spaces, leaves, actor and speed, until something is refused."""
    report.observation_space = _one_line(getattr(env, "observation_space", None))
    report.action_space = _one_line(getattr(env, "action_space", None))
    report.max_episode_steps = env.spec.max_episode_steps if env.spec is not None else None
    if report.max_episode_steps is None:
        report.hint(
            "no time limit is stated: an episode that never ends has no return",
            "if its episodes do not end by themselves: --env-kwargs '{\"max_episode_steps\": 1000}'",
        )
    layout = probe_env(env, None, seed=0, may_step=True)
    specs, tree = flatten(layout.obs)
    for path, spec in zip(tree_paths(tree, "state.obs"), specs, strict=True):
        if spec.dtype in ("float64", "complex128"):
            report.hint(
                f"{path} is {spec.dtype}: twice the memory, and twice the bytes to copy",
                "gymnasium.wrappers.DtypeObservation(env, numpy.float32)",
            )
    act = _action_specs(layout.act)
    _sizes(report, FragmentSpec.build(report.n_steps, report.columns, obs=layout.obs, act=act, actor={}))
    report.env_steps_per_s = _env_speed(env, steps)
    try:
        actor = make_named_actor(config.actor, Allowed(None), factory)
    except ActorError as e:
        report.refuse(e)
        return
    report.actor = type(actor).__name__
    report.n_parameters = sum(p.numel() for p in actor.parameters())
    said: list[str] = []
    with _warnings_into(said):
        ctx = _ready(factory, actor, report, steps)
        with contextlib.closing(ctx.columns):
            _sizes(report, ctx.spec.with_steps(report.n_steps))
            report.steps_per_s = _speed(ctx, steps)
    for text in said:
        report.hint(text, "")


def _action_specs(spaces: Any) -> Any:
    """The tree of `ArraySpec` of actions as the action space states them; an actor may give other widths."""
    leaves, tree = flatten(spaces)
    return tree.unflatten([ArraySpec(str(s.dtype), tuple(s.shape)) for s in leaves])


def _sizes(report: Report, spec: FragmentSpec) -> None:
    """What a fragment is made of, and the memory for the whole set-up."""
    b = spec.n_columns
    report.leaves = [
        LeafSize(x.path, x.dtype, x.full_shape(b), x.nbytes(b) // x.rows, x.nbytes(b)) for x in spec.leaves if x.rows
    ]
    report.slot_nbytes = spec.nbytes
    report.slots_nbytes = report.n_slots * spec.nbytes
    n_batches = HostBuffers.n_buffers if report.workers else 0  # in this process the slots are the batches
    report.batches_nbytes = n_batches * spec.with_columns(report.n_envs).nbytes
    needed, there = report.slots_nbytes + report.batches_nbytes, _physical_nbytes()
    if there and needed > there and not any("memory of this machine" in p.text for p in report.problems):
        report.hint(
            f"{needed:,} bytes are more than the memory of this machine, {there:,}",
            "fewer --envs, --n-steps or --slots",
        )


def _physical_nbytes() -> int:
    """Of this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _env_speed(env: Any, steps: int | None) -> float:
    """Steps a second of one environment with random actions, its resets included."""
    actions = [env.action_space.sample() for _ in range(N_ACTIONS)]
    reset_env(env, -1, 0)
    shorten(env)  # as in a run
    n, began = 0, perf_counter()
    while _goes_on(n, began, steps):
        try:
            _, _, terminated, truncated, _ = env.step(actions[n % N_ACTIONS])
        except Exception as e:
            raise EnvError(f"step raised {describe(e)}", env_index=-1, phase="step") from e
        n += 1
        if terminated or truncated:
            reset_env(env, -1)
    return n / (perf_counter() - began)


def _ready(factory: EnvFactory, actor: BaseActorModule, report: Report, steps: int | None) -> Context:
    """Environments and actor as a worker has them; fragments no longer than a measurement."""
    most = steps if steps is not None else int((report.env_steps_per_s or 0.0) * SECONDS)
    n_steps = min(report.n_steps, max(1, most // report.columns))
    acting = actor.train().requires_grad_(False)
    return build(factory, acting, CollectOptions(n_steps=n_steps, n_columns=report.columns))


def _speed(ctx: Context, steps: int | None) -> float:
    """Steps a second of all columns, as a worker makes them."""
    slot = Slot(ctx.spec)
    collect(ctx, slot)  # the first one finds caches cold
    n, began = 0, perf_counter()
    while _goes_on(n, began, steps):
        collect(ctx, slot)
        n += ctx.spec.n_steps * ctx.spec.n_columns
    return n / (perf_counter() - began)


def _goes_on(n: int, began: float, steps: int | None) -> bool:
    return perf_counter() - began < SECONDS if steps is None else n < steps


def _gymnasium_says(factory: EnvFactory, report: Report) -> None:
    """What Gymnasium's own checker has to say, without its look at render modes: that would open windows."""
    with _warnings_into(report.gymnasium):
        try:
            with contextlib.closing(factory()) as env:
                check_env(env.unwrapped, skip_render_check=True)
        except Exception as e:
            text = str(e) if isinstance(e, AssertionError) and str(e) else describe(e)
            report.gymnasium.append(_plain(text))


@contextlib.contextmanager
def _warnings_into(texts: list[str]) -> Iterator[None]:
    """The text of every warning, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            said = [_plain(str(w.message)) for w in caught]
            texts.extend(text for text in dict.fromkeys(said) if text not in texts)


def _one_line(x: Any) -> str:
    return " ".join(str(x).split())


def _plain(text: str) -> str:
    """Without colours, and without what Gymnasium puts before a warning."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).removeprefix("WARN: ").strip()
