"""From measurements to a table, flat keys, Markdown and a chart.

The flat keys: ``<work>_over_<peer>``, how many times as fast zrl is, and ``<work>_<system>_steps_per_s`` (for "solve"
``…_seconds``), medians. A ratio is the median of the rounds' ratios, against the fastest variant of the peer; of
"solve" it is the ratio of the medians over the seeds, start-up included, and ``solve_warm_over_<peer>`` without. 0:
one of the two was not measured, or did not run. ``w1l_over_plain`` and ``ppo_over_plain`` are against the loop that
learns nothing, ``…_over_plain_learns`` against the one that does.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_peers.systems import SYSTEMS
from bench_peers.work import WORKS

#: What a key is called, and the variants that it stands for.
PEERS = {
    "plain": ("plain",),
    "plain_race": ("plain-race",),
    "plain_learns": ("plain-learns",),
    "envpool": ("envpool",),
    "envpool_pinned": ("envpool-pinned",),
    "sb3": ("sb3-dummy", "sb3-subproc"),
    "sample_factory": ("sample-factory",),
    "torchrl": ("torchrl-sync", "torchrl-async"),
    "tianshou": ("tianshou-dummy", "tianshou-subproc"),
    "pufferlib": ("pufferlib", "pufferlib-mp"),
    "rllib": ("rllib",),
}
OURS = ("zrl", "zrl-frames", "zrl-numpy", "zrl-pinned")
Values = dict[int, float]  # round (or seed) → steps per second, or seconds


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return {
        "processor": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def said(work: str, result: dict[str, Any]) -> str:
    """A result in words."""
    if "error" in result:
        return str(result["error"])
    if work != "solve":
        return f"{result['value']:12,.0f} steps/s"
    steps = result["value"]
    return f"{result['total_s']:6.1f} s, " + ("not solved" if steps is None else f"{steps:,} steps")


class Report:
    """Results by work and system.

    Args:
        reasons: why environments are missing, by name.
    """

    def __init__(
        self,
        works: list[str],
        systems: list[str],
        records: list[dict[str, Any]],
        reasons: dict[str, str],
        machine: dict[str, Any],
    ) -> None:
        self.works, self.systems, self.machine = works, systems, machine
        self._records = [r for r in records if r["work"] in works and r["system"] in systems]
        self._reasons = reasons

    def values(self, work: str, system: str, field: str = "total_s") -> Values:
        """What was measured; of "solve" the seconds in `field`, infinite where it was given up."""
        found: Values = {}
        for r in self._records:
            if (r["work"], r["system"]) == (work, system) and "error" not in r:
                found[r["round"]] = (
                    (r[field] if r["value"] is not None else math.inf) if work == "solve" else r["value"]
                )
        return found

    def reason(self, work: str, system: str) -> str | None:
        """Why there are no values."""
        if work not in SYSTEMS[system].works:
            return SYSTEMS[system].why_not(work)
        if absent := self._reasons.get(SYSTEMS[system].venv):
            return absent
        errors = [r["error"] for r in self._records if (r["work"], r["system"]) == (work, system) and "error" in r]
        return errors[-1] if errors else "not measured"

    def ratio(self, work: str, peer: str, ours: str = "zrl", field: str = "total_s") -> float:
        """How many times as fast as the fastest variant of a peer."""
        mine = self.values(work, ours, field)
        candidates = [v for v in (self.values(work, name, field) for name in PEERS[peer]) if v]
        if not mine or not candidates:
            return 0.0
        if work == "solve":
            best = min(map(_median, candidates))
            return 0.0 if math.isinf(best) or math.isinf(_median(mine)) else round(best / _median(mine), 3)
        theirs = max(candidates, key=_median)
        common = sorted(mine.keys() & theirs.keys())
        return round(statistics.median(mine[k] / theirs[k] for k in common), 3) if common else 0.0

    def flat(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for work in self.works:
            for peer, variants in PEERS.items():
                if any(work in SYSTEMS[name].works for name in variants):
                    found[f"{work}_over_{peer}"] = self.ratio(work, peer)
                    if work == "solve":
                        found[f"solve_warm_over_{peer}"] = self.ratio(work, peer, field="warm_s")
            for ours in OURS[1:]:
                for peer in ("plain", "envpool", "envpool_pinned") if work in SYSTEMS[ours].works else ():
                    if work in SYSTEMS[PEERS[peer][0]].works:
                        key = f"{work}_{ours.removeprefix('zrl-')}_over_{peer}"
                        found[key] = self.ratio(work, peer, ours)
            for system in self.systems:
                if values := self.values(work, system):
                    unit = "seconds" if work == "solve" else "steps_per_s"
                    median = _median(values)
                    found[f"{work}_{system.replace('-', '_')}_{unit}"] = 0.0 if math.isinf(median) else round(median, 2)
        return found

    def rows(self, work: str) -> Iterable[tuple[str, Values, str | None]]:
        """System, values or none, and why there are none; nothing of systems that nobody would expect there."""
        for system in self.systems:
            values = self.values(work, system)
            if values:
                yield system, values, None
            elif reason := self.reason(work, system):
                yield system, {}, reason

    def document(self) -> dict[str, Any]:
        """All of it, for ``results.json``."""
        works: dict[str, Any] = {}
        for work in self.works:
            works[work] = {"title": WORKS[work].title, "systems": {}}
            for system, values, reason in self.rows(work):
                entry = {"absent": reason} if reason else _spread(values)
                works[work]["systems"][system] = {**entry, "versions": self._versions(work, system)}
        return {"machine": self.machine, "works": works, "figures": self.flat()}

    def _versions(self, work: str, system: str) -> dict[str, str]:
        found = [r["versions"] for r in self._records if (r["work"], r["system"]) == (work, system) and "versions" in r]
        return found[-1] if found else {}

    # -- tables ------------------------------------------------------------------------------------------------------

    def _cells(self, work: str) -> Iterable[tuple[str, str, str, str]]:
        """Name, median, range and ratio."""
        for system, values, reason in self.rows(work):
            if reason:
                yield system, "–", reason, ""
                continue
            low, high = min(values.values()), max(values.values())
            yield (
                system,
                _number(work, _median(values)),
                f"{_number(work, low)} to {_number(work, high)}",
                self._times(work, system),
            )

    def _times(self, work: str, system: str) -> str:
        mine, theirs = self.values(work, "zrl"), self.values(work, system)
        if system in OURS or not mine:
            return ""
        if work == "solve":
            quotient = _median(theirs) / _median(mine)
        else:
            common = mine.keys() & theirs.keys()
            quotient = statistics.median(mine[k] / theirs[k] for k in common) if common else math.nan
        return f"{quotient:.2f}" if math.isfinite(quotient) else "–"

    def text(self) -> str:
        lines = [f"{self.machine['processor']}, {self.machine['cores']} cores, load {self.machine['load_at_start']}"]
        for work in self.works:
            unit = "seconds" if work == "solve" else "steps/s"
            lines += [
                "",
                f"{work}: {WORKS[work].title}",
                f"  {'':17} {unit:>11}  {'range':28} zrl is so many times as fast",
            ]
            lines += [f"  {name:17} {median:>11}  {span:28} {ratio}" for name, median, span, ratio in self._cells(work)]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Tables for the documentation."""
        m = self.machine
        lines = [f"{m['processor']}, {m['cores']} cores, {m['system']}; load at the start {m['load_at_start']}."]
        for work in self.works:
            unit = "seconds" if work == "solve" else "steps/s"
            lines += ["", f"**{work}**: {WORKS[work].title}", ""]
            lines += [f"| | {unit}, median | range | zrl is so many times as fast |", "|---|---|---|---|"]
            lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in self._cells(work)]
        return "\n".join(lines) + "\n"


def chart(report: Report, path: Path) -> None:
    """A panel of bars for each work: medians, with the range as a line. None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    panels = [(work, [row for row in report.rows(work) if row[1]]) for work in report.works]
    panels = [(work, rows) for work, rows in panels if rows]
    if not panels:
        return
    n = (len(panels) + 1) // 2
    figure = Figure(figsize=(13, 3.6 * n), layout="constrained")
    for k, (work, rows) in enumerate(panels):
        axes = figure.add_subplot(n, 2, k + 1)
        rows = [row for row in rows if not math.isinf(_median(row[1]))]
        labels, medians = [row[0] for row in rows], [_median(row[1]) for row in rows]
        low = [m - min(row[1].values()) for m, row in zip(medians, rows, strict=True)]
        high = [min(max(row[1].values()), 2 * m) - m for m, row in zip(medians, rows, strict=True)]
        colours = ["tab:orange" if label in OURS else "tab:blue" for label in labels]
        axes.barh(labels, medians, xerr=[low, high], color=colours, ecolor="black")
        axes.invert_yaxis()
        axes.set_title(f"{work}: {WORKS[work].title}", fontsize=9)
        axes.set_xlabel("seconds, less is better" if work == "solve" else "steps/s")
    figure.savefig(path, dpi=110)


def _median(values: Values) -> float:
    return statistics.median(values.values())


def _spread(values: Values) -> dict[str, Any]:
    x = [None if math.isinf(v) else v for v in values.values()]
    finite = [v for v in x if v is not None]
    median = _median(values)
    return {
        "median": None if math.isinf(median) else median,
        "min": min(finite, default=None),
        "max": None if None in x else max(finite),
        "values": x,
    }


def _number(work: str, value: float) -> str:
    if math.isinf(value):
        return "not solved"
    return f"{value:.1f}" if work == "solve" else f"{value:,.0f}"
