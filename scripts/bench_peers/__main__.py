"""Measure zrl beside its peers: ``make bench-peers``, or ``python -m bench_peers`` with ``scripts`` on the path.

    make bench-peers ARGS="--works w1,w1l --systems plain,zrl,sb3-dummy --rounds 3 --seconds 5"

Every measurement is a fresh process with one thread per torch; within a round the systems take turns, and every round
begins with another one. Each result is kept at once, in ``measurements.jsonl``: a run that was broken off goes on
where it was (``--fresh`` begins anew; other seconds do, too). What does not install or run is in the table with its
reason. At the end: the table, ``results.json``, ``results.md``, ``results.png``, and as the last line one flat JSON
object (see `report`).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from bench_peers import report, venvs
from bench_peers.once import Settings, measure
from bench_peers.systems import SYSTEMS
from bench_peers.work import WORKS

ROOT = Path(__file__).parents[2]


def names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        chosen = list(known) if text == "all" else text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: expected some of {', '.join(known)}")
        return chosen

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--works", type=names(WORKS), default=list(WORKS), help="with commas between: " + ", ".join(WORKS)
    )
    parser.add_argument("--systems", type=names(SYSTEMS), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before, from the first batch on")
    parser.add_argument("--seeds", type=int, default=5, help="of solve, instead of rounds")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a measurement is given up")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_peers", help="folder of the results")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venv-peers", help="folder of the peers' environments")
    parser.add_argument("--no-install", action="store_true", help="take only the environments that are there")
    parser.add_argument("--fresh", action="store_true", help="forget earlier measurements")
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing: print the tables of what was measured"
    )
    args = parser.parse_args()
    args.out, args.venvs = args.out.resolve(), args.venvs.resolve()
    return args


class Log:
    """Results so far, one JSON object a line. What was measured with other settings does not count."""

    def __init__(self, path: Path, settings: Settings, *, fresh: bool) -> None:
        self.path = path
        self._how = [settings.seconds, settings.warm_up]
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["how"] == self._how]

    def has(self, work: str, system: str, turn: int) -> bool:
        key = (work, system, turn)
        return any((r["work"], r["system"], r["round"]) == key and "error" not in r for r in self.records)

    def add(self, work: str, system: str, turn: int, result: dict[str, Any]) -> None:
        record = {"work": work, "system": system, "round": turn, "how": self._how, **result}
        self.records.append(record)
        with self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")


def measure_all(args: argparse.Namespace, log: Log, settings: Settings) -> dict[str, str]:
    """Go round; why some systems take no part at all."""
    chosen = [SYSTEMS[name] for name in args.systems if any(work in SYSTEMS[name].works for work in args.works)]
    needed = sorted({system.venv for system in chosen if system.venv})
    reasons = {name: _absent(args, name) for name in needed}
    for work in args.works:
        here = [name for name in args.systems if work in SYSTEMS[name].works]
        rounds = args.seeds if work == "solve" else args.rounds
        for turn in range(1, rounds + 1):
            first = turn % max(1, len(here))
            for name in here[first:] + here[:first]:
                if reasons.get(SYSTEMS[name].venv) or log.has(work, name, turn):
                    continue
                result = measure(name, work, turn, settings)
                log.add(work, name, turn, result)
                print(f"{work:12} {turn} {name:17} {report.said(work, result)}", flush=True)
    return reasons


def _absent(args: argparse.Namespace, venv: str) -> str:
    if args.no_install:
        return "" if venvs.is_ready(args.venvs, venv) else "it is not installed"
    return venvs.prepare(args.venvs, venv)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.markdown:
        print((args.out / "results.md").read_text())
        return
    settings = Settings(args.seconds, args.warm_up, args.limit, args.venvs)
    machine = report.machine()
    log = Log(args.out / "measurements.jsonl", settings, fresh=args.fresh)
    reasons = measure_all(args, log, settings)
    found = report.Report(args.works, args.systems, log.records, reasons, machine)
    (args.out / "results.json").write_text(json.dumps(found.document(), indent=1) + os.linesep)
    (args.out / "results.md").write_text(found.markdown())
    report.chart(found, args.out / "results.png")
    print("\n" + found.text())
    print(f"in {args.out}: results.json, results.md, results.png, measurements.jsonl")
    print(json.dumps(found.flat()))


if __name__ == "__main__":
    main()
