"""A status as people see it: a page on a terminal, or one line.

What a status holds was written by somebody else: every key may be missing, or hold anything. So texts from it are
escaped, and what is no number is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zrl.protocol.messages import printable

MOST_ROWS = 16  # of workers
SLOTS = ("free", "worker", "ready", "held")
WORKERS = ("env", "actor", "write", "reset", "other", "wait")
LEARNER = ("wait", "train", "publish")
_BAR = 14  # columns
_HOST = 16  # characters of a host's name
_MOST_TEXT = 400  # characters of a text that somebody else wrote

#: What a part of a bar is drawn with, so that it can be told apart without colours too.
_INK = {
    "env": ("█", "green"),
    "actor": ("▓", "blue"),
    "write": ("▒", "cyan"),
    "reset": ("▚", "magenta"),
    "other": ("░", "white"),
    "train": ("█", "green"),
    "publish": ("▓", "blue"),
    "wait": ("·", "red"),
}


def render(status: Mapping[str, Any], rows: int = MOST_ROWS) -> RenderableType:
    """The page; from 80 columns on nothing is cut.

    Args:
        status: as `zrl.rollout.pipeline.PipelineRollout.status` gives it.
        rows: workers that are shown one by one; the others are summed up.
    """
    parts: list[RenderableType] = [_title(status)]
    if (progress := _progress(status)) is not None:
        parts.append(progress)
    parts += [Text("   ".join(words)) for words in (_rates(status), _returns(status), _flow(status)) if words]
    if _rows(status):
        parts.append(_table(status, rows))
    parts += [Text(line) for line in (_omitted(status, rows), *_hosts(status), _what_went_wrong(status)) if line]
    parts += list(_bars(status))
    parts.append(Text(_text(status, "verdict") or "no figures yet", style="bold"))
    return Group(*parts)


def line(status: Mapping[str, Any]) -> str:
    """The same in one plain line."""
    step = _progress_in_words(status)
    words = [_name(status), *([step] if step else []), *_rates(status)[:1], *_returns(status)[:1]]
    if lag := _lag(status):
        words.append(lag)
    return "  ".join([*words, _text(status, "verdict") or "no figures yet"])


def age_in_words(seconds: float) -> str:
    """``3 s``, ``4:05``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


# ── the parts of the page ────────────────────────────────────────────────────────────────────────────────────────────


def _name(status: Mapping[str, Any]) -> str:
    training = _mapping(status, "training")
    words = [_text(training, "env"), _text(training, "algo")]
    if (seed := _number(training, "seed")) is not None:
        words.append(f"seed {seed:.0f}")
    if run := _text(status, "run_id")[:8]:
        words.append(f"run {run}")
    return " ".join(filter(None, words)) or "a run"


def _title(status: Mapping[str, Any]) -> RenderableType:
    right = []
    if (uptime := _number(status, "uptime")) is not None:
        right.append(f"up {age_in_words(uptime)}")
    if release := _text(status, "zrl"):
        right.append(f"zrl {release}")
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(Text(_name(status), style="bold"), Text("  ".join(right)))
    return table


def _progress(status: Mapping[str, Any]) -> RenderableType | None:
    words = _progress_in_words(status)
    if not words:
        return None
    training = _mapping(status, "training")
    step, steps = _number(training, "step") or 0.0, _number(training, "steps")
    if (eta := _number(training, "eta_s")) is not None:
        words += f"  ETA {age_in_words(eta)}"
    if not steps:
        return Text(words)
    table = Table.grid(expand=True, padding=(0, 2))
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    table.add_row(ProgressBar(total=steps, completed=min(step, steps)), Text(words))
    return table


def _progress_in_words(status: Mapping[str, Any]) -> str:
    training = _mapping(status, "training")
    step, steps = _number(training, "step"), _number(training, "steps")
    if step is None:
        return ""
    return f"{step:,.0f} steps" if not steps else f"{step:,.0f} of {steps:,.0f} steps ({_percent(step / steps)})"


def _rates(status: Mapping[str, Any]) -> list[str]:
    """By the training loop; where it says nothing, by the collector."""
    training, rates = _mapping(status, "training"), _mapping(status, "rates")
    steps = _first(_number(training, "steps_per_s"), _number(rates, "env_steps_per_s"))
    updates = _number(training, "updates_per_s")
    found = [] if steps is None else [f"{steps:,.0f} steps/s"]
    if updates is not None:
        found.append(f"{updates:,.1f} updates/s")
    elif (batches := _number(rates, "batches_per_s")) is not None:
        found.append(f"{batches:,.1f} batches/s")
    for words, value in (("update", _number(training, "update")), ("version", _number(status, "version"))):
        found += [] if value is None else [f"{words} {value:,.0f}"]
    return found


def _returns(status: Mapping[str, Any]) -> list[str]:
    training = _mapping(status, "training")
    mean, last = _number(training, "return_100"), _number(training, "return_update")
    named = {
        "return": _first(mean, last),
        "best": _number(training, "return_best"),
        "length": _number(training, "length_update"),
    }
    found = [f"{name} {value:,.1f}" for name, value in named.items() if value is not None]
    if (episodes := _number(training, "episodes")) is not None:
        found.append(f"{episodes:,.0f} episodes")
    evaluated = _mapping(training, "eval")
    greedy = _first(_number(training, "eval"), _number(evaluated, "return_mean"), _number(evaluated, "mean"))
    if greedy is not None:
        found.append(f"evaluated {greedy:,.1f}")
    return found


def _lag(status: Mapping[str, Any]) -> str:
    lag = _mapping(status, "lag")
    least, mean, most = (_number(lag, name) for name in ("min", "mean", "max"))
    if least is None or mean is None or most is None:
        return ""
    return f"lag {least:.0f} / {mean:.1f} / {most:.0f}"


def _flow(status: Mapping[str, Any]) -> list[str]:
    found = [_lag(status)] if _lag(status) else []
    slots = _mapping(status, "slots")
    counts = [f"{n:.0f} {name}" for name in SLOTS if (n := _number(slots, name)) is not None]
    found += [f"slots {', '.join(counts)}"] if counts else []
    return found


def _hosts(status: Mapping[str, Any]) -> list[str]:
    """The fastest and the slowest of several hosts."""
    by_host = _mapping(status, "by_host")
    found = [
        (seconds, escaped(name), _number(_mapping(by_host, name), "env_steps_per_s") or 0.0)
        for name in by_host
        if (seconds := _number(_mapping(by_host, name), "fragment_seconds")) is not None
    ]
    if len(found) < 2:
        return []
    return [
        f"{word} of {len(found)} hosts: {_shortened(name, _HOST)}, {seconds:,.2f} s a fragment, {rate:,.0f} steps/s"
        for word, (seconds, name, rate) in (("fastest", min(found)), ("slowest", max(found)))
    ]


def _rows(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = status.get("peers")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _table(status: Mapping[str, Any], most: int) -> RenderableType:
    """One row a worker; its slots in the order of `SLOTS`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("worker", justify="right", no_wrap=True)
    for name in ("host", "state", "slots"):
        table.add_column(name, no_wrap=True)
    for name in ("fragments", "calls", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(status)[:most]:
        slots = [_number(_mapping(row, "slots"), name) for name in SLOTS]
        age = _number(row, "age")
        table.add_row(
            Text(_restarted(row)),
            Text(_shortened(_text(row, "host"), _HOST)),
            Text(_shortened(_text(row, "phase"), _HOST)),
            Text("/".join("-" if n is None else f"{n:.0f}" for n in slots)),
            Text(_count(row, "sent")),
            Text(_count(row, "calls")),
            Text("" if age is None else age_in_words(age)),
        )
    return table


def _restarted(row: Mapping[str, Any]) -> str:
    """The index of a worker, and how often it was replaced."""
    again = _number(row, "generation")
    return _count(row, "index") + (f" ({again:.0f})" if again else "")


def _omitted(status: Mapping[str, Any], most: int) -> str:
    """The workers without a row of their own."""
    left = _rows(status)[most:]
    omitted = _number(status, "peers_omitted")
    if omitted:
        return f"{omitted:,.0f} workers, too many to be told one by one"
    if not left:
        return ""
    phases: dict[str, int] = {}
    for row in left:
        phase = _text(row, "phase") or "unknown"
        phases[phase] = phases.get(phase, 0) + 1
    return f"and {len(left)} more: " + ", ".join(f"{n} {phase}" for phase, n in sorted(phases.items())[:8])


def _what_went_wrong(status: Mapping[str, Any]) -> str:
    fragments = _mapping(status, "fragments")
    parts = []
    for name in ("dropped", "losses", "refused"):
        reasons = _mapping(status, name)
        found = [(escaped(reason), n) for reason in reasons if (n := _number(reasons, reason))]
        if found:
            parts.append(f"{name}: {', '.join(f'{n:,.0f} {reason}' for reason, n in found[:8])}")
    lost = ("fragments lost", _number(fragments, "lost"))
    for name, n in (lost, *((name, _number(status, name)) for name in ("replaced", "rebuilt"))):
        if n:
            parts.append(f"{name}: {n:,.0f}")
    return "   ".join(parts)


def _bars(status: Mapping[str, Any]) -> Iterator[Text]:
    shares = _mapping(status, "shares")
    workers, learner = _mapping(shares, "workers"), _mapping(shares, "learner")
    if workers:
        yield _bar("workers", workers, WORKERS)
    if learner:
        text = _bar("learner", learner, LEARNER)
        if (gather := _number(learner, "gather")) is not None:
            text.append(f"; gather {gather:.0%}")
        yield text


def _bar(name: str, shares: Mapping[str, Any], parts: tuple[str, ...]) -> Text:
    """``workers ████▓▓▒░·· env 42% …``"""
    text = Text(f"{name:<8}")
    at = 0.0
    for part in parts:
        begin, at = at, at + min(1.0, max(0.0, _number(shares, part) or 0.0))
        ink, colour = _INK[part]
        text.append(ink * (round(min(1.0, at) * _BAR) - round(min(1.0, begin) * _BAR)), style=colour)
    text.append(" " * (8 + _BAR + 2 - len(text)))
    text.append(" ".join(f"{part} {_number(shares, part) or 0.0:.0%}" for part in parts))
    return text


# ── what somebody else wrote ─────────────────────────────────────────────────────────────────────────────────────────


def escaped(text: object) -> str:
    """A text from a status, in one printable line of a bearable length."""
    return printable(str(text)[:_MOST_TEXT])


def _mapping(status: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = status.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(status: Mapping[str, Any], key: str) -> str:
    value = status.get(key)
    return escaped(value) if isinstance(value, str) else ""


def _number(status: Mapping[str, Any], key: str) -> float | None:
    value = status.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e18:
        return None
    return value if math.isfinite(value) else None


def _count(row: Mapping[str, Any], key: str) -> str:
    """At most seven characters."""
    value = _number(row, key)
    if value is None:
        return ""
    for unit, size in (("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if abs(value) < 1e6:
            return f"{value:,.0f}"
        if abs(value) < 999.95 * size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0e}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
