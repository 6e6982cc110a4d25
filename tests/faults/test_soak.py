"""The soak, shortened; and that it finds what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.faults.world import ROOT, needs_linux
from zrl import Batch
from zrl.rollout import same

pytestmark = [needs_linux, pytest.mark.timeout(200)]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
import soak  # noqa: E402

sys.path.remove(str(SCRIPTS))
FAULTS = ("kills", "host_kills", "stops", "host_stops", "pauses", "crawls", "bursts", "guests")


def soaked(*words: str, code: str = "import soak; soak.main()") -> tuple[int, dict[str, Any], str]:
    """Exit code, figures and output of a soak."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"},
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("minutes", "gap", "seed"),
    [
        pytest.param(0.03, 0.2, 6, id="short"),  # in which nobody has to import torch anew
        pytest.param(0.5, 0.5, 8, id="thick", marks=pytest.mark.long),
    ],
)
def test_all_faults_at_random(minutes: float, gap: float, seed: int) -> None:
    code, figures, output = soaked("--minutes", str(minutes), "--gap", str(gap), "--seed", str(seed))
    assert code == 0, output
    assert figures["violated"] == ""
    assert figures["seed"] == seed
    assert f"seed {seed}\n" in output
    assert sum(figures[name] for name in FAULTS) >= 3, output
    assert figures["fragments"] == figures["consumed"] > 20
    assert figures["committed"] == figures["consumed"] + figures["dropped"] + figures["in_flight"]
    assert all(isinstance(x, (int, float)) for name, x in figures.items() if name != "violated")


@pytest.mark.long
def test_a_leak_is_found() -> None:
    """Of one descriptor a fault, and of some memory a batch."""
    leaks = "import os, soak; f = soak.Soak.fault; soak.Soak.fault = lambda self: (os.dup(0), f(self)); "
    leaks += "kept = []; g = soak.Soak.publish; soak.Soak.publish = lambda self: (kept.append(b'x' * 2**17), g(self)); "
    code, figures, output = soaked("--minutes", "0.2", "--gap", "1", "--seed", "5", code=f"{leaks}soak.main()")
    assert code == 1, output
    assert figures["violated"] == "fds, rss", output
    assert figures["fds_last"] > figures["fds_first"]


# ── what its ledger says ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def batches() -> list[Batch]:
    """Four batches of one fragment, one after the other, as `cluster` would deliver them."""
    actor = soak.VersionActor()
    found = []
    with same.rollout(soak.StampEnv, actor, soak.T, soak.B) as it:
        for version in range(1, 5):
            actor.become(version)
            found.append(next(it).clone())
    return found


def test_what_is_whole_is_right(batches: list[Batch]) -> None:
    ledger = soak.Ledger()
    for batch in batches:
        ledger.check(batch)
    assert (ledger.n_fragments, ledger.missing) == (4, 0)


def test_a_torn_fragment(batches: list[Batch]) -> None:
    batches[0].state.obs[3, 0, 1] += 1
    with pytest.raises(soak.Violation, match="torn"):
        soak.Ledger().check(batches[0])


def test_a_fragment_that_comes_twice(batches: list[Batch]) -> None:
    ledger = soak.Ledger()
    ledger.check(batches[0])
    ledger.check(batches[1])
    with pytest.raises(soak.Violation, match="twice"):
        ledger.check(batches[0])


def test_a_fragment_that_does_not_come(batches: list[Batch]) -> None:
    ledger = soak.Ledger()
    for batch in (batches[0], batches[3]):
        ledger.check(batch)
    assert ledger.missing == 2
    late = soak.Delivered()
    assert [late.add(seq) for seq in (3, 1, 1, 2, 3)] == [True, True, False, True, False]
    assert late.missing == set()


def test_weights_of_two_versions(batches: list[Batch]) -> None:
    batches[1].actor["most"][0, 1] += 1
    with pytest.raises(soak.Violation, match="weights"):
        soak.Ledger().check(batches[1])


def test_growth_is_the_slope_of_the_second_half_without_its_peaks() -> None:
    def samples(*values: float) -> list[tuple[float, dict[str, float]]]:
        return [(float(at), {"rss_mib": x}) for at, x in enumerate(values)]

    assert soak.growth(samples(1, 90, 200, 200, 200, 200, 200)) == 0
    assert soak.growth(samples(0, 0, 0, 0, 100, 100, 180, 100, 100)) == 0
    assert soak.growth(samples(0, 0, 0, 0, 10, 12, 90, 16, 18)) == pytest.approx(8)
