from __future__ import annotations

import pytest

from funnelrec.learn.schedules import Constant, Cosine, Noam


def test_constant_with_warm_up() -> None:
    assert [Constant(4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Constant()(0) == 1.0


def test_cosine_hand_worked() -> None:
    schedule = Cosine(steps=14, warmup=2, floor=0.1)
    # after the warm-up: 0.1 + 0.9 (1 + cos(π n / 12)) / 2 at n = 0, 4, 6, 8, 12
    found = [schedule(step) for step in (0, 1, 2, 6, 8, 10, 14, 99)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.1 + 0.9 * 0.75, 0.55, 0.1 + 0.9 * 0.25, 0.1, 0.1])


def test_noam_hand_worked() -> None:
    schedule = Noam(width=64, warmup=4)
    # 64^-½ = 1/8; step 1: 1/8 · 1/8; step 4 (the peak): 1/8 · 1/2; step 16: 1/8 · 1/4
    assert [schedule(n - 1) for n in (1, 4, 16)] == pytest.approx([1 / 64, 1 / 16, 1 / 32])
    assert max(range(100), key=schedule) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "warmup must be at least 0, received -1"),
        (lambda: Cosine(steps=5, warmup=5), "steps must be at least 6, received 5"),
        (lambda: Noam(0), "width must be at least 1, received 0"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
