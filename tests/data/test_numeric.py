"""Numeric transforms: hand-worked digits, clamping, missing values, hostile columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.core.schema import TRANSFORMS, Number, Transform
from funnelrec.data.numeric import NumericTransform, fit_transform_for

NAN = float("nan")


def fitted(kind: Transform, *values: float) -> NumericTransform:
    return fit_transform_for(Number("x", kind), np.array(values, dtype=np.float64))


def applied(transform: NumericTransform, *values: float) -> list[list[float]]:
    return [[round(float(v), 4) for v in row] for row in transform.apply(np.array(values, dtype=np.float64))]


def test_quantile_by_hand() -> None:
    # Knots 0, 10, 20, 40 stand at 0, 1/3, 2/3, 1; 5 is half-way to 1/3, 30 half-way from 2/3 to 1.
    transform = fitted("quantile", 20, 0, 40, 10)
    assert applied(transform, 0, 5, 10, 30, 40) == [[0.0], [0.1667], [0.3333], [0.8333], [1.0]]


def test_quantile_clamps_beyond_the_training_values() -> None:
    assert applied(fitted("quantile", 1, 2, 3), -1e9, 1e9) == [[0.0], [1.0]]


def test_a_value_that_fills_several_quantiles_gets_the_middle_of_their_levels() -> None:
    # Levels 0, 1/4, 1/2 all hold 0: their middle is 1/4.
    assert applied(fitted("quantile", 0, 0, 0, 4, 8), 0, 2, 4, 8) == [[0.25], [0.5], [0.75], [1.0]]


def test_powers_by_hand() -> None:
    assert applied(fitted("powers", 0, 4), 1, 4) == [[0.25, 0.0625, 0.5], [1.0, 1.0, 1.0]]


def test_log_by_hand() -> None:
    # log1p: 0, 1, 2 (natural log of e and e^2), mean 1, std sqrt(2/3) = 0.8165; -(e-1) is -1.
    e = np.e
    transform = fitted("log", 0, e - 1, e * e - 1)
    assert applied(transform, 0, e - 1, e * e - 1, -(e - 1)) == [[-1.2247], [0.0], [1.2247], [-2.4495]]


def test_standard_by_hand() -> None:
    assert applied(fitted("standard", 1, 2, 3, 4), 1, 2.5, 6) == [[-1.3416], [0.0], [3.1305]]


def test_at_most_1000_knots() -> None:
    transform = fitted("quantile", *range(5000))
    assert len(transform.knots) == 1000
    assert applied(transform, 0, 2499.5, 4999) == [[0.0], [0.5], [1.0]]


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_missing_values_are_zero_and_do_not_enter_the_fit(kind: Transform) -> None:
    transform = fitted(kind, 1, NAN, 2, float("inf"), 3)
    assert transform == fitted(kind, 1, 2, 3)
    assert not transform.apply(np.array([NAN, np.inf, -np.inf])).any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("quantile", [0.5]), ("powers", [0.5, 0.25, 0.7071]), ("log", [0.0]), ("standard", [0.0])],
)
def test_constant_columns(kind: Transform, expected: list[float]) -> None:
    transform = fitted(kind, 0.1, 0.1, 0.1)
    assert applied(transform, 0.1, -5, 5) == [expected] * 3


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_columns_without_any_value(kind: Transform) -> None:
    transform = fitted(kind, NAN, NAN)
    out = transform.apply(np.array([NAN, 1.0]))
    assert out.shape == (2, transform.width)
    assert not out.any()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(TRANSFORMS),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=10),
)
def test_nothing_is_ever_nan_or_infinite_and_json_keeps_every_bit(
    kind: Transform, train: list[float], test: list[float]
) -> None:
    transform = fitted(kind, *train)
    values = np.array(train + test, dtype=np.float64)
    out = transform.apply(values)
    assert out.dtype == np.float32
    assert out.shape == (values.size, transform.width)
    assert np.isfinite(out).all()
    if kind in ("quantile", "powers"):
        assert ((out >= 0) & (out <= 1)).all()
    again = NumericTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform
    assert np.array_equal(again.apply(values), out)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TRANSFORMS), st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60))
def test_order_is_kept(kind: Transform, train: list[float]) -> None:
    values = np.sort(np.array(train))
    first = fitted(kind, *train).apply(values)[:, 0]
    assert (np.diff(first) >= 0).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be one of quantile, powers, log, standard, received 'cube'"):
        NumericTransform("cube")
    with pytest.raises(ValueError, match="received the keys kind, power"):
        NumericTransform.from_dict({"kind": "log", "power": 2})
    with pytest.raises(ValueError, match="a level a knot, received 0 and 1"):
        NumericTransform("quantile", knots=(1.0,))
