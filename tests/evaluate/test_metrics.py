"""Metrics against independent references (scikit-learn, ir-measures, brute force) and digits worked by hand."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.evaluate import metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # references may warn at import; that is not what is tested
    import ir_measures
    from sklearn import metrics as sk

Ints = npt.NDArray[np.int64]

# user 0: relevant {5, 7, 9, 11}, list 5 2 9 3 -> hits at 1 and 3; user 1: relevant {4}, list 8 6 4 2 -> hit at 3
RANKED = np.array([[5, 2, 9, 3], [8, 6, 4, 2]])
OFFSETS, ITEMS = np.array([0, 4, 5]), np.array([9, 5, 7, 11, 4])


def random_case(rng: np.random.Generator, users: int, items: int, k: int) -> tuple[Ints, Ints, Ints]:
    ranked = np.stack([rng.permutation(np.arange(2, items))[:k] for _ in range(users)])
    sizes = rng.integers(1, 9, users)
    wanted = [rng.choice(np.arange(2, items), size, replace=False) for size in sizes]
    return ranked, np.concatenate([[0], np.cumsum(sizes)]), np.concatenate(wanted)


class TestByHand:
    def test_recall_precision_hit_rate(self) -> None:
        assert metrics.recall(RANKED, OFFSETS, ITEMS, 3).tolist() == [0.5, 1.0]
        assert metrics.recall(RANKED, OFFSETS, ITEMS, 2).tolist() == [0.25, 0.0]
        np.testing.assert_allclose(metrics.precision(RANKED, OFFSETS, ITEMS, 3), [2 / 3, 1 / 3])
        assert metrics.precision(RANKED, OFFSETS, ITEMS, 8).tolist() == [0.25, 0.125]  # 4 places are missing: misses
        assert metrics.hit_rate(RANKED, OFFSETS, ITEMS, 2).tolist() == [1.0, 0.0]

    def test_mrr_and_average_precision(self) -> None:
        np.testing.assert_allclose(metrics.mrr(RANKED, OFFSETS, ITEMS, 3), [1.0, 1 / 3])
        # (1/1 + 2/3) / 4 relevant; (1/3) / 1
        np.testing.assert_allclose(metrics.average_precision(RANKED, OFFSETS, ITEMS, 3), [5 / 12, 1 / 3])

    def test_ndcg_ideal_has_min_k_relevant_hits(self) -> None:
        # DCG 1 + 1/2 = 1.5; ideal of 3 places 1 + 0.63093 + 0.5 = 2.13093 (4 relevant, 3 fit) -> 0.70392
        # ideal over the 2 hits found would be 1.63093 -> 0.91972: the mistake to avoid
        np.testing.assert_allclose(metrics.ndcg(RANKED, OFFSETS, ITEMS, 3), [0.70392, 0.5], atol=5e-6)
        np.testing.assert_allclose(metrics.ndcg(RANKED, OFFSETS, ITEMS, 1), [1.0, 0.0])
        # with room for all 4 relevant the ideal is 1 + 0.63093 + 0.5 + 0.43068 = 2.56161
        np.testing.assert_allclose(metrics.ndcg(RANKED, OFFSETS, ITEMS, 100)[0], 1.5 / 2.56161, atol=5e-6)

    def test_filler_and_repeated_items_are_misses(self) -> None:
        ranked = np.array([[5, 5, 0, 0]])
        hit = metrics.hits(ranked, np.array([0, 2]), np.array([0, 5]))
        assert hit.tolist() == [[True, False, False, False]]

    def test_user_without_relevant_items_is_nan_in_every_metric(self) -> None:
        ranked, offsets, items = np.array([[2, 3], [2, 3]]), np.array([0, 0, 1]), np.array([2])
        values = metrics.list_metrics(metrics.hits(ranked, offsets, items), np.diff(offsets), (1, 2))
        assert set(values) == {f"{name}@{k}" for name in metrics.LIST_METRICS for k in (1, 2)}
        for value in values.values():
            assert np.isnan(value[0])
            assert value[1] > 0

    def test_auc_gauc(self) -> None:
        labels, scores = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.5, 0.5, 0.1])
        assert metrics.auc(labels, scores) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
        assert metrics.auc(labels, np.zeros(4)) == 0.5
        assert np.isnan(metrics.auc(np.ones(3), np.arange(3.0)))
        # user 7: AUC 1 over 2 rows; user 8: AUC 0 over 4 rows; user 9: positives only, no say. (2*1 + 4*0) / 6
        users = np.array([7, 7, 8, 8, 8, 8, 9])
        labels = np.array([1.0, 0, 1, 0, 0, 0, 1])
        scores = np.array([0.2, 0.1, 0.1, 0.9, 0.8, 0.7, 0.5])
        assert metrics.gauc(labels, scores, users) == pytest.approx(1 / 3)
        assert np.isnan(metrics.gauc(np.ones(3), np.arange(3.0), np.arange(3)))

    def test_log_loss_normalised_entropy_rmse(self) -> None:
        labels = np.array([1.0, 0, 0, 0])
        base = np.log(0.25 / 0.75)
        assert metrics.normalised_entropy(labels, np.full(4, base)) == pytest.approx(1.0)
        assert metrics.log_loss(np.array([1.0]), np.array([0.0])) == pytest.approx(0.693147, abs=1e-6)
        assert metrics.log_loss(np.array([0.0]), np.array([1000.0])) == 1000.0  # linear, not infinite
        assert metrics.rmse(np.array([1.0, 5.0]), np.array([2.0, 3.0])) == pytest.approx(np.sqrt(2.5))

    def test_reliability_and_ece(self) -> None:
        labels = np.array([0.0, 0, 0, 1, 1, 1, 1, 0])
        p = np.array([0.1] * 4 + [0.9] * 4)
        found = metrics.reliability(labels, p, bins=2)
        assert found.count.tolist() == [4, 4]
        np.testing.assert_allclose(found.observed, [0.25, 0.75])
        assert metrics.ece(labels, p, 2) == pytest.approx(0.15)
        assert metrics.ece(labels, p, 10, by="width") == pytest.approx(0.15)
        assert metrics.reliability(labels, np.full(8, 0.5), bins=4).count.tolist() == [8]  # equals stay together

    def test_calibrated_and_overconfident_predictions(self) -> None:
        rng = np.random.default_rng(0)
        z = rng.normal(-2, 1.5, 200_000)
        labels = (rng.random(z.size) < metrics.sigmoid(z)).astype(np.float64)
        assert metrics.ece(labels, metrics.sigmoid(z)) < 0.004
        assert metrics.ece(labels, metrics.sigmoid(2 * z)) > 0.03

    def test_coverage_novelty_diversity(self) -> None:
        ranked = np.array([[2, 3, 0], [2, 4, 5]])
        assert metrics.coverage(ranked, 8) == 0.5
        counts = np.array([0, 0, 4, 2, 2, 0])  # shares 1/2 1/4 1/4; item 5 never seen counts as once: 1/8
        np.testing.assert_allclose(metrics.novelty(ranked, counts), [1.5, 2.0])
        genre = np.array([[0, 0], [0, 0], [1, 2], [2, 0], [3, 0], [3, 1]])
        # 2 and 3 share genre 2 -> 0; (2,4) differ, (2,5) share 1, (4,5) share 3 -> 1/3
        np.testing.assert_allclose(metrics.attribute_diversity(ranked, genre), [0.0, 1 / 3])
        assert np.isnan(metrics.attribute_diversity(np.array([[2, 0]]), genre)[0])
        vectors = np.array([[0, 0], [0, 0], [2, 0], [0, 3], [1, 0], [-1, 0]], dtype=np.float64)
        # cosines: (2,4) 1, (2,5) -1, (4,5) -1 -> mean -1/3
        np.testing.assert_allclose(metrics.vector_diversity(ranked, vectors), [1.0, 4 / 3], atol=1e-12)


class TestReferences:
    @pytest.mark.parametrize("k", [1, 5, 10, 30])
    def test_list_metrics_equal_ir_measures_on_4000_users(self, k: int) -> None:
        rng = np.random.default_rng(k)
        ranked, offsets, items = random_case(rng, 1000, 60, 20)
        ours = metrics.list_metrics(metrics.hits(ranked, offsets, items), np.diff(offsets), (k,))
        qrels = [ir_measures.Qrel(str(u), str(i), 1) for u in range(1000) for i in items[offsets[u] : offsets[u + 1]]]
        run = [
            ir_measures.ScoredDoc(str(u), str(item), float(20 - place))
            for u in range(1000)
            for place, item in enumerate(ranked[u])
        ]
        names = {
            ir_measures.R @ k: "recall",
            ir_measures.P @ k: "precision",
            ir_measures.RR @ k: "mrr",
            ir_measures.nDCG @ k: "ndcg",
            ir_measures.AP @ k: "average_precision",
            ir_measures.Success @ k: "hit_rate",
        }
        compared = 0
        for found in ir_measures.iter_calc(list(names), qrels, run):
            value = ours[f"{names[found.measure]}@{k}"][int(found.query_id)]
            assert abs(value - found.value) < 1e-9, (found, value)
            compared += 1
        assert compared == 6 * 1000

    def test_ndcg_equals_scikit_learn_on_3000_users(self) -> None:
        rng = np.random.default_rng(5)
        ranked, offsets, items = random_case(rng, 3000, 40, 38)
        relevance, score = np.zeros((3000, 40)), np.zeros((3000, 40))
        relevance[np.repeat(np.arange(3000), np.diff(offsets)), items] = 1
        np.put_along_axis(score, ranked, np.arange(38, 0, -1.0)[None], axis=1)
        for k in (1, 3, 10, 38):
            ours = metrics.ndcg(ranked, offsets, items, k)
            assert abs(ours.mean() - sk.ndcg_score(relevance, score, k=k)) < 1e-9

    def test_auc_log_loss_equal_scikit_learn_on_1200_cases_with_ties(self) -> None:
        rng = np.random.default_rng(6)
        for case in range(1200):
            n = int(rng.integers(4, 60))
            labels = rng.integers(0, 2, n).astype(np.float64)
            labels[:2] = 0, 1
            logits = rng.integers(-3, 4, n).astype(np.float64) if case % 3 else rng.normal(size=n) * 5
            assert abs(metrics.auc(labels, logits) - sk.roc_auc_score(labels, logits)) < 1e-9
            if case % 5:
                continue  # the reference for the log loss is slow
            probabilities = metrics.sigmoid(logits)
            assert abs(metrics.log_loss(labels, logits) - sk.log_loss(labels, probabilities)) < 1e-9

    def test_gauc_equals_a_loop_over_users(self) -> None:
        rng = np.random.default_rng(7)
        for _ in range(20):
            n = 300
            users, labels = rng.integers(0, 40, n), rng.integers(0, 2, n).astype(np.float64)
            scores = rng.integers(0, 6, n).astype(np.float64)
            total = weight = 0.0
            for user in np.unique(users):
                own = users == user
                if 0 < labels[own].mean() < 1:
                    total += own.sum() * sk.roc_auc_score(labels[own], scores[own])
                    weight += own.sum()
            assert abs(metrics.gauc(labels, scores, users) - total / weight) < 1e-9

    def test_auc_of_float32_scores_a_million_rows_is_exact(self) -> None:
        rng = np.random.default_rng(8)
        labels = (rng.random(1_000_000) < 0.1).astype(np.float32)
        scores = np.round(rng.normal(size=1_000_000) + labels, 3).astype(np.float32)
        assert abs(metrics.auc(labels, scores) - sk.roc_auc_score(labels, scores)) < 1e-9

    def test_diversity_equals_a_loop_over_pairs(self) -> None:
        rng = np.random.default_rng(9)
        ranked = np.where(rng.random((40, 6)) < 0.2, 0, np.stack([rng.permutation(18)[:6] + 2 for _ in range(40)]))
        genre, vectors = rng.integers(0, 5, (20, 3)), rng.normal(size=(20, 4))
        by_genre, by_vector = metrics.attribute_diversity(ranked, genre), metrics.vector_diversity(ranked, vectors)
        for b in range(40):
            real = [i for i in ranked[b] if i]
            pairs = [(i, j) for n, i in enumerate(real) for j in real[n + 1 :]]
            if not pairs:
                assert np.isnan(by_genre[b])
                continue
            differ = [not (set(genre[i]) & set(genre[j])) - {0} for i, j in pairs]
            cosine = [
                vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]) for i, j in pairs
            ]
            assert by_genre[b] == pytest.approx(np.mean(differ))
            assert by_vector[b] == pytest.approx(1 - np.mean(cosine))


class TestTies:
    def test_target_rank_counts_equals_against_the_target(self) -> None:
        scores = np.array([[3.0, 2.0, 2.0, 1.0]])
        for column, rank in enumerate([1, 3, 3, 4]):
            assert metrics.target_rank(scores, scores[:, column]).tolist() == [rank]

    def test_constant_scorer_is_at_chance_or_below(self) -> None:
        constant = np.zeros((50, 1000))
        assert (metrics.target_rank(constant, constant[:, 3]) == 1000).all()
        assert metrics.auc(np.tile([0.0, 1.0], 50), np.zeros(100)) == 0.5
        optimistic = 1 + (constant > 0).sum(axis=1)  # the count to avoid: everyone would be first
        assert (optimistic == 1).all()

    def test_random_scorer_meets_its_closed_form_expectation(self) -> None:
        users, items, k = 20_000, 200, 10
        rng = np.random.default_rng(0)
        scores = rng.random((users, items))
        hit = metrics.target_rank(scores, scores[:, 0]) <= k
        p = k / items
        assert abs(hit.mean() - p) < 3 * np.sqrt(p * (1 - p) / users)

    def test_nan_counts_against_the_target_or_is_refused(self) -> None:
        assert metrics.target_rank(np.array([[np.nan, 1.0]]), np.array([1.0])).tolist() == [2]
        with pytest.raises(ValueError, match="target is NaN"):
            metrics.target_rank(np.array([[np.nan, 1.0]]), np.array([np.nan]))

    def test_hits_of_a_group_of_equal_scores_move_to_its_end(self) -> None:
        hit = np.array([[True, False, False, True, False]])
        scores = np.array([[2.0, 2.0, 2.0, 1.0, 0.5]])
        assert metrics.pessimistic_hits(hit, scores).tolist() == [[False, False, True, True, False]]
        # the last two tie, and the tie may go on: the hit is not counted
        open_end = np.array([[3.0, 2.5, 2.0, 1.0, 1.0]])
        assert metrics.pessimistic_hits(hit, open_end).tolist() == [[True, False, False, False, False]]
        # the list ran out after place 4, so nothing goes on
        ended = np.array([[3.0, 2.5, 1.0, 1.0, -np.inf]])
        assert metrics.pessimistic_hits(hit, ended, 4).tolist() == [[True, False, False, True]]

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_pessimistic_hits_equal_conservative_ranks(self, seed: int) -> None:
        """One relevant item: the place of the moved hit is the target's conservative rank over the catalogue."""
        rng = np.random.default_rng(seed)
        items, k = 30, 7
        scores = rng.integers(0, 8, (20, items)).astype(np.float64)
        target = rng.integers(0, items, 20)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : k + 1]
        hit = order == target[:, None]
        moved = metrics.pessimistic_hits(hit, np.take_along_axis(scores, order, axis=1), k)
        rank = metrics.target_rank(scores, scores[np.arange(20), target])
        assert (moved.any(axis=1) == (rank <= k)).all()
        assert (moved.argmax(axis=1)[rank <= k] + 1 == rank[rank <= k]).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("offsets", "items", "match"),
        [
            ([0, 1], [3], "one entry more"),
            ([0, 2, 1], [3], "must rise from 0"),
            ([1, 2, 3], [3, 4, 5], "must rise from 0"),
            ([0, 0, 2], [3, 3], "user 1 name item row 3 twice"),
        ],
    )
    def test_csr_that_does_not_fit(self, offsets: list[int], items: list[int], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            metrics.hits(np.array([[2, 3], [4, 5]]), np.array(offsets), np.array(items))

    def test_rows(self) -> None:
        good = np.array([0.0, 1.0])
        with pytest.raises(ValueError, match="of one length, received 2 and 3"):
            metrics._require_one_length(good, np.zeros(3))  # past the shape check of the test run
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            metrics.auc(np.array([0.0, 2.0]), good)
        with pytest.raises(ValueError, match="a score is NaN"):
            metrics.log_loss(good, np.array([0.0, np.nan]))
        with pytest.raises(ValueError, match="no rows"):
            metrics.auc(np.zeros(0), np.zeros(0))
        with pytest.raises(ValueError, match="received logits"):
            metrics.ece(good, np.array([-1.0, 2.0]))
        with pytest.raises(ValueError, match="k must be at least 1, received 0"):
            metrics.recall(RANKED, OFFSETS, ITEMS, 0)
        with pytest.raises(ValueError, match="num_items must be at least 1"):
            metrics.coverage(RANKED, 0)


def test_nothing_to_find_and_empty_lists() -> None:
    assert metrics.hits(np.zeros((2, 3), dtype=np.int64), np.array([0, 0, 0]), np.zeros(0, dtype=np.int64)).sum() == 0
    assert metrics.hits(np.zeros((1, 0), dtype=np.int64), np.array([0, 1]), np.array([3])).shape == (1, 0)


def test_ids_beyond_2_to_the_31_do_not_collide() -> None:
    big = 2**33
    hit = metrics.hits(np.array([[big, big + 1]]), np.array([0, 1]), np.array([big + 1]))
    assert hit.tolist() == [[False, True]]
