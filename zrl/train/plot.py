"""Plots of a run; needs the extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zrl.errors import ConfigError


def plot_return(metrics: list[dict[str, Any]], title: str, target: Path, goal: float | None = None) -> None:
    """Mean return of the last 100 episodes and of each update's episodes over environment steps, as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("plots need matplotlib: pip install 'zrl[plot]'") from e
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = [m for m in metrics if m.get("return_update") is not None]
    axes.plot([m["step"] for m in rows], [m["return_update"] for m in rows], alpha=0.35, label="episodes of one update")
    rows = [m for m in metrics if m.get("return_100") is not None]
    axes.plot([m["step"] for m in rows], [m["return_100"] for m in rows], label="last 100 episodes")
    if goal is not None:
        axes.axhline(goal, linestyle="--", linewidth=1, color="grey", label=f"goal: {goal:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title=title)
    axes.legend()
    figure.savefig(target, dpi=120)
