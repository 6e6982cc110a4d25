"""What a run is made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from zrl.train.setup import Adam


def test_adam_is_torchs() -> None:
    """The same weights, bit for bit, and the same state, which each can go on from."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))

    ours, theirs = model(), model()
    a, b = Adam(ours.parameters(), lr=0.1, fused=True), torch.optim.Adam(theirs.parameters(), lr=0.1, fused=True)
    for i in range(6):
        x = torch.randn(4, 3)
        for m, o in ((ours, a), (theirs, b)):
            o.zero_grad()
            torch.autograd.backward(m(x).square().sum())
            o.step()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        assert all(p.grad is not None and not p.grad.requires_grad for p in ours.parameters())
        if i == 2:
            mine, others = a.state_dict(), b.state_dict()
            assert mine["param_groups"] == others["param_groups"]
            a, b = Adam(ours.parameters(), fused=True), torch.optim.Adam(theirs.parameters(), fused=True)
            a.load_state_dict(others)
            b.load_state_dict(mine)


def test_training_imports_no_compiler(tmp_path: Path) -> None:
    """It takes a second, and nothing here is compiled."""
    program = (
        "import sys\n"
        "from zrl.config import TrainConfig\n"
        "from zrl.train.loop import train\n"
        "few = {'workers': 0, 'n_envs': 4, 'n_steps': 16, 'steps': 128, 'threads': 1, 'eval_episodes': 0}\n"
        "config = TrainConfig(**few, runs=sys.argv[1])\n"
        "assert train(config).checkpoint is not None\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
