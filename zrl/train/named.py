"""Environments and actors by name: all that a learner can tell a worker of another host.

A name is never code, and what it leads to is in the hands of who starts the worker: a Gymnasium id, what `zrl.zoo` has,
or a module that the worker's own command line allows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from zrl.collect.actor import BaseActorModule
from zrl.collect.spaces import describe
from zrl.errors import ActorError, ConfigError, EnvError
from zrl.nodes.job import WorkerJob
from zrl.nodes.worker import Recipe, live
from zrl.protocol.messages import Welcome, printable
from zrl.train.allowed import ACTOR_NAME, ENV_NAME, Allowed, parsed_env


@dataclass(frozen=True)
class EnvFactory:
    """Makes a registered environment. Plain data, so that it may travel to other processes.

    Raises:
        EnvError: Gymnasium cannot make it.
    """

    env_id: str
    kwargs: Mapping[str, Any] | None = None

    def __call__(self) -> gym.Env[Any, Any]:
        try:
            # the checker costs a third of a CartPole step, and what it checks the recorder checks as well
            return gym.make(self.env_id, disable_env_checker=True, **(self.kwargs or {}))
        except Exception as e:
            hint = "" if not isinstance(e, gym.error.UnregisteredEnv) else "; list ids with gymnasium.pprint_registry()"
            if hint and ":" in self.env_id:
                module, _, name = self.env_id.partition(":")
                hint = f"; expected module:id, where importing {module} registers the id {name}; no function of it"
            given = f" with {dict(self.kwargs)}" if self.kwargs else ""
            raise EnvError(
                f"Gymnasium cannot make {self.env_id!r}{given} ({describe(e)}){hint}", env_index=-1, phase="factory"
            ) from e


def env_factory(text: str, allowed: Allowed) -> EnvFactory:
    """The factory for an environment as a learner names it: a Gymnasium id, or ``module:id``, and its arguments.

    Raises:
        ConfigError: no name, a module that is not allowed, or other arguments than here.
    """
    name, kwargs = parsed_env(text)
    match = ENV_NAME.fullmatch(name)
    if match and match["module"]:
        allowed.check(match["module"], "env")
    allowed.check_kwargs(kwargs)
    return EnvFactory(name, kwargs)


def make_named_actor(name: str, allowed: Allowed, factory: EnvFactory) -> BaseActorModule:
    """What ``module:function`` makes of the environment's spaces.

    Raises:
        ConfigError: no name, a module that is not allowed or not there, or no such function in it.
        EnvError: the environment cannot be made.
        ActorError: the function raised, or made no actor.
    """
    match = ACTOR_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"actor: expected module:function, not {printable(name)!r}")
    allowed.check(match["module"], "actor")
    make = _function(match["module"], match["function"])
    env = factory()
    try:
        actor = make(env.observation_space, env.action_space)
    except (ActorError, ConfigError):
        raise
    except Exception as e:
        raise ActorError(f"{name} raised {describe(e)}") from e
    finally:
        env.close()
    if not isinstance(actor, BaseActorModule):
        raise ActorError(f"{name} made no actor", expected="a zrl.BaseActorModule", found=type(actor).__name__)
    return actor


def _function(module: str, function: str) -> Callable[..., Any]:
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as e:
        raise ConfigError(f"actor: the module {module!r} cannot be imported: {e}") from e
    if not callable(found):
        raise ConfigError(f"actor: {module!r} has no function {function!r}")
    made: Callable[..., Any] = found
    return made


def work(allowed: Allowed, job: WorkerJob) -> None:
    """The life of a worker of `zrl worker`: environment and actor by the names in its Welcome."""

    def recipe(welcome: Welcome) -> Recipe:
        factory = env_factory(welcome.env, allowed)
        actor = make_named_actor(welcome.actor, allowed, factory)
        acting = actor.train(welcome.worker_mode == "train").requires_grad_(False)
        return Recipe(factory, acting)

    live(job, recipe)
