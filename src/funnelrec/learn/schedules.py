"""Learning rate schedules: functions of the step (0 is the first) whose value multiplies the learning rate.

Each is plain data that can be called, so that a checkpoint can tell which schedule a run was using.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Constant", "Cosine", "Noam"]


@dataclass(frozen=True, slots=True)
class Constant:
    """Linear warm-up from 1/warmup to 1, then 1."""

    warmup: int = 0

    def __post_init__(self) -> None:
        _require_count("warmup", self.warmup, 0)

    def __call__(self, step: int) -> float:
        return _warm(step, self.warmup)


@dataclass(frozen=True, slots=True)
class Cosine:
    """Linear warm-up to 1, then half a cosine down to `floor` at `steps`; `floor` after that.

    Source: Loshchilov and Hutter, 2017, Eq. (5) without restarts.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        _require_count("warmup", self.warmup, 0)
        _require_count("steps", self.steps, self.warmup + 1)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return _warm(step, self.warmup)
        done = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Noam:
    """width^-½ · min(n^-½, n · warmup^-1½) at the n-th step, n = step + 1; used with a learning rate of 1.

    Source: Vaswani et al., 2017, Eq. (3).
    """

    width: int
    warmup: int = 4000

    def __post_init__(self) -> None:
        _require_count("width", self.width, 1)
        _require_count("warmup", self.warmup, 1)

    def __call__(self, step: int) -> float:
        number = step + 1
        return float(self.width**-0.5 * min(number**-0.5, number * self.warmup**-1.5))


def _warm(step: int, warmup: int) -> float:
    return 1.0 if step >= warmup else (step + 1) / warmup


def _require_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, received {value}")
