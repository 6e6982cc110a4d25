"""Atari games as stacks of small grey frames, made faster than by Gymnasium's two wrappers, and the same to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from zrl.data.fragment import Array
from zrl.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from ale_py import AtariEnv

HARMLESS = (OrderEnforcing, PassiveEnvChecker)  # what gymnasium.make puts around an environment: it may be passed by


class AtariFrames(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The last `stack_size` frames of an Atari game, uint8 ``[stack_size, screen_size, screen_size]``, oldest first.

    Observations, rewards, ends, infos and seeding are those of Gymnasium's ``FrameStackObservation(AtariPreprocessing(
    env, noop_max, frame_skip, screen_size, terminal_on_life_loss), stack_size)``, bit for bit. It is faster because it
    steps the emulator itself: `ale_py.AtariEnv` reads a whole screen in colour after every frame, which nobody looks
    at. Every observation is an array of its own.

    The steps are those of Machado et al. (2018), "Revisiting the Arcade Learning Environment": up to `noop_max` frames
    without an action after a reset; every action held for `frame_skip` frames; the pixelwise maximum of the last two of
    them, in grey, scaled down.

    Args:
        env: what ``gymnasium.make("ALE/Pong-v5", frameskip=1)`` gives, of any ``obs_type``. Other wrappers go around
            this one, since it calls the emulator behind their backs.
        noop_max: 0 for none.
        terminal_on_life_loss: a lost life terminates the episode. The next reset begins a new game all the same.

    Raises:
        ConfigError: another environment, a wrapper in between, frames skipped or actions continuous in the environment,
            or an argument out of its bounds.
        MissingExtraError: ale-py or OpenCV is not installed.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        *,
        noop_max: int = 30,
        frame_skip: int = 4,
        screen_size: int = 84,
        terminal_on_life_loss: bool = False,
        stack_size: int = 4,
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            noop_max=noop_max,
            frame_skip=frame_skip,
            screen_size=screen_size,
            terminal_on_life_loss=terminal_on_life_loss,
            stack_size=stack_size,
        )
        gym.Wrapper.__init__(self, env)
        for name, value, least in (
            ("noop_max", noop_max, 0),
            ("frame_skip", frame_skip, 1),
            ("screen_size", screen_size, 1),
            ("stack_size", stack_size, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, not {value}")
        # the emulator itself cannot be copied or pickled, the environment around it can
        self._atari = bare_atari(env, with_noop=noop_max > 0)
        self._noop_max = noop_max
        self._skip = frame_skip
        self._side = screen_size
        self._life_loss = terminal_on_life_loss
        self._depth = stack_size
        self._actions = list(self._atari._action_set)
        self._lives = 0
        # what is pooled: the screens after the last frame and after the one before it
        screen = self._atari.ale.getScreenDims()
        self._last: Array = np.zeros(screen, np.uint8)
        self._before: Array = np.zeros(screen, np.uint8)
        # a ring that holds every frame twice, `depth` apart: the newest `depth` of them always lie side by side
        self._frames: Array = np.zeros((2 * stack_size, screen_size, screen_size), np.uint8)
        self._at = 0
        self.observation_space = gym.spaces.Box(0, 255, (stack_size, screen_size, screen_size), np.uint8)
        _, cv2 = _packages()
        self._resize, self._area = cv2.resize, cv2.INTER_AREA

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        ale = self._atari.ale
        noops = int(self._atari.np_random.integers(1, self._noop_max + 1)) if self._noop_max else 0
        for _ in range(noops):
            ale.act(self._actions[0])
            info.update(self._info())
            if ale.game_over():
                _, info = self.env.reset(seed=seed, options=options)
        self._lives = ale.lives()
        ale.getScreenGrayscale(self._last)
        self._before.fill(0)
        self._push()
        self._frames[:] = self._frames[self._at]
        return self._stack(), info

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        ale, act = self._atari.ale, self._actions[action]
        reward, terminated, truncated = 0.0, False, False
        left = self._skip  # frames
        while left:
            reward += ale.act(act)
            left -= 1
            terminated, truncated = ale.game_over(with_truncation=False), ale.game_truncated()
            if self._life_loss:
                lives = ale.lives()
                terminated, self._lives = terminated or lives < self._lives, lives
            if terminated or truncated:
                break  # before the screen is read, as Gymnasium does it
            if left == 1:
                ale.getScreenGrayscale(self._before)
            elif left == 0:
                ale.getScreenGrayscale(self._last)
        self._push()
        return self._stack(), reward, terminated, truncated, self._info()

    def _info(self) -> dict[str, Any]:
        """What `ale_py.AtariEnv` says after a frame."""
        ale = self._atari.ale
        return {
            "lives": ale.lives(),
            "episode_frame_number": ale.getEpisodeFrameNumber(),
            "frame_number": ale.getFrameNumber(),
        }

    def _push(self) -> None:
        """The two screens pooled and scaled down, as the newest frame."""
        if self._skip > 1:
            np.maximum(self._last, self._before, out=self._last)
        at = self._at = (self._at + 1) % self._depth
        frame = self._frames[at]
        self._resize(self._last, (self._side, self._side), dst=frame, interpolation=self._area)
        self._frames[at + self._depth] = frame

    def _stack(self) -> Array:
        return self._frames[self._at + 1 : self._at + 1 + self._depth].copy()


def bare_atari(env: gym.Env[Any, Any], *, with_noop: bool) -> AtariEnv:
    """The Atari environment in `env`, if the emulator can be stepped behind the back of what is around it.

    Raises:
        ConfigError: it cannot.
    """
    ale_py, _ = _packages()
    inner = env
    while isinstance(inner, gym.Wrapper):
        if not isinstance(inner, HARMLESS):
            raise ConfigError(
                f"AtariFrames: it would pass by {type(inner).__name__}; put that around AtariFrames instead. To limit "
                "the length of episodes, the environment itself takes max_num_frames_per_episode"
            )
        inner = inner.env
    if not isinstance(inner, ale_py.AtariEnv):
        raise ConfigError(f"AtariFrames: expected an ale_py.AtariEnv, not {type(inner).__name__}")
    if inner._frameskip != 1:
        raise ConfigError(
            f"AtariFrames: it skips frames itself; make the environment with frameskip=1, not {inner._frameskip}"
        )
    if inner.continuous:
        raise ConfigError(
            "AtariFrames: continuous actions are not supported; make the environment with continuous=False"
        )
    if with_noop and inner.get_action_meanings()[0] != "NOOP":
        raise ConfigError(f"noop_max: the first action is {inner.get_action_meanings()[0]}, not NOOP; give noop_max=0")
    return inner


def make_atari(
    env_id: str = "ALE/Pong-v5",
    *,
    render_mode: str | None = None,
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    terminal_on_life_loss: bool = False,
    stack_size: int = 4,
    **kwargs: Any,
) -> AtariFrames:
    """An Atari game as `AtariFrames`; registered as ``zrl/Atari-v0``. `kwargs` are arguments of the game itself.

    Raises:
        ConfigError: as `AtariFrames`.
        MissingExtraError: ale-py or OpenCV is not installed.
    """
    ale_py, _ = _packages()
    gym.register_envs(ale_py)
    return AtariFrames(
        gym.make(env_id, disable_env_checker=True, frameskip=1, render_mode=render_mode, **kwargs),
        noop_max=noop_max,
        frame_skip=frame_skip,
        screen_size=screen_size,
        terminal_on_life_loss=terminal_on_life_loss,
        stack_size=stack_size,
    )


def _packages() -> tuple[Any, Any]:
    """ale_py and cv2."""
    try:
        import ale_py
        import cv2
    except ImportError as e:
        raise MissingExtraError("Atari games need ale-py and OpenCV: pip install 'zrl[atari]'") from e
    return ale_py, cv2
