from __future__ import annotations

import itertools

import pytest

from zrl.errors import ConfigError
from zrl.train.ranks import Rank, rank_in

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_what_torchrun_says() -> None:
    assert rank_in(TORCHRUN) == Rank(3, 4, 1, 2, "gpu01", 29501, True, 2)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "3", "WORLD_SIZE": ""}])
def test_one_is_none_of_several(environment: dict[str, str]) -> None:
    assert rank_in(environment) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": ""}, "RANK is not set, but WORLD_SIZE says"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "4"}, "RANK=4: expected less than WORLD_SIZE=4"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a whole number, not 'many'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: expected a whole number"),
    ],
)
def test_what_makes_no_sense_is_named(change: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        rank_in({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("url", "rank", "own"),
    [
        ("tcp://127.0.0.1:5555", 0, "tcp://127.0.0.1:5555"),
        ("tcp://127.0.0.1:5555", 3, "tcp://127.0.0.1:5561"),
        ("tcp://[::1]:5555", 1, "tcp://[::1]:5557"),
        ("tcp://127.0.0.1:*", 1, "tcp://127.0.0.1:*"),
        ("ipc:///run/l.sock", 0, "ipc:///run/l.sock"),
        ("ipc:///run/l.sock", 2, "ipc:///run/l.sock.2"),
        ("nonsense", 2, "nonsense"),
    ],
)
def test_every_learner_listens_at_an_address_of_its_own(url: str, rank: int, own: str) -> None:
    assert Rank(rank, 4).address(url) == own


def test_ports_end() -> None:
    assert Rank(1, 2).address("tcp://127.0.0.1:65532") == "tcp://127.0.0.1:65534"
    with pytest.raises(ConfigError, match=r"learner 1 would listen at port 65535.*choose a lower one"):
        Rank(1, 2).address("tcp://127.0.0.1:65533")


@pytest.mark.parametrize("size", [2, 3, 64])
def test_no_two_learners_have_a_worker_of_one_index(size: int) -> None:
    ranges = [Rank(rank, size).indices for rank in range(size)]
    assert ranges[0].start == 0
    assert all(a.stop == b.start and len(a) > 0 for a, b in itertools.pairwise(ranges))
    assert ranges[-1].stop <= 1 << 16
