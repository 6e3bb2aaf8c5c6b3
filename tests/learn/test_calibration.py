from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression as Regression

from funnelrec.evaluate.metrics import auc, ece, log_loss, sigmoid
from funnelrec.learn.calibration import Calibration, Isotonic, Subsampling, Temperature, calibration_from_dict

Floats = npt.NDArray[np.float64]


def rows(n: int, seed: int, *, centre: float = -1.0, spread: float = 1.5) -> tuple[Floats, Floats]:
    """Labels, and the logits that they were drawn from."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(centre, spread, n)
    return (rng.random(n) < sigmoid(truth)).astype(np.float64), truth


# --------------------------------------------------------------------------------------------------- temperature
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    labels, truth = rows(40_000, 0)
    found = Temperature.fit(labels, truth * temperature)
    assert found.temperature == pytest.approx(temperature, rel=0.04)
    test, logits = rows(40_000, 1)
    before, after = sigmoid(logits * temperature), found.probabilities(logits * temperature)
    assert ece(test, after) < 0.01
    if temperature != 1.0:
        assert ece(test, before) > 0.06  # the control: it was not calibrated
    assert auc(test, after) == auc(test, logits)


def test_a_temperature_by_hand() -> None:
    """Logits ±2 of which 3 in 4 come true: the best says 3/4, so 2 / T = ln 3 and T = 1.820478."""
    logits, labels = np.array([2.0] * 4 + [-2.0] * 4), np.array([1.0, 1, 1, 0, 0, 0, 0, 1])
    found = Temperature.fit(labels, logits)
    assert found.temperature == pytest.approx(2 / math.log(3), abs=1e-9)
    assert found.probabilities(np.array([2.0, -2.0, 0.0])).tolist() == pytest.approx([0.75, 0.25, 0.5])


def test_the_temperature_is_that_of_a_regression_without_a_bias() -> None:
    labels, logits = rows(3000, 3)
    slope = Regression(C=np.inf, fit_intercept=False, tol=1e-10).fit(2.5 * logits[:, None], labels).coef_[0, 0]
    assert Temperature.fit(labels, 2.5 * logits).temperature == pytest.approx(1 / slope, rel=1e-4)


def test_where_no_temperature_is_best_the_nearest_bound_is_taken() -> None:
    labels = np.array([0.0, 0, 1, 1])
    assert Temperature.fit(labels, np.array([-2.0, -1, 1, 2])).temperature == pytest.approx(0.01)  # separated
    assert Temperature.fit(labels, np.array([2.0, 1, -1, -2])).temperature == pytest.approx(100)  # the wrong way round


# ------------------------------------------------------------------------------------------------------ isotonic
def test_an_isotonic_curve_by_hand() -> None:
    """Of the logits 1, 2, 3, 4 with labels 0, 1, 0, 1, the middle two are out of order and share 1/2; 6 rows in all
    would have to be seen before 0 and 1 were nearer than 1/6 (n + 2)."""
    curve = Isotonic.fit(np.array([0.0, 1, 0, 1]), np.array([1.0, 2, 3, 4]))
    assert curve.logits == (1.0, 2.0, 3.0, 4.0)
    assert curve.values == pytest.approx((1 / 6, 1 / 2, 1 / 2, 5 / 6))
    assert curve.probabilities(np.array([-9.0, 1.5, 2.7, 99.0])).tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2, 5 / 6])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=60))
def test_isotonic_never_falls_and_is_that_of_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    logits = np.array([float(z) for z, _ in pairs]) / 2
    labels = np.array([float(y) for _, y in pairs])
    if labels.min() == labels.max():
        return
    margin = 1 / (len(labels) + 2)
    theirs = IsotonicRegression(out_of_bounds="clip", y_min=margin, y_max=1 - margin).fit(logits, labels)
    anywhere = np.linspace(-4, 4, 101)
    ours = Isotonic.fit(labels, logits).probabilities(anywhere)
    np.testing.assert_allclose(ours, theirs.predict(anywhere), atol=1e-9)
    assert (np.diff(ours) >= 0).all()


def test_isotonic_mends_what_no_temperature_can() -> None:
    """Logits bent by a rising function, and shifted: their order is right, their size is not."""

    def bend(z: Floats) -> Floats:
        return np.cbrt(z) + 0.8

    labels, truth = rows(30_000, 0)
    test, logits = rows(30_000, 1)
    curve, heat = Isotonic.fit(labels, bend(truth)), Temperature.fit(labels, bend(truth))
    assert ece(test, curve.probabilities(bend(logits))) < 0.015
    assert ece(test, heat.probabilities(bend(logits))) > 0.05
    assert len(curve.logits) < 1000  # it holds levels, not rows
    p = curve.probabilities(bend(logits))
    assert log_loss(test, np.log(p / (1 - p))) == pytest.approx(log_loss(test, logits), abs=0.004)  # near the truth's


def test_isotonic_is_never_certain() -> None:
    curve = Isotonic.fit(np.array([0.0] * 50 + [1.0] * 50), np.linspace(-1, 1, 100))
    assert curve.probabilities(np.array([-1e9, 1e9])).tolist() == pytest.approx([1 / 102, 101 / 102])


# --------------------------------------------------------------------------------------------------- subsampling
def test_subsampling_by_hand() -> None:
    """p = .8 among rows of which a tenth of the negatives was kept: .8 / (.8 + .2 · 10) = .285714."""
    logit = np.array([math.log(4)])
    assert Subsampling(0.1).probabilities(logit)[0] == pytest.approx(0.8 / 2.8)
    assert Subsampling(1.0).probabilities(logit)[0] == pytest.approx(0.8)
    ends = Subsampling(1e-3).probabilities(np.array([-800.0, 800.0]))
    assert ends.tolist() == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.025])
def test_the_true_rate_comes_back_after_negatives_were_dropped(rate: float) -> None:
    """Clicks of 4 %; a regression is trained on all clicks and a share of the rest, then asked about all rows."""
    labels, truth = rows(120_000, 0, centre=-4.0, spread=1.2)
    kept = (labels == 1) | (np.random.default_rng(9).random(len(labels)) < rate)
    model = Regression(C=np.inf).fit(truth[kept, None], labels[kept])
    test, true_logits = rows(120_000, 1, centre=-4.0, spread=1.2)
    logits = model.decision_function(true_logits[:, None])
    mended = Subsampling(rate).probabilities(logits)
    assert sigmoid(logits).mean() > 1.5 * test.mean()  # the control: as trained, it says far too much
    assert mended.mean() == pytest.approx(test.mean(), rel=0.06)
    assert ece(test, mended) < 0.004
    assert auc(test, mended) == auc(test, logits)


def test_a_temperature_fitted_on_sampled_rows_stands_inside() -> None:
    labels, truth = rows(120_000, 0, centre=-3.5)
    kept = (labels == 1) | (np.random.default_rng(9).random(len(labels)) < 0.1)
    logits = 2.0 * (truth - math.log(0.1))  # right for the sampled rows but twice too sure
    inner = Temperature.fit(labels[kept], logits[kept])
    both = Subsampling(0.1, inner)
    assert inner.temperature == pytest.approx(2.0, rel=0.05)
    assert ece(labels, both.probabilities(logits)) < 0.005
    assert ece(labels, Subsampling(0.1).probabilities(logits)) > 0.02


# ------------------------------------------------------------------------------------------------ saved, refused
@pytest.mark.parametrize(
    "calibration",
    [
        Temperature(1.7),
        Isotonic((-1.0, 0.5, 2.0), (0.1, 0.1, 0.9)),
        Subsampling(0.1),
        Subsampling(0.25, Isotonic((0.0, 1.0), (0.2, 0.4))),
    ],
)
def test_through_json_it_stays_the_same(calibration: Calibration) -> None:
    assert isinstance(calibration, Calibration)
    again = calibration_from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False)))
    assert again == calibration
    z = np.linspace(-5, 5, 50)
    assert np.array_equal(again.probabilities(z), calibration.probabilities(z))


def test_float32_logits_are_welcome() -> None:
    labels, logits = rows(500, 0)
    narrow = logits.astype(np.float32)
    for fitted in (Temperature.fit(labels, narrow), Isotonic.fit(labels.astype(np.float32), narrow)):
        assert fitted.probabilities(narrow).dtype == np.float64


@pytest.mark.parametrize("fit", [Temperature.fit, Isotonic.fit])
def test_rows_that_cannot_be_calibrated_on(fit: object) -> None:
    assert callable(fit)
    with pytest.raises(ValueError, match="rows of both labels, received 3 rows"):
        fit(np.zeros(3), np.arange(3.0))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        fit(np.array([0.0, 5.0]), np.arange(2.0))
    with pytest.raises(ValueError, match="not finite"):
        fit(np.array([0.0, 1.0]), np.array([0.0, np.nan]))


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="positive number, received 0"):
        Temperature(0.0)
    with pytest.raises(ValueError, match="above 0 up to 1, received 10"):
        Subsampling(10.0)
    with pytest.raises(ValueError, match="at least one, received 0 and 0"):
        Isotonic((), ())
    with pytest.raises(ValueError, match="must rise and its values never fall"):
        Isotonic((0.0, 1.0), (0.5, 0.4))
    with pytest.raises(ValueError, match="must rise and its values never fall"):
        Isotonic((0.0, 1.0), (0.5, 1.4))
    with pytest.raises(ValueError, match="one of temperature, isotonic, subsampling, received 'magic'"):
        calibration_from_dict({"kind": "magic"})
    with pytest.raises(ValueError, match="a temperature calibration has"):
        calibration_from_dict({"kind": "temperature", "temperature": 1.0, "bias": 2.0})
    with pytest.raises(ValueError, match="sampled once"):
        calibration_from_dict(Subsampling(0.5).to_dict() | {"calibration": Subsampling(0.5).to_dict()})
