"""The budget of restarts, by the numbers."""

from __future__ import annotations

from zrl.protocol.restarts import Restarts


def test_delays_double_until_the_budget_is_spent() -> None:
    restarts = Restarts()
    assert [restarts.failed(0, float(i)) for i in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, None, None]
    assert restarts.spent(0, 7.0) == 5
    assert restarts.failed(1, 7.0) == 0.5  # another worker has its own


def test_failures_are_forgotten_after_the_window() -> None:
    restarts = Restarts()
    for at in (0.0, 10.0, 20.0, 30.0, 40.0):
        assert restarts.failed(0, at) is not None
    assert restarts.failed(0, 299.0) is None
    assert restarts.failed(0, 300.0) == 8.0
    assert restarts.failed(0, 1000.0) == 0.5


def test_delays_have_an_upper_end() -> None:
    restarts = Restarts(budget=10)
    assert [restarts.failed(0, 0.0) for _ in range(9)][-2:] == [30.0, 30.0]
