"""The numbers behind the plots: curves over environment steps of one run, and of groups of runs that differ in seed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zrl.config import ALGO_DEFAULTS, TrainConfig
from zrl.errors import ConfigError
from zrl.train.run_folder import RunFolder

Array = npt.NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]
GRID = 400  # points of a curve: more than there are pixels to tell them apart
NOT_COMPARED = ("seed", "runs")  # settings in which the runs of one group may differ


class Curve(NamedTuple):
    """Values over environment steps, both ``[n]``, steps increasing."""

    steps: Array
    values: Array


class Band(NamedTuple):
    """Mean over runs, and what is drawn around it: ``[n]`` each."""

    steps: Array
    mean: Array
    low: Array
    high: Array


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of a run, with the defaults of those it does not state, and the rows of its metrics."""

    settings: Mapping[str, Any]
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, and a label that says how they differ from other groups."""

    label: str
    runs: Sequence[Run]

    def curves(self, key: str, over: str = "step") -> list[Curve]:
        """One a run, without those that have no such values."""
        return [c for run in self.runs if len((c := curve(run.rows, over, key)).steps)]


def load(path: Path) -> Run:
    """A run from its folder; of settings this version does not know nothing is required.

    Raises:
        ConfigError: no run folder, a config that cannot be read, or no metrics.
    """
    folder = RunFolder.open(path)
    file = folder.path / "config.json"
    try:
        settings = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(f"{str(file)!r} cannot be read: {e}") from e
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    rows = [row for row in folder.metrics() if isinstance(row, dict)]
    if not any(_number(row.get("step")) for row in rows):
        raise ConfigError(
            f"{str(path)!r} has no metrics to plot: metrics.jsonl gets its first line with the first update"
        )
    return Run({**defaults, **settings}, still_true([_renamed(row) for row in rows]))


def _renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with the names of today: the learner's training was called ``learn`` once."""
    return {"time/train" if key == "time/learn" else key: x for key, x in row.items()}


def still_true(rows: Rows) -> Rows:
    """Without the rows that a run has left behind when it was resumed from an earlier step: steps increase."""
    kept: list[Mapping[str, Any]] = []
    first = behind = math.inf  # least step of those that are kept; step of the row behind this one
    for row in reversed(rows):
        step = row.get("step")
        if step is None or step < first or step == first == behind:  # an evaluation at the end has a row of its own
            kept.append(row)
            first = first if step is None else step
        behind = behind if step is None else step
    return kept[::-1]


def curve(rows: Rows, x: str, y: str) -> Curve:
    """``y`` over ``x``, in the order of x; of rows with the same x the last one counts."""
    points = {row[x]: row[y] for row in rows if _number(row.get(x)) and _number(row.get(y))}
    steps = sorted(points)
    return Curve(np.array(steps, float), np.array([points[s] for s in steps], float))


def condensed(c: Curve, how: Callable[[Array], Any] = np.mean, most: int = GRID) -> Curve:
    """The same with at most `most` points: `how` over stretches of equally many."""
    if len(c.steps) <= most:
        return c
    parts = [np.array_split(a, most) for a in c]
    return Curve(np.array([x.mean() for x in parts[0]]), np.array([how(x) for x in parts[1]], float))


def common_grid(curves: Sequence[Curve], n: int = GRID) -> Array:
    """Steps that all curves cover; empty, if there are none."""
    low = max((c.steps[0] for c in curves), default=0.0)
    high = min((c.steps[-1] for c in curves), default=0.0)
    return np.linspace(low, high, n) if low < high else np.array([])


def on(grid: Array, curves: Sequence[Curve]) -> Array:
    """Curves on one grid, ``[n_curves, n]``."""
    return np.array([np.interp(grid, c.steps, c.values) for c in curves])


def mean_and_std(curves: Sequence[Curve]) -> Band | None:
    """Mean over runs ± one standard deviation of the sample, over the steps that all of them cover, if there are any.

    A single curve is left as it is.
    """
    if len(curves) == 1:
        (steps, values) = curves[0]
        return Band(steps, values, values, values)
    grid = common_grid(curves)
    if not len(grid):
        return None
    values = on(grid, curves)
    mean, std = values.mean(0), values.std(0, ddof=1)
    return Band(grid, mean, mean - std, mean + std)


def extremes(group: Group, low: str, mean: str, high: str) -> Band | None:
    """Mean of `mean` over the runs, between the least of `low` and the greatest of `high`."""
    wanted: tuple[tuple[str, Callable[[Array], Any]], ...] = ((mean, np.mean), (low, np.min), (high, np.max))
    curves = {key: [condensed(c, how) for c in group.curves(key)] for key, how in wanted}
    grid = common_grid([c for some in curves.values() for c in some])
    if not len(grid) or not all(curves.values()):
        return None
    return Band(grid, on(grid, curves[mean]).mean(0), on(grid, curves[low]).min(0), on(grid, curves[high]).max(0))


def shares(group: Group, keys: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """Shares of the time over steps, mean over the runs, without keys that no run has; without steps, if none has."""
    every = {key: [condensed(c) for c in group.curves(key)] for key in keys}
    curves = {key: some for key, some in every.items() if some}
    grid = common_grid([c for some in curves.values() for c in some])
    return (grid, {key: on(grid, some).mean(0) for key, some in curves.items()}) if len(grid) else (grid, {})


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ only in `NOT_COMPARED` together, in the order in which they came."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        compared = {key: x for key, x in run.settings.items() if key not in NOT_COMPARED}
        together.setdefault(json.dumps(compared, sort_keys=True, default=str), []).append(run)
    groups = list(together.values())
    names = differing([some[0].settings for some in groups])
    return [Group(_label(some, names), some) for some in groups]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings in which not all are alike, environment and algorithm first.

    What each has from the defaults of its algorithm goes without saying.
    """
    said = [_without_defaults(s) for s in settings]
    every = dict.fromkeys(["env", "algo", *(key for s in settings for key in s)])
    return [key for key in every if key not in NOT_COMPARED and any(s.get(key) != said[0].get(key) for s in said)]


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults = ALGO_DEFAULTS.get(settings.get("algo", ""), {})
    return {key: None if key in defaults and x == defaults[key] else x for key, x in settings.items()}


def title(runs: Sequence[Run]) -> str:
    """Environment and algorithm, as far as all runs share them."""
    differ = differing([run.settings for run in runs])
    shared = [str(runs[0].settings[key]) for key in ("env", "algo") if key not in differ]
    if len(runs) == 1:
        shared.append(f"seed {runs[0].settings['seed']}")
    return ", ".join(shared) or f"{len(runs)} runs"


def _label(runs: Sequence[Run], names: Sequence[str]) -> str:
    settings = runs[0].settings
    parts = [
        str(settings.get(name)) if name in ("env", "algo") else f"{name}\u00a0{_value(settings.get(name))}"
        for name in names
    ]
    count = f"{len(runs)}\u00a0runs" if len(runs) > 1 else ""
    return ", ".join(parts) + (f" ({count})" if parts and count else count)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _value(x: Any) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)
