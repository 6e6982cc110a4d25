"""The time recursions of `zrl.algo` against a plain loop over T.

    python scripts/bench_returns.py [--steps 64 1024] [--columns 256] [--rounds 41] [--grad]

One process, one thread of torch, float32, on the CPU; an episode ends every 100 steps, half of them truncated. For
each of returns, GAE and V-trace three ways take turns, and each figure is the median of the rounds' ratios of CPU time:

- the function of `zrl.algo`,
- plain: a loop over T with a few operations a step, as the papers write it,
- tight: all that needs no loop before it, and then one fused operation a row, into its place.

All are compared with the plain loop in float64 first. The last line is one flat JSON object:

- ``scan_speedup_t…``: plain over ours, the least of the three functions; ``scan_speedup_…_t…`` of each.
- ``scan_over_tight_t…``: tight over ours, the least of the three.
- ``gae_us_t…``, and so on: ours, in µs.
- ``scan_error``: the greatest difference from float64, relative to the greatest result of that function.

With ``--grad`` what is timed is the function and its gradient, for ours and the plain loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from zrl.algo import gae, returns, vtrace

GAMMA, LAM = 0.99, 0.95
BUDGET = 0.002  # seconds of one turn, at least

Arguments = dict[str, Tensor]
Function = Callable[[Arguments], Tensor]


def arguments(n_steps: int, n_columns: int) -> Arguments:
    g, shape = torch.Generator().manual_seed(0), (n_steps, n_columns)
    fin = torch.rand(shape, generator=g) < 0.01
    truncated = fin & (torch.rand(shape, generator=g) < 0.5)
    return {
        "rew": torch.randn(shape, generator=g),
        "fin": fin,
        "value": torch.randn(shape, generator=g),
        "final_value": torch.randn(shape, generator=g).masked_fill(~truncated, 0),
        "bootstrap": torch.randn(n_columns, generator=g),
        "rho": torch.randn(shape, generator=g).exp(),
    }


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def our_returns(x: Arguments) -> Tensor:
    return returns(x["rew"], x["fin"], gamma=GAMMA, bootstrap=x["bootstrap"], final_value=x["final_value"])


def our_gae(x: Arguments) -> Tensor:
    steps = {k: x[k] for k in ("rew", "fin", "value", "bootstrap", "final_value")}
    return gae(**steps, gamma=GAMMA, lam=LAM)


def our_vtrace(x: Arguments) -> Tensor:
    steps = {k: x[k] for k in ("rew", "fin", "value", "rho", "bootstrap", "final_value")}
    vs, adv = vtrace(**steps, gamma=GAMMA, lam=LAM)  # type: ignore[arg-type]
    return torch.stack([vs, adv])


# ── a plain loop ─────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_returns(x: Arguments) -> Tensor:
    y, out = x["bootstrap"], []
    for t in reversed(range(len(x["rew"]))):
        y = x["rew"][t] + GAMMA * torch.where(x["fin"][t], x["final_value"][t], y)
        out.append(y)
    return torch.stack(out[::-1])


def plain_gae(x: Arguments) -> Tensor:
    v, adv, out = x["bootstrap"], torch.zeros_like(x["bootstrap"]), []
    for t in reversed(range(len(x["rew"]))):
        fin = x["fin"][t]
        delta = x["rew"][t] + GAMMA * torch.where(fin, x["final_value"][t], v) - x["value"][t]
        adv = delta + GAMMA * LAM * adv * ~fin
        v = x["value"][t]
        out.append(adv)
    return torch.stack(out[::-1])


def plain_vtrace(x: Arguments) -> Tensor:
    v, vs, trace, out, advs = x["bootstrap"], x["bootstrap"], torch.zeros_like(x["bootstrap"]), [], []
    for t in reversed(range(len(x["rew"]))):
        fin, final, rho = x["fin"][t], x["final_value"][t], x["rho"][t].clamp(max=1)
        advs.append(rho * (x["rew"][t] + GAMMA * torch.where(fin, final, vs) - x["value"][t]))
        delta = rho * (x["rew"][t] + GAMMA * torch.where(fin, final, v) - x["value"][t])
        trace = delta + GAMMA * LAM * rho * trace * ~fin
        v = x["value"][t]
        vs = v + trace
        out.append(vs)
    return torch.stack([torch.stack(out[::-1]), torch.stack(advs[::-1])])


# ── a tight loop ─────────────────────────────────────────────────────────────────────────────────────────────────────


def solve(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(b)
    for a_t, b_t, out_t in zip(*(reversed(x.unbind()) for x in (a, b, out)), strict=True):
        y = torch.addcmul(b_t, a_t, y, out=out_t)
    return out


def tight_returns(x: Arguments) -> Tensor:
    a = GAMMA * ~x["fin"]
    return solve(a, x["rew"].add(torch.where(x["fin"], x["final_value"], 0), alpha=GAMMA), x["bootstrap"])


def temporal_difference(x: Arguments, v: Tensor) -> Tensor:
    ahead = torch.cat([v[1:], x["bootstrap"].unsqueeze(0)])
    return x["rew"].add(torch.where(x["fin"], x["final_value"], ahead), alpha=GAMMA) - x["value"]


def tight_gae(x: Arguments) -> Tensor:
    delta = temporal_difference(x, x["value"])
    return solve(GAMMA * LAM * ~x["fin"], delta, torch.zeros_like(delta[0]))


def tight_vtrace(x: Arguments) -> Tensor:
    rho = x["rho"].clamp(max=1)
    delta = temporal_difference(x, x["value"]) * rho
    vs = solve(GAMMA * LAM * ~x["fin"] * rho, delta, torch.zeros_like(delta[0])) + x["value"]
    return torch.stack([vs, temporal_difference(x, vs) * rho])


FUNCTIONS: dict[str, tuple[Function, Function, Function]] = {
    "returns": (our_returns, plain_returns, tight_returns),
    "gae": (our_gae, plain_gae, tight_gae),
    "vtrace": (our_vtrace, plain_vtrace, tight_vtrace),
}


def error(ways: tuple[Function, ...], x: Arguments) -> float:
    exact = ways[1]({k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    return max(float((way(x) - exact).abs().max() / exact.abs().max()) for way in ways)


def with_gradient(way: Function) -> Function:
    def run(x: Arguments) -> Tensor:
        y = way(x | {"value": x["value"].detach().requires_grad_(), "rew": x["rew"].detach().requires_grad_()})
        y.sum().backward()  # type: ignore[no-untyped-call]
        return y

    return run


def turn(way: Function, x: Arguments, n: int) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    for _ in range(n):
        way(x)
    return (time.process_time() - started) / n


def compare(ways: list[Function], x: Arguments, rounds: int) -> list[list[float]]:
    """For each way the times of all rounds, in which they take turns."""
    n = [max(1, int(BUDGET / min(turn(way, x, 1) for _ in range(3)))) for way in ways]
    times = [[turn(way, x, k) for way, k in zip(ways, n, strict=True)] for _ in range(rounds)]
    return [list(column) for column in zip(*times, strict=True)]


def ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--grad", action="store_true", help="time the gradient as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    worst = 0.0
    for n_steps in args.steps:
        x = arguments(n_steps, args.columns)
        plain, tight = {}, {}
        for name, ways in FUNCTIONS.items():
            worst = max(worst, error(ways, x))
            with torch.set_grad_enabled(args.grad):
                timed = [with_gradient(way) for way in ways[:2]] if args.grad else list(ways)
                ours, *others = compare(timed, x, args.rounds)
            plain[name] = ratio(others[0], ours)
            figures[f"scan_speedup_{name}_t{n_steps}"] = plain[name]
            figures[f"{name}_us_t{n_steps}"] = statistics.median(ours) * 1e6
            us = figures[f"{name}_us_t{n_steps}"]
            line = f"T {n_steps:5}: {name:8} {us:8.0f} µs, plain loop × {plain[name]:5.2f}"
            if not args.grad:
                tight[name] = ratio(others[1], ours)
                line += f", tight loop × {tight[name]:5.2f}"
            print(line, flush=True)
        figures[f"scan_speedup_t{n_steps}"] = min(plain.values())
        if tight:
            figures[f"scan_over_tight_t{n_steps}"] = min(tight.values())
    figures = {k: round(v, 4) for k, v in figures.items()} | {"scan_error": float(f"{worst:.2e}")}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
