"""Videos of an environment; needs the extra ``video``."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gymnasium as gym
import numpy as np

from zrl.collect.spaces import describe
from zrl.errors import ConfigError, MissingExtraError, PreflightError, ZrlError
from zrl.train.named import EnvFactory

MODE = "rgb_array"
DEFAULT_FPS = 30.0  # where the environment's metadata does not say

#: Arguments of the encoder by suffix. A GIF gets a palette for each frame: one for all would have to wait for the last.
_ENCODERS: dict[str, dict[str, Any]] = {
    ".mp4": {},
    ".gif": {
        "codec": "gif",
        "quality": None,
        "pix_fmt_out": "pal8",
        "output_params": [
            "-filter_complex",
            "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1",
        ],
    },
}


class Film:
    """Frames, written into a video as they come. A context manager: the file is there once it was left in peace.

    Args:
        target: ``.mp4`` or ``.gif``; folders on the way are made.
        fps: frames a second.

    Raises:
        ConfigError: another suffix, or a file that cannot be written.
        MissingExtraError: imageio-ffmpeg is not installed.
    """

    def __init__(self, target: Path, fps: float) -> None:
        if target.suffix.lower() not in _ENCODERS:
            raise ConfigError(f"video: expected a file that ends with {' or '.join(_ENCODERS)}, not {str(target)!r}")
        try:
            import imageio_ffmpeg  # type: ignore[import-untyped]
        except ImportError as e:
            raise MissingExtraError("videos need imageio with ffmpeg: pip install 'zrl[video]'") from e
        self._encode = imageio_ffmpeg.write_frames
        self._target, self._fps = target, fps
        self._part = target.with_name(f".{target.stem}.part{target.suffix.lower()}")
        self._frames: Generator[None, Any, None] | None = None
        self._problem: OSError | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
        except OSError as e:
            raise ConfigError(f"video: cannot write {str(target)!r}: {e}") from e

    def write(self, frame: np.ndarray[Any, Any]) -> None:
        """Add one frame, uint8 ``[H, W, 3]``, of the same size as all others."""
        if self._problem is not None:
            return
        height, width, _ = frame.shape
        # half of the colours' resolution is what players expect of H.264: even sizes only
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        try:
            if self._frames is None:
                size = (even.shape[1], even.shape[0])
                how = _ENCODERS[self._part.suffix]
                self._frames = self._encode(str(self._part), size, fps=self._fps, macro_block_size=1, **how)
                next(self._frames)
            self._frames.send(np.ascontiguousarray(even))
        except OSError as e:  # raised on leaving: here it would look like an error of the environment
            self._problem = e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._frames is not None:
            self._frames.close()
        try:
            if kind is None and self._problem is None and self._part.stat().st_size:
                self._part.replace(self._target)
                return
        except OSError as e:
            self._problem = e
        self._part.unlink(missing_ok=True)
        if kind is None:
            why = str(self._problem or "no frames").splitlines()[0]
            raise ZrlError(f"cannot write the video {str(self._target)!r}: {why}; is the disk full?")


class Filmed(gym.Wrapper[Any, Any, Any, Any]):
    """Films every step, beginning with the observation of the last reset before the first one."""

    def __init__(self, env: gym.Env[Any, Any], film: Film) -> None:
        super().__init__(env)
        self._film = film
        self._first: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        self._first = self.env.render()
        return result

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        if self._first is not None:
            self._film.write(self._first)
            self._first = None
        self._film.write(_frame(self.env.render()))
        return result


def make_with_pictures(factory: EnvFactory, modes: list[str]) -> gym.Env[Any, Any]:
    """The environment with the render mode ``rgb_array``, after a look at its first picture.

    Args:
        factory: names it.
        modes: render modes that the environment says it has.

    Raises:
        PreflightError: it has no such mode, or rendering fails.
        MissingExtraError: it draws with a package that is not installed.
    """
    env_id = factory.env_id
    if MODE not in modes:
        raise PreflightError(
            f"video: {env_id} has no render mode {MODE!r}, only {', '.join(modes) or 'none at all'}; play it without a "
            f"video, or give the environment one: 'render_modes' in its metadata, and a render() that returns uint8 "
            "[H, W, 3]"
        )
    env: gym.Env[Any, Any] | None = None
    try:
        env = gym.make(env_id, disable_env_checker=True, **{**(factory.kwargs or {}), "render_mode": MODE})
        env.reset()
        _frame(env.render())
    except Exception as e:
        if env is not None:
            env.close()
        if isinstance(e, (gym.error.DependencyNotInstalled, ImportError)):
            raise MissingExtraError(f"video: {env_id} cannot be drawn: {e}") from e
        raise PreflightError(f"video: {env_id} cannot be drawn: {describe(e)}") from e
    return env


def fps_of(env: gym.Env[Any, Any]) -> float:
    """Frames a second, as the environment's metadata says."""
    fps = env.metadata.get("render_fps")
    return float(fps) if isinstance(fps, (int, float)) and fps > 0 else DEFAULT_FPS


def _frame(x: Any) -> np.ndarray[Any, Any]:
    """A picture, if it is one."""
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 3:
        found = f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"render() must return uint8 [H, W, 3], not {found}")
    return x
