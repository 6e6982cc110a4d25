"""Where the time goes, and what happened how often."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class StageTimes:
    """Seconds spent in each stage of making fragments, and how many environment steps came of it.

    Attributes:
        env: inside ``env.step``.
        actor: inside ``actor.step`` and ``actor.value``.
        write: copying what they returned into the record, and turning its actions into what environments take.
        reset: what the end of an episode costs: ``env.reset``, its observation, the recurrent state.
        total: wall time of whole fragments; what the four do not account for is the loop itself.
        n_env_steps: environment steps taken in that time.
    """

    env: float = 0.0
    actor: float = 0.0
    write: float = 0.0
    reset: float = 0.0
    total: float = 0.0
    n_env_steps: int = 0

    def clear(self) -> None:
        """Start counting anew."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, field.default)

    def shares(self) -> dict[str, float]:
        """Share of each stage in the total, in [0, 1]; ``other`` is the rest. Empty before the first fragment."""
        if self.total <= 0:
            return {}
        parts = {name: getattr(self, name) / self.total for name in ("env", "actor", "write", "reset")}
        return {**parts, "other": max(0.0, 1.0 - sum(parts.values()))}

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return dataclasses.asdict(self)
