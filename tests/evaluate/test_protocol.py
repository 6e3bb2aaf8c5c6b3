"""The protocol: exact ranks, ties against the model, slices, bounded memory, refusals to compare the incomparable."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.evaluate import metrics
from funnelrec.evaluate.protocol import (
    MatchResult,
    QuerySource,
    compare,
    compare_rankers,
    evaluate_matcher,
    evaluate_ranker,
    full_rank,
    require_comparable,
)

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_world import FakeQueries, FirstNumber, TableMatcher, VectorModel, rows_world

ITEMS = 40


def random_world(users: int = 60, seed: int = 0) -> tuple[FakeQueries, torch.Tensor]:
    rng = np.random.default_rng(seed)
    seen = [rng.choice(np.arange(2, ITEMS), rng.integers(0, 15), replace=False).tolist() for _ in range(users)]
    wanted = []
    for past in seen:
        new = np.setdiff1d(np.arange(2, ITEMS), past)
        wanted.append(rng.choice(new, rng.integers(1, 5), replace=False).tolist())
    return FakeQueries(wanted, seen=seen), torch.from_numpy(rng.random((users, ITEMS)))


class TestMatcher:
    def test_by_hand(self) -> None:
        queries = FakeQueries([[3], [2, 4]], seen=[[], [3]])
        scores = np.array([[0, 0, 0.9, 0.5, 0.1], [0, 0, 0.2, 0.9, 0.5]])
        result = evaluate_matcher(TableMatcher(scores), queries, ks=(2, 1))
        assert result.ks == (1, 2)
        assert result.user.tolist() == [100, 101]
        assert result.metrics["recall@1"].tolist() == [0.0, 0.5]
        assert result.metrics["recall@2"].tolist() == [1.0, 1.0]
        np.testing.assert_allclose(result.metrics["ndcg@2"], [0.63093, 1.0], atol=1e-5)
        assert result.means["hit_rate@1"] == 0.5
        assert result.history_length.tolist() == [0, 1]
        assert (result.split, result.exclude_seen, result.skipped) == ("split-1", True, 0)
        kept = evaluate_matcher(TableMatcher(scores), queries, ks=(2,), exclude_seen=False)
        assert kept.metrics["recall@2"].tolist() == [1.0, 0.5]  # the seen item takes a place

    def test_equals_the_metrics_of_the_whole_ranking(self) -> None:
        queries, scores = random_world()
        result = evaluate_matcher(TableMatcher(scores), queries, ks=(5, 20), batch_size=7)
        masked = scores.numpy().copy()
        masked[:, :2] = -1
        for user, past in enumerate(queries.past):
            masked[user, past] = -1
        ranked = np.argsort(-masked, axis=1)
        for k in (5, 20):
            np.testing.assert_allclose(
                result.metrics[f"ndcg@{k}"], metrics.ndcg(ranked, *queries.relevant, k), atol=1e-6
            )

    @pytest.mark.parametrize("batch_size", [1, 13, 1000])
    def test_batch_size_changes_nothing(self, batch_size: int) -> None:
        queries, scores = random_world()
        a = evaluate_matcher(TableMatcher(scores), queries, ks=(5,))
        b = evaluate_matcher(TableMatcher(scores), queries, ks=(5,), batch_size=batch_size)
        assert a.queries == b.queries
        for name, value in a.metrics.items():
            assert (value == b.metrics[name]).all()

    def test_constant_scorer_is_not_better_than_chance(self) -> None:
        """Rows are numbered by popularity, so a constant scorer whose ties go to the lower row shows popular items."""
        queries = FakeQueries([[2 + user % 5] for user in range(50)])
        matcher = TableMatcher(np.zeros((50, ITEMS)))
        assert evaluate_matcher(matcher, queries, ks=(10,)).means["recall@10"] <= 10 / (ITEMS - 2)
        # the planted fault: trusting the order of the list makes it perfect
        assert evaluate_matcher(matcher, queries, ks=(10,), ties="as_ranked").means["recall@10"] == 1.0

    def test_lists_that_run_out_are_misses(self) -> None:
        queries = FakeQueries([[2], [0, 3]])
        scores = np.full((2, 5), -np.inf)
        scores[0, 2] = 1.0
        result = evaluate_matcher(TableMatcher(scores), queries, ks=(10,))
        assert result.metrics["recall@10"].tolist() == [1.0, 0.0]

    def test_users_without_relevant_items_are_left_out_and_counted(self) -> None:
        queries = FakeQueries([[], [3], []])
        result = evaluate_matcher(TableMatcher(np.arange(15.0).reshape(3, 5)), queries, ks=(1,))
        assert result.user.tolist() == [101]
        assert result.skipped == 2
        with pytest.raises(ValueError, match="none of the 2 queries has a relevant item"):
            evaluate_matcher(TableMatcher(np.zeros((2, 5))), FakeQueries([[], []]))

    def test_slices_coverage_novelty_diversity(self) -> None:
        queries = FakeQueries([[2, 5], [3], [4, 5]], seen=[[], [2], [2, 3]])
        scores = np.array([[0, 0, 9, 8, 7, 1], [0, 0, 9, 8, 7, 1], [0, 0, 9, 8, 7, 1]])
        counts = np.array([0, 0, 4, 2, 2, 0])
        genre = np.array([[0], [0], [1], [1], [2], [2]])
        result = evaluate_matcher(
            TableMatcher(scores), queries, ks=(2,), item_counts=counts, item_attribute=genre, short=1
        )
        slices = {name: values["recall@2"].tolist() for name, values in result.slices().items()}
        # lists: 2 3 | 3 4 | 4 5; item 5 is new
        assert slices == {
            "no history": [0.5],
            "history of 1–1": [1.0],
            "history over 1": [1.0],
            "items seen in training": [1.0, 1.0, 1.0],
            "items new since training": [0.0, 1.0],
        }
        assert result.beyond["coverage@2"] == 1.0
        assert result.beyond["novelty@2"] == pytest.approx((1.5 + 2.0 + 2.5) / 3)
        assert result.beyond["diversity@2"] == pytest.approx(1 / 3)

    def test_the_model_is_in_evaluation_mode_and_put_back(self) -> None:
        class Mode(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.part, self.seen_modes = nn.Linear(1, 1), []
                self.part.eval()  # one part was frozen by its owner

            def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
                self.seen_modes.append((self.training, torch.is_grad_enabled()))
                return TableMatcher(torch.rand(2, 5)).recommend(batch, k, exclude)

        model = Mode()
        evaluate_matcher(model, FakeQueries([[2], [3]]), ks=(1,))
        assert model.seen_modes == [(False, False)]
        assert model.training
        assert not model.part.training

    def test_the_fake_and_the_contract_agree(self) -> None:
        assert isinstance(FakeQueries([[2]]), QuerySource)

    @pytest.mark.parametrize(
        ("rows", "scores", "match"),
        [
            ([[3, 3, 2]], [[3.0, 2.0, 1.0]], "item row 3 twice in one list"),
            ([[3, 4, 2]], [[3.0, np.nan, 1.0]], "a score of NaN"),
            ([[3, 9, 2]], [[3.0, 2.0, 1.0]], "item row 9, but item_counts has 6 rows"),
        ],
    )
    def test_broken_matchers_are_refused(self, rows: list[list[int]], scores: list[list[float]], match: str) -> None:
        class Broken:
            def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
                return torch.tensor(rows), torch.tensor(scores)

        with pytest.raises(ValueError, match=match):
            evaluate_matcher(Broken(), FakeQueries([[2]]), ks=(2,), item_counts=np.ones(6, dtype=np.int64))

    def test_ks(self) -> None:
        with pytest.raises(ValueError, match=r"at least 1, received \(0, 5\)"):
            evaluate_matcher(TableMatcher(np.zeros((1, 5))), FakeQueries([[2]]), ks=(0, 5))

    def test_memory_does_not_grow_with_the_number_of_users(self) -> None:
        """Four times the users: the peak above what is kept (per-user numbers) stays the same."""

        class Endless:
            """Questions that are made when they are asked."""

            def __init__(self, users: int) -> None:
                self.users = users
                self.relevant = (np.arange(users + 1), np.full(users, 7))

            def __len__(self) -> int:
                return self.users

            def gather(self, index: Tensor) -> Batch:
                zeros = torch.zeros(len(index), 1, dtype=torch.int64)
                return Batch(user=index, time=index, history=zeros, mask=zeros > 0)

            def seen(self, index: Tensor) -> Tensor:
                return torch.zeros(len(index), 0, dtype=torch.int64)

        class Fixed:
            def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
                rows = torch.arange(2, 2 + k).expand(len(batch.user), k)
                return rows, -rows.float()

        peaks = []
        for users in (20_000, 80_000):
            queries = Endless(users)
            tracemalloc.start()
            result = evaluate_matcher(Fixed(), queries, ks=(10, 50), batch_size=1000)
            kept, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert result.user.size == users
            peaks.append((peak, kept))
        (small, _), (large, kept) = peaks
        per_user = (kept - peaks[0][1]) / 60_000
        assert per_user < 150  # 12 float32 metrics, user and length: 64 bytes, and the lists of parts
        assert large - small < 60_000 * 3 * per_user


class TestFullRank:
    def world(self, seed: int) -> tuple[FakeQueries, VectorModel]:
        queries, _ = random_world(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        interests = torch.randint(-2, 3, (60, 3, 2), generator=generator).float()
        valid = torch.rand(60, 3, generator=generator) < 0.6
        items = torch.randint(-2, 3, (ITEMS, 2), generator=generator).float()
        return queries, VectorModel(interests, valid, items)

    @pytest.mark.parametrize("exclude_seen", [True, False])
    def test_equals_a_loop_over_everything(self, exclude_seen: bool) -> None:
        queries, model = self.world(3)
        ranks = full_rank(model, queries, ITEMS, batch_size=7, exclude_seen=exclude_seen)
        expected = []
        with torch.no_grad():
            for user, wanted in enumerate(queries.wanted):
                vectors = model.interests[user][model.valid[user]]
                banned = {0, 1, *(queries.past[user] if exclude_seen else ())}
                value = (
                    {i: max(float(v @ model.items[i]) for v in vectors) for i in range(ITEMS)} if len(vectors) else {}
                )
                for target in wanted:
                    others = [i for i in range(ITEMS) if i not in banned and i != target]
                    worst = ITEMS - 2
                    expected.append(1 + sum(value[i] >= value[target] for i in others) if value else worst)
        assert ranks.tolist() == expected

    def test_small_score_budget_changes_nothing(self) -> None:
        queries, model = self.world(4)
        assert (full_rank(model, queries, ITEMS) == full_rank(model, queries, ITEMS, max_scores=1)).all()

    def test_agrees_with_the_lists(self) -> None:
        """One target a user: hit rate from lists with ties against the model is hit rate from exact ranks."""
        queries, model = self.world(5)
        queries.wanted = [wanted[:1] for wanted in queries.wanted]
        with torch.no_grad():
            best = (model.interests @ model.items.T).masked_fill(~model.valid[:, :, None], -torch.inf).amax(1)
        ranks = full_rank(model, queries, ITEMS)
        result = evaluate_matcher(TableMatcher(best), queries, ks=(1, 5, 10))
        for k in (1, 5, 10):
            assert (result.metrics[f"hit_rate@{k}"] == (ranks <= k)).all()
        assert 0 < result.means["hit_rate@10"] < 1

    def test_targets_that_are_no_item_rank_last(self) -> None:
        model = VectorModel(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.arange(6.0)[:, None])
        assert full_rank(model, FakeQueries([[1, 5, 2, 99]]), 6).tolist() == [4, 1, 4, 4]

    def test_nan_is_refused(self) -> None:
        model = VectorModel(torch.full((1, 1, 1), torch.nan), torch.ones(1, 1, dtype=torch.bool), torch.ones(6, 1))
        with pytest.raises(ValueError, match="target is NaN"):
            full_rank(model, FakeQueries([[3]]), 6)


class TestRanker:
    def test_truth_is_calibrated_and_numbers_are_those_of_the_metrics(self) -> None:
        batches, labels = rows_world(20_000)
        result = evaluate_ranker(FirstNumber(), batches)
        assert result.logits.dtype == result.labels.dtype == np.float32
        assert (result.labels == labels).all()
        assert result.means["auc"] == metrics.auc(result.labels, result.logits)
        assert result.means["gauc"] == metrics.gauc(result.labels, result.logits, result.user)
        assert result.means["ece"] < 0.02
        assert evaluate_ranker(FirstNumber(3.0), batches).means["ece"] > 0.05  # overconfident
        assert result.means["normalised_entropy"] < 1

    def test_model_mode_and_rows_without_users(self) -> None:
        batches, _ = rows_world()
        model = FirstNumber().train()
        rows = [Batch(numbers=b.numbers, label=b.label) for b in batches]
        a, b = evaluate_ranker(model, rows), evaluate_ranker(model, rows)
        assert (a.logits == b.logits).all()  # dropout was off
        assert model.training
        assert a.user is None
        assert "gauc" not in a.means

    def test_people_whom_training_never_saw_are_different_people(self) -> None:
        """A model sees them all as row 1; AUC within a user and intervals over users must not."""
        rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        batch = Batch(numbers=rows, label=torch.tensor([0.0, 1.0, 0.0, 1.0]), user=torch.ones(4, dtype=torch.int64))
        assert evaluate_ranker(FirstNumber(), [batch]).means["gauc"] == 0.75  # as if they were one
        people = evaluate_ranker(FirstNumber(), [batch.replace(person=torch.tensor([7, 7, 8, 8]))])
        assert people.means["gauc"] == 1.0
        assert people.user is not None
        assert people.user.tolist() == [7, 7, 8, 8]

    def test_asks_an_epoch_source_for_its_first_epoch(self) -> None:
        batches, _ = rows_world()

        class Source:
            fingerprint = "split-9"
            asked: list[int]

            def epoch(self, number: int):  # type: ignore[no-untyped-def]
                self.asked = [number]
                return iter(batches)

        source = Source()
        result = evaluate_ranker(FirstNumber(), source)
        assert source.asked == [0]
        assert result.split == "split-9"

    def test_refusals(self) -> None:
        batches, _ = rows_world()
        with pytest.raises(ValueError, match="no batches to score"):
            evaluate_ranker(FirstNumber(), [])
        with pytest.raises(ValueError, match="3000 of 3000 logits are not finite"):
            evaluate_ranker(FirstNumber(float("nan")), batches)


class TestCompare:
    def results(self) -> tuple[MatchResult, MatchResult]:
        queries, scores = random_world(users=400)
        offsets, items = queries.relevant
        better = scores.clone()
        better[np.repeat(np.arange(400), np.diff(offsets)), items] += 0.3
        return tuple(evaluate_matcher(TableMatcher(s), queries, ks=(5,)) for s in (better, scores))  # type: ignore[return-value]

    def test_finds_the_better_model(self) -> None:
        better, worse = self.results()
        found = compare(better, worse, "ndcg@5")
        assert found.difference == pytest.approx(better.means["ndcg@5"] - worse.means["ndcg@5"], abs=1e-6)
        assert found.p_randomisation < 0.001
        assert compare(worse, worse, "ndcg@5").p_randomisation == 1.0
        with pytest.raises(ValueError, match="no metric 'ndcg@7'; these were measured: recall@5"):
            compare(better, worse, "ndcg@7")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"split": "split-2"}, "their split fingerprint differ: split-1 and split-2"),
            ({"queries": "f" * 64}, "their questions differ"),
            ({"exclude_seen": False}, "their exclude_seen differ: True and False"),
            ({"ties": "as_ranked"}, "their ties differ"),
            ({"ks": (10,)}, "their ks differ"),
        ],
    )
    def test_refuses_what_answers_other_questions(self, change: dict[str, object], match: str) -> None:
        a, b = self.results()
        with pytest.raises(ValueError, match=match):
            compare(a, dataclasses.replace(b, **change), "ndcg@5")

    def test_other_targets_or_users_are_other_questions(self) -> None:
        scores = TableMatcher(np.random.default_rng(0).random((2, 9)))
        one = evaluate_matcher(scores, FakeQueries([[2], [3]]), ks=(2,))
        for other in ([[2], [4]], [[2], []], [[2, 5], [3]]):
            with pytest.raises(ValueError, match="questions differ"):
                require_comparable({"one": one, "two": evaluate_matcher(scores, FakeQueries(other), ks=(2,))})

    def test_rankers(self) -> None:
        batches, _ = rows_world()
        truth = evaluate_ranker(FirstNumber(), batches)
        noise = dataclasses.replace(
            truth, logits=truth.logits + np.random.default_rng(1).normal(0, 2, 3000).astype("f4")
        )
        found = compare_rankers(truth, noise)
        assert found.p < 0.001
        assert found.interval.low > 0
        with pytest.raises(ValueError, match="questions differ"):
            compare_rankers(truth, evaluate_ranker(FirstNumber(), batches[::-1]))
