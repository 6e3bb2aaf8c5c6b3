"""Intervals cover the truth as often as they say, tests are wrong as often as they say, and differences are found."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from funnelrec.evaluate import significance
from funnelrec.evaluate.metrics import auc, normalised_entropy
from funnelrec.evaluate.significance import (
    auc_interval,
    bootstrap_interval,
    entropy_interval,
    holm,
    paired_auc_difference,
    paired_entropy_difference,
    paired_test,
)

Floats = npt.NDArray[np.float64]


def clicks(rng: np.random.Generator, users: int, rows: int) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Rows whose scores lean with their user, so rows of a user are far from independent."""
    user = np.repeat(np.arange(users), rows)
    lean = rng.normal(size=users)[user]
    labels = (rng.random(user.size) < 1 / (1 + np.exp(-lean))).astype(np.float64)
    return user, labels, 0.8 * labels + rng.normal(size=users)[user] + rng.normal(size=user.size)


class TestBootstrap:
    @pytest.mark.parametrize("kind", ["hit_rate", "skewed"])
    def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent_of_1000(self, kind: str) -> None:
        rng = np.random.default_rng(11)
        covered = 0
        for seed in range(1000):
            if kind == "hit_rate":
                values, truth = (rng.random(400) < 0.3).astype(np.float64), 0.3
            else:
                values, truth = rng.gamma(2.0, 0.5, 300), 1.0
            found = bootstrap_interval(values, resamples=500, seed=seed)
            covered += found.low <= truth <= found.high
        assert 930 <= covered <= 970

    def test_both_ways_of_drawing_agree_with_theory(self) -> None:
        rng = np.random.default_rng(1)
        few, many = rng.integers(0, 3, 5000) / 2, rng.random(5000)
        for values in (few, many):
            found = bootstrap_interval(values, resamples=4000)
            assert found.half == pytest.approx(1.96 * values.std() / math.sqrt(5000), rel=0.06)
            assert found.mean == pytest.approx(values.mean())
            assert found.low < found.mean < found.high

    def test_many_different_values_use_the_normal_limit_of_the_same_interval(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = np.random.default_rng(3).gamma(2.0, 1.0, 5000)
        drawn = bootstrap_interval(values, resamples=4000)
        monkeypatch.setattr(significance, "_DRAW_LIMIT", 100)
        closed = bootstrap_interval(values)
        assert (closed.low, closed.high) == pytest.approx((drawn.low, drawn.high), abs=0.06 * drawn.half)

    def test_seed_level_and_constant(self) -> None:
        values = np.random.default_rng(2).random(200)
        assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
        assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
        assert bootstrap_interval(values, level=0.5).half < bootstrap_interval(values, level=0.99).half
        same = bootstrap_interval(np.full(9, 0.25))
        assert (same.low, same.mean, same.high) == (0.25, 0.25, 0.25)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="1 of 2 values are NaN"):
            bootstrap_interval(np.array([1.0, np.nan]))
        with pytest.raises(ValueError, match="no users"):
            bootstrap_interval(np.zeros(0))
        with pytest.raises(ValueError, match=r"level must lie between 0 and 1, received 95\.0"):
            bootstrap_interval(np.ones(3), level=95.0)


class TestPaired:
    def test_a_against_a_is_significant_in_3_to_7_percent(self) -> None:
        """Two runs of one model: the same quality a user, noise of their own."""
        rng = np.random.default_rng(3)
        t = flip = 0
        for seed in range(1000):
            quality = rng.beta(1, 4, 250)
            a, b = ((rng.random(250) < quality).astype(np.float64) for _ in range(2))
            found = paired_test(a, b, permutations=500, seed=seed)
            t += found.p_t < 0.05
            flip += found.p_randomisation < 0.05
        assert 30 <= t <= 70
        assert 30 <= flip <= 70

    def test_a_planted_difference_is_found_and_measured(self) -> None:
        rng = np.random.default_rng(4)
        found, covered = 0, 0
        for seed in range(200):
            quality = rng.beta(2, 4, 600)
            a = quality + 0.02 + rng.normal(0, 0.1, 600)
            result = paired_test(a, quality + rng.normal(0, 0.1, 600), permutations=500, seed=seed)
            found += result.p_t < 0.05 and result.p_randomisation < 0.05
            covered += result.interval.low <= 0.02 <= result.interval.high
        assert found >= 180  # power of this design is .93
        assert 180 <= covered <= 199
        assert result.effect_size == pytest.approx(0.02 / 0.1414, abs=0.09)

    @pytest.mark.parametrize("users", [2, 5, 40, 3000])
    def test_t_test_equals_scipy(self, users: int) -> None:
        rng = np.random.default_rng(users)
        a, b = rng.random(users), rng.random(users)
        reference = stats.ttest_rel(a, b)
        found = paired_test(a, b, permutations=10)
        assert found.t == pytest.approx(float(reference.statistic), rel=1e-9)
        assert found.p_t == pytest.approx(float(reference.pvalue), rel=1e-9)
        interval = reference.confidence_interval(0.95)
        assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-9)

    def test_student_tail_equals_scipy_far_out(self) -> None:
        for freedom in (1, 2, 7, 100, 50_000, 2_000_000):
            for t in (0.0, 0.3, 2.0, 6.0, 30.0):
                ours, theirs = significance._student_tail(t, freedom), float(stats.t.sf(t, freedom))
                assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-290)

    def test_randomisation_equals_counting_all_sign_patterns(self) -> None:
        d = np.array([3.0, 1.0, 2.0, -1.0, 2.0, 0.0, 4.0, 1.0, -2.0])
        moved = d[d != 0]
        signs = 1 - 2 * ((np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1)
        exact = float((np.abs(signs @ np.abs(moved)) >= abs(d.sum())).mean())
        found = paired_test(d, np.zeros(9), permutations=40_000)
        assert found.p_randomisation == pytest.approx(exact, abs=0.01)

    def test_many_users_use_the_normal_limit_of_the_same_p(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(5)
        a = rng.random(30_000)
        b = a + rng.normal(0.0012, 0.1, 30_000)
        closed = paired_test(a, b).p_randomisation
        monkeypatch.setattr(significance, "_FLIP_LIMIT", 10**9)
        drawn = paired_test(a, b, permutations=4000).p_randomisation
        assert closed == pytest.approx(drawn, abs=0.02)

    def test_identical_and_shifted_models(self) -> None:
        a = np.random.default_rng(6).random(50)
        same = paired_test(a, a)
        assert (same.difference, same.p_t, same.p_randomisation, same.effect_size) == (0.0, 1.0, 1.0, 0.0)
        shifted = paired_test(np.ones(50), np.zeros(50))
        assert shifted.p_t == 0.0
        assert shifted.p_randomisation == pytest.approx(1 / 10_001)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="at least 2 users, received 1"):
            paired_test(np.ones(1), np.ones(1))
        with pytest.raises(ValueError, match="leave out users without relevant items"):
            paired_test(np.ones(2), np.array([np.nan, 1.0]))


class TestAUC:
    def test_rows_interval_covers_the_truth_in_93_to_97_percent_of_1000(self) -> None:
        truth = float(stats.norm.cdf(1 / math.sqrt(2)))  # scores N(1, 1) against N(0, 1)
        rng = np.random.default_rng(7)
        covered = 0
        for _ in range(1000):
            labels = (rng.random(300) < 0.3).astype(np.float64)
            found = auc_interval(labels, rng.normal(size=300) + labels)
            covered += found.low <= truth <= found.high
        assert 930 <= covered <= 970

    def test_users_interval_covers_where_the_rows_interval_is_far_too_narrow(self) -> None:
        rng = np.random.default_rng(8)
        truth = np.mean([auc(*clicks(rng, 4000, 10)[1:]) for _ in range(40)])
        by_user = by_row = 0
        for _ in range(1000):
            user, labels, scores = clicks(rng, 100, 10)
            found, naive = auc_interval(labels, scores, user), auc_interval(labels, scores)
            by_user += found.low <= truth <= found.high
            by_row += naive.low <= truth <= naive.high
        assert 930 <= by_user <= 970
        assert by_row < 900  # the fault that summing within users mends

    def test_users_interval_equals_the_bootstrap_over_users(self) -> None:
        rng = np.random.default_rng(9)
        user, labels, scores = clicks(rng, 300, 8)
        rows = np.arange(user.size).reshape(300, 8)
        drawn = []
        for _ in range(600):
            pick = rows[rng.integers(0, 300, 300)].ravel()
            drawn.append(auc(labels[pick], scores[pick]))
        assert auc_interval(labels, scores, user).half == pytest.approx(1.96 * np.std(drawn), rel=0.1)

    def test_a_against_a_and_a_planted_difference(self) -> None:
        rng = np.random.default_rng(10)
        wrong = found = 0
        for _ in range(1000):
            user, labels, signal = clicks(rng, 80, 8)
            a, b = (signal + rng.normal(size=user.size) for _ in range(2))
            wrong += paired_auc_difference(labels, a, b, user).p < 0.05
            better = signal + 0.4 * labels
            found += paired_auc_difference(labels, better, a, user).p < 0.05
        assert 30 <= wrong <= 70
        assert found >= 700

    def test_pairing_is_sharper_than_two_intervals(self) -> None:
        rng = np.random.default_rng(12)
        _, labels, scores = clicks(rng, 200, 10)
        other = scores + 0.1 * rng.normal(size=scores.size)
        found = paired_auc_difference(labels, scores, other)
        assert found.difference == pytest.approx(auc(labels, scores) - auc(labels, other))
        assert found.interval.half < auc_interval(labels, scores).half / 5

    def test_edges(self) -> None:
        labels = np.array([0.0, 1, 0, 1])
        assert math.isnan(auc_interval(np.ones(4), np.arange(4.0)).mean)
        perfect = auc_interval(labels, labels)
        assert (perfect.low, perfect.mean, perfect.high) == (1.0, 1.0, 1.0)
        same = paired_auc_difference(labels, labels, labels)
        assert (same.difference, same.z, same.p) == (0.0, 0.0, 1.0)
        with pytest.raises(ValueError, match="rows of both labels"):
            paired_auc_difference(np.ones(4), np.arange(4.0), np.arange(4.0))
        with pytest.raises(ValueError, match="at least 2 users, received 1"):
            auc_interval(labels, np.arange(4.0), np.zeros(4, dtype=np.int64))


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .5 times 4 3 2 1 = .04 .06 .06 .5 (running maximum)
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


# ------------------------------------------------------------------------------------------- normalised entropy
def entropies_by_drawing(labels: Floats, *logits: Floats) -> Floats:
    """Normalised entropies [1500, m] of rows drawn again with replacement, by the definition."""
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, labels.size, labels.size) for _ in range(1500)]
    return np.array([[normalised_entropy(labels[i], z[i]) for z in logits] for i in drawn])


def test_the_interval_of_an_entropy_is_that_of_the_bootstrap() -> None:
    """The base rate is estimated as well: leaving that out would make the interval too wide."""
    rng = np.random.default_rng(0)
    truth = rng.normal(-2.0, 1.5, 3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-truth))).astype(np.float64)
    other = truth + rng.normal(0, 0.5, 3000)
    drawn = entropies_by_drawing(labels, truth, other)
    for column, logits in enumerate((truth, other)):
        ours = entropy_interval(labels, logits)
        assert ours.mean == pytest.approx(normalised_entropy(labels, logits))
        assert ours.half == pytest.approx(1.96 * drawn[:, column].std(), rel=0.08)
    rate = labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    naive = 1.96 * (np.logaddexp(0, truth) - labels * truth).std() / np.sqrt(3000) / entropy
    assert naive > 1.2 * entropy_interval(labels, truth).half  # the control
    paired = paired_entropy_difference(labels, truth, other)
    assert paired.mean == pytest.approx(ours_difference := normalised_entropy(labels, truth) - ours.mean)
    assert ours_difference < 0  # the truth is better
    assert paired.half == pytest.approx(1.96 * (drawn[:, 0] - drawn[:, 1]).std(), rel=0.08)
    assert paired.half < 0.6 * ours.half


def test_rows_of_a_user_are_one_piece_of_evidence() -> None:
    """Every row five times over tells nothing new: by users the interval stays, by rows it shrinks by sqrt(5)."""
    rng = np.random.default_rng(1)
    labels, logits = (rng.random(500) < 0.3).astype(np.float64), rng.normal(-1, 1, 500)
    once = entropy_interval(labels, logits)
    five = np.repeat(labels, 5), np.repeat(logits, 5)
    assert entropy_interval(*five, np.repeat(np.arange(500), 5)).half == pytest.approx(once.half)
    assert entropy_interval(*five).half == pytest.approx(once.half / np.sqrt(5), rel=0.01)


def test_an_entropy_of_one_label_is_not_defined() -> None:
    assert math.isnan(entropy_interval(np.zeros(5), np.zeros(5)).low)
    with pytest.raises(ValueError, match="rows of both labels"):
        paired_entropy_difference(np.zeros(5), np.zeros(5), np.ones(5))
