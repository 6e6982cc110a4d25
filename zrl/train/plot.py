"""Figures of one run, or of several to compare; needs the extra ``plot``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zrl.errors import ConfigError, MissingExtraError
from zrl.train.curves import (
    Curve,
    Group,
    Rows,
    Run,
    condensed,
    extremes,
    grouped,
    load,
    mean_and_std,
    shares,
    still_true,
    title,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
DPI = 130
LABEL_WIDTH = 30  # characters of a line of a legend
TICK_WIDTH = 24  # and of a label beside a bar
MOST_BANDS = 3  # that can be told apart where they overlap
RECENT, UPDATE = "mean of the last 100 episodes", "episodes of one update"
LAG = ("lag/min", "lag/mean", "lag/max")

#: Keys of shares of time: what they are called, and their colour; stacked in this order.
STAGES = {
    "time/env": ("step environments", "#4477aa"),
    "time/actor": ("act", "#ee6677"),
    "time/write": ("write the record", "#ccbb44"),
    "time/reset": ("reset", "#66ccee"),
    "time/wait": ("wait", "#dddddd"),
    "time/gather": ("gather batches", "#66ccee"),
    "time/train": ("train", "#228833"),
    "time/publish": ("publish weights", "#aa3377"),
    "time/wait_learner": ("wait", "#dddddd"),
}
WORKER, LEARNER = tuple(STAGES)[:5], tuple(STAGES)[5:]


def plot_runs(paths: Sequence[Path], targets: Sequence[Path]) -> None:
    """One figure of run folders, into each of `targets`: return, lag, and where the time went, as far as it is known.

    Runs that differ in nothing but their seed are one group: their mean, and ± one standard deviation around it.

    Raises:
        ConfigError: no run folder, no metrics in it, or a target that cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    runs = [load(path) for path in paths]
    figure = _figure(grouped(runs), title(runs))
    for target in targets:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, dpi=DPI)
        except OSError as e:
            raise ConfigError(f"out: cannot write {str(target)!r}: {e}") from e


def plot_return(metrics: Rows, title: str, target: Path, goal: float | None = None) -> None:
    """The return of one run over environment steps.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    run = Run({"stop_at_return": goal}, still_true(metrics))
    figure = _empty_figure(4.0)
    axes = figure.add_subplot(title=title)
    _draw_returns(axes, [Group("", [run])])
    _label_steps(axes)
    figure.savefig(target, dpi=DPI)


def _empty_figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtraError("plots need matplotlib: pip install 'zrl[plot]'") from e
    return Figure(figsize=(WIDTH, height), layout="constrained")


Draw = Callable[["Axes", Sequence[Group]], None]
Panel = tuple[Draw, float, bool]  # how to draw it, its height in inches, and whether it is over steps


def _figure(groups: Sequence[Group], title: str) -> Figure:
    """All panels that there are numbers for, one below the other."""
    panels = _panels(groups)
    heights = [height for _, height, _ in panels]
    figure = _empty_figure(0.7 + sum(heights))
    figure.suptitle(title, fontsize="large", fontweight="bold")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    over_steps = [axes for axes, (_, _, steps) in zip(every, panels, strict=True) if steps]
    for axes in over_steps[1:]:
        axes.sharex(over_steps[0])
    for axes, (draw, _, _) in zip(every, panels, strict=True):
        draw(axes, groups)
    for axes in over_steps[:-1]:
        axes.tick_params(labelbottom=False)
    _label_steps(over_steps[-1])
    return figure


def _panels(groups: Sequence[Group]) -> list[Panel]:
    """What there is to draw."""
    lines = sum(len(_wrapped(group.label).splitlines()) for group in groups)
    panels: list[Panel] = [(_draw_returns, max(3.4, 0.8 + 0.22 * lines), True)]
    if any(extremes(group, *LAG) for group in groups):
        panels.append((_draw_lag, 1.6, True))
    for who, stages in (("a worker", WORKER), ("the learner", LEARNER)):
        if any(shares(group, stages)[1] for group in groups):
            panels.append(_stack(who, stages) if len(groups) == 1 else _bars(who, stages, groups))
    return panels


def _draw_returns(axes: Axes, groups: Sequence[Group]) -> None:
    alone = len(groups) == 1
    played = 0
    for group, colour in zip(groups, _colours(len(groups)), strict=True):
        recent, updates = group.curves("return_100"), group.curves("return_update")
        label = RECENT if alone else group.label
        if not recent:  # too few episodes for a mean over 100
            recent, label = updates, UPDATE if alone else f"{label}: {UPDATE}"
        elif alone and len(group.runs) == 1:
            for c in updates:
                axes.plot(*condensed(c, most=1000), color=colour, alpha=0.3, linewidth=1, label=UPDATE)
        _draw_mean(axes, recent, label, colour)
        points = group.curves("eval_mean", over="eval_step")
        played += len(points)
        for c in points:
            axes.plot(*c, "D", color=colour, markersize=5, markeredgecolor="white")
    if played:
        axes.plot([], [], "D", color="C0" if alone else "grey", markersize=5, label="evaluation, greedy")
    every = (run.settings.get("stop_at_return") for group in groups for run in group.runs)
    for goal in sorted({goal for goal in every if goal is not None}):
        axes.axhline(goal, linestyle="--", linewidth=1, color="grey", label=f"goal: {goal:g}")
    axes.set_ylabel("return of an episode")
    notes = [f"{groups[0].label}:"] * bool(groups[0].label) if alone else [f"{RECENT}:"]
    if any(len(group.runs) > 1 for group in groups):
        notes.append("band: ± one standard deviation")
    _legend(axes, title="\n".join(notes))


def _draw_mean(axes: Axes, curves: Sequence[Curve], label: str, colour: Any) -> None:
    """The mean of curves with its band; each for itself, if there are no steps that all of them cover."""
    band = mean_and_std(curves) if len(curves) > 1 else None
    if band is not None:
        axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(band.steps, band.mean, color=colour, linewidth=1.8, label=_wrapped(label))
        return
    for i, c in enumerate(curves):
        line = axes.plot(*condensed(c, most=2000), color=colour, linewidth=1.8, label="" if i else _wrapped(label))
        line[0].set_marker("o" if len(c.steps) == 1 else "")  # a line of one point is not seen


def _draw_lag(axes: Axes, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    alone, colours = len(groups) == 1, _colours(len(groups))
    for group, colour in zip(groups, colours, strict=True):
        band = extremes(group, *LAG)
        if band is not None:
            axes.plot(band.steps, band.mean, color=colour, linewidth=1.5)
            if len(groups) <= MOST_BANDS:
                alpha = 0.2 if alone else 0.1
                axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=alpha, linewidth=0)
    axes.set_ylabel("lag\n(updates)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    shown = colours[0] if alone else "grey"
    handles = [Line2D([], [], color=shown, label="mean"), Patch(color=shown, alpha=0.2, label="least to greatest")]
    _legend(axes, handles[: 2 if len(groups) <= MOST_BANDS else 1])


def _stack(who: str, stages: Sequence[str]) -> Panel:
    """Shares of the time of one group over steps, one upon the other."""

    def draw(axes: Axes, groups: Sequence[Group]) -> None:
        from matplotlib.ticker import PercentFormatter

        grid, parts = shares(groups[0], stages)
        labels, colours = [STAGES[key][0] for key in parts], [STAGES[key][1] for key in parts]
        axes.stackplot(grid, list(parts.values()), labels=labels, colors=colours)
        axes.set_ylim(0, 1)
        axes.set_ylabel(f"time of\n{who}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend(axes, axes.get_legend_handles_labels()[0][::-1])

    return draw, 1.9, True


def _bars(who: str, stages: Sequence[str], groups: Sequence[Group]) -> Panel:
    """Shares of the time of several groups, one bar each: means over the steps."""
    names = [textwrap.fill(group.label, TICK_WIDTH) for group in groups]
    lines = max(len(name.splitlines()) for name in names)

    def draw(axes: Axes, groups: Sequence[Group]) -> None:
        from matplotlib.ticker import PercentFormatter

        left = np.zeros(len(groups))
        found = [shares(group, stages)[1] for group in groups]
        for key in (key for key in stages if any(key in parts for parts in found)):
            label, colour = STAGES[key]
            width = np.array([parts[key].mean() if key in parts else 0.0 for parts in found])
            axes.barh(range(len(groups)), width, left=left, color=colour, label=label, height=0.7)
            left += width
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel(f"time of {who}")
        axes.set_yticks(range(len(groups)), names, fontsize="small")
        axes.set_ylim(len(groups) - 0.5, -0.5)
        _legend(axes)

    return draw, max(1.5, 0.6 + max(0.3, 0.19 * lines) * len(groups)), False


def _legend(axes: Axes, handles: Sequence[Artist] | None = None, title: str = "") -> None:
    """A legend to the right of the data, and a frame that does not compete with it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, frameon=False,
            fontsize="small", title=title, title_fontsize="small", alignment="left",
        )  # fmt: skip


def _label_steps(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("environment steps")


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [f"C{i}" for i in range(n)] if n <= 10 else list(colormaps["turbo"](np.linspace(0.05, 0.95, n)))


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LABEL_WIDTH)
