from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import Table
from funnelrec.core.schema import Spec
from funnelrec.learn import losses
from funnelrec.learn.losses import (
    BCE,
    CrossEntropy,
    FullSoftmax,
    InBatchSoftmax,
    SampledSoftmax,
    WeightedLogistic,
    linear_cross_entropy,
    pairs,
    shared_negatives_cross_entropy,
)
from funnelrec.learn.samplers import Popularity, Sampler, Uniform


def plain(users: Tensor, items: Tensor, target: Tensor, smoothing: float = 0.0, temperature: float = 1.0) -> Tensor:
    return F.cross_entropy(users @ items[2:].T / temperature, target - 2, ignore_index=-2, label_smoothing=smoothing)


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-30)).detach())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_targets(n: int, items: int) -> Tensor:
    return torch.randint(2, items, (n,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0], ids=["flat", "usual", "beyond exp()"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_linear_cross_entropy_is_cross_entropy(scale: float, smoothing: float, temperature: float) -> None:
    users, items, target = normal(300, 16) * scale, normal(700, 16, seed=1), some_targets(300, 700)
    ours = gradients(
        lambda u, e: linear_cross_entropy(u, e, target, temperature=temperature, label_smoothing=smoothing),
        users,
        items,
    )
    theirs = gradients(lambda u, e: plain(u, e, target, smoothing, temperature), users, items)
    assert [relative(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True)] == [True] * 3
    assert not ours[2][:2].any(), "padding and unknown are no classes"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(3, 50),
    st.integers(1, 5),
    st.integers(1, 4000),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_any_shape_and_any_chunk(p: int, n: int, d: int, chunk: int, seed: int, large: bool) -> None:
    users = normal(p, d, seed=seed, dtype=torch.float64) * (200 if large else 1)
    items = normal(n, d, seed=seed + 1, dtype=torch.float64)
    target = torch.randint(0, n, (p,), generator=torch.Generator().manual_seed(seed))
    if not (target >= 2).any():
        target[0] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "chunk_rows", lambda row_bytes: max(1, chunk // row_bytes))
        ours = gradients(lambda u, e: linear_cross_entropy(u, e, target), users, items)
    real = torch.where(target >= 2, target, 0)
    theirs = gradients(lambda u, e: plain(u, e, real), users, items)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_no_target_gives_zero_and_zero_gradients() -> None:
    value, users, items = gradients(
        lambda u, e: linear_cross_entropy(u, e, torch.tensor([0, 1])), normal(2, 3), normal(9, 3)
    )
    assert float(value) == 0
    assert not users.any()
    assert not items.any()


def test_gradients_only_where_asked() -> None:
    users, items, target = normal(20, 3), normal(9, 3), some_targets(20, 9)
    items.requires_grad_()
    linear_cross_entropy(users, items, target).backward()  # type: ignore[no-untyped-call]
    theirs = gradients(lambda e: plain(users, e, target), items)[1]
    assert items.grad is not None
    assert relative(items.grad, theirs) < 1e-6
    with torch.no_grad():
        assert relative(linear_cross_entropy(users, items, target), plain(users, items, target)) < 1e-6


def test_the_gradient_scales_with_what_follows_and_can_be_taken_again() -> None:
    users, target = normal(20, 3).requires_grad_(), some_targets(20, 9)
    value = linear_cross_entropy(users, normal(9, 3), target)
    (once,) = torch.autograd.grad(3 * value, users, retain_graph=True)
    (again,) = torch.autograd.grad(value, users)
    torch.testing.assert_close(once, 3 * again)


def test_a_second_derivative_is_refused() -> None:
    users = normal(4, 3).requires_grad_()
    value = linear_cross_entropy(users, normal(9, 3), some_targets(4, 9))
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(value, users, create_graph=True)


def test_bfloat16_under_autocast_gives_float32_near_the_exact_one() -> None:
    users, items, target = normal(700, 16).requires_grad_(), normal(300, 16).requires_grad_(), some_targets(700, 300)
    exact = plain(users, items, target)
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(users, items, target)
    assert value.dtype == torch.float32
    assert 0 < relative(value, exact) < 1e-3  # not 0: the products did run in bfloat16
    for fast, true in zip(
        torch.autograd.grad(value, (users, items)), torch.autograd.grad(exact, (users, items)), strict=True
    ):
        assert fast.dtype == torch.float32
        assert relative(fast, true) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature must be positive"), ({"label_smoothing": 1.0}, "label_smoothing must lie in")],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(normal(2, 3), normal(9, 3), torch.tensor([2, 3]), **options)


@pytest.mark.parametrize(("items", "rows"), [(3_418, 306), (50_000, 256), (1_000_000, 16), (20_000_000, 1)])
def test_chunks_stay_within_their_megabytes(items: int, rows: int) -> None:
    assert losses.chunk_rows(4 * items) == rows


# ---- shared negatives ----


def plain_shared(
    users: Tensor,
    positives: Tensor,
    negatives: Tensor,
    target: Tensor,
    rows: Tensor,
    target_log_q: Tensor | None,
    negative_log_q: Tensor | None,
) -> Tensor:
    own = (users * positives).sum(1, keepdim=True)
    other = users @ negatives.T
    if target_log_q is not None and negative_log_q is not None:
        own, other = own - target_log_q.unsqueeze(1), other - negative_log_q
    other = other.masked_fill(target.unsqueeze(1) == rows, -torch.inf)
    return -torch.cat([own, other], 1).log_softmax(1)[:, 0].mean()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 40), st.integers(1, 2000), st.integers(0, 10**6), st.booleans(), st.booleans()
)
def test_shared_negatives_against_the_plain_form(
    p: int, s: int, chunk: int, seed: int, log_q: bool, large: bool
) -> None:
    users = normal(p, 3, seed=seed, dtype=torch.float64) * (300 if large else 1)
    positives, negatives = normal(p, 3, seed=seed + 1, dtype=torch.float64), normal(s, 3, seed=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    target, rows = (torch.randint(2, 12, (n,), generator=generator) for n in (p, s))  # many accidental hits
    q = torch.rand(12, generator=generator, dtype=torch.float64).log()
    corrections = (q[target], q[rows]) if log_q else (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "chunk_rows", lambda row_bytes: max(1, chunk // row_bytes))
        ours = gradients(
            lambda u, y, e: shared_negatives_cross_entropy(
                u, y, e, target, rows, target_log_q=corrections[0], negative_log_q=corrections[1]
            ),
            users,
            positives,
            negatives,
        )
    theirs = gradients(lambda u, y, e: plain_shared(u, y, e, target, rows, *corrections), users, positives, negatives)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---- the losses on a model ----


class Matcher(nn.Module):
    """Item table, one vector a position; K interests by slicing the history."""

    def __init__(self, num_items: int = 30, dim: int = 4, interests: int = 1) -> None:
        super().__init__()
        self.spec = Spec(num_items=num_items)
        self.items = Table(num_items, dim, std=1.0)
        self.interests = interests
        self.encoded: list[Tensor] = []

    def encode_positions(self, batch: Batch) -> Tensor:
        total = self.items(batch.history).cumsum(1)
        out: Tensor = total / torch.arange(1, total.shape[1] + 1).view(1, -1, 1)
        return out

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        vectors = self.items(batch.history)[:, -self.interests :]
        return vectors, batch.mask[:, -self.interests :]

    def encode_items(self, rows: Tensor) -> Tensor:
        self.encoded.append(rows)
        out: Tensor = self.items(rows)
        return out

    def user_for_target(self, interests: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        scores = torch.einsum("bkd,bd->bk", interests, target).masked_fill(~valid, -torch.inf)
        return interests[torch.arange(len(target)), scores.argmax(1)]


@dataclass(frozen=True)
class Everything:
    """A sampler that gives every real item once."""

    num_items: int

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(2, self.num_items)
        return rows, self.log_q_of(rows)

    def log_q_of(self, rows: Tensor) -> Tensor:
        return torch.full(rows.shape, -math.log(self.num_items - 2))


def batch_of(last_only: bool, interests: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(3)
    history = torch.randint(2, 30, (6, 5), generator=generator)
    history[0, :3] = 0
    history[5] = 0  # nothing known
    target = torch.randint(2, 30, (6,) if last_only else (6, 5), generator=generator)
    if not last_only:
        target[history == 0] = 0
    else:
        target[1] = 0
    return Batch(history=history, mask=history != 0, target=target)


@pytest.mark.parametrize(("last_only", "interests"), [(True, 1), (True, 3), (False, 1)])
def test_pairs(last_only: bool, interests: int) -> None:
    model, batch = Matcher(interests=interests), batch_of(last_only)
    users, target = pairs(model, batch)
    if last_only:
        assert target.tolist() == batch.target[[0, 2, 3, 4]].tolist()  # row 1 has no target, row 5 no history
        vectors, valid = model.encode_users(batch)
        chosen = model.user_for_target(vectors, valid, model.items(batch.target))
        assert torch.equal(users, chosen[[0, 2, 3, 4]])
    else:
        assert torch.equal(target, batch.target[batch.target != 0])
        assert torch.equal(users, model.encode_positions(batch)[batch.target != 0])


@pytest.mark.parametrize("last_only", [True, False])
def test_all_items_as_negatives_give_the_full_softmax(last_only: bool) -> None:
    model, batch = Matcher(), batch_of(last_only)
    full = FullSoftmax()(model, batch)
    users, target = pairs(model, batch)
    assert relative(full, plain(users, model.items.weight, target)) < 1e-6
    for log_q in (True, False):  # a constant correction changes nothing
        assert relative(SampledSoftmax(28, log_q, Everything(30))(model, batch), full) < 1e-6
    assert relative(SampledSoftmax(28, False, Uniform(30))(model, batch), full) > 1e-3, "the control must differ"


def test_sampled_softmax_keeps_the_table_gradient_sparse_and_encodes_each_row_once() -> None:
    model, batch = Matcher(num_items=5000), batch_of(True)
    SampledSoftmax(20)(model, batch).backward()  # type: ignore[no-untyped-call]
    gradient = model.items.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert len(gradient.coalesce().indices()[0]) < 60
    rows = torch.cat(model.encoded)
    assert len(rows) == len(rows.unique()) <= 24


def test_log_q_makes_the_sum_over_the_sample_unbiased() -> None:
    sampler = Popularity(torch.tensor([0, 0, 50, 20, 10, 5, 1, 1]))
    scores = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    rows, log_q = sampler.sample(400_000, torch.Generator().manual_seed(0))
    truth = float(scores[2:].exp().sum())
    each = (scores[rows] - log_q).exp()
    error = float(each.std() / len(each) ** 0.5)
    assert abs(float(each.mean()) - truth) < 4 * error
    assert abs(float(scores[rows].exp().mean() * 6) - truth) > 20 * error, "the control must be biased"


def learned_scores(loss: Any) -> Tensor:
    """Scores that one user vector learns for eight items whose targets follow fixed shares."""
    counts = torch.tensor([0, 0, 64, 32, 16, 8, 4, 2, 1, 1])
    target = torch.arange(10).repeat_interleave(counts)
    model = Matcher(num_items=10, dim=10)
    with torch.no_grad():
        model.items.weight.zero_()
    batch = Batch(history=torch.full((128, 1), 1), mask=torch.ones(128, 1, dtype=torch.bool), target=target)
    bias = nn.Parameter(torch.zeros(10))
    model.encode_users = lambda b: (torch.ones(128, 1, 1), b.mask)  # type: ignore[method-assign]
    model.encode_items = lambda rows: bias[rows].unsqueeze(1)  # type: ignore[method-assign]
    optimizer = torch.optim.Adam([bias], lr=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(600):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    learned = bias.detach()[2:]
    return learned - learned.mean()


def test_popular_negatives_push_popular_items_down_unless_corrected() -> None:
    counts = torch.tensor([0, 0, 64, 32, 16, 8, 4, 2, 1, 1])
    truth = counts[2:].float().log()
    truth = truth - truth.mean()

    def fit_to_truth(scores: Tensor) -> float:
        return float((scores * truth).sum() / (truth * truth).sum())  # 1: the full softmax's own optimum

    sampler: Sampler = Popularity(counts)
    assert fit_to_truth(learned_scores(FullSoftmax())) == pytest.approx(1, abs=0.05)
    assert fit_to_truth(learned_scores(SampledSoftmax(256, True, sampler))) == pytest.approx(1, abs=0.1)
    assert fit_to_truth(learned_scores(InBatchSoftmax(sampler))) == pytest.approx(1, abs=0.1)
    both = SampledSoftmax(256, True, sampler, correct_target=True)
    assert fit_to_truth(learned_scores(both)) > 1.2, "right only as long as no item is drawn more than once"
    assert fit_to_truth(learned_scores(SampledSoftmax(256, False, sampler))) < 0.5
    assert fit_to_truth(learned_scores(InBatchSoftmax())) < 0.5


def test_correcting_the_target_too_ignores_a_constant() -> None:
    model, batch = Matcher(), batch_of(True)
    rows, log_q = Popularity(torch.arange(30)).sample(20, torch.Generator().manual_seed(1))
    users, target = pairs(model, batch)
    vectors = model.items(target), model.items(rows)

    def value(shift: float, correct_target: bool) -> float:
        own = Popularity(torch.arange(30)).log_q_of(target) + shift if correct_target else None
        return float(
            shared_negatives_cross_entropy(
                users, *vectors, target, rows, target_log_q=own, negative_log_q=log_q + shift
            ).detach()
        )

    assert value(3.0, True) == pytest.approx(value(0.0, True), rel=1e-5)
    assert value(3.0, False) != pytest.approx(value(0.0, False), rel=1e-2)


def test_in_batch_softmax_hand_worked() -> None:
    # users (1) and (2), items 3 -> vector 1, 4 -> vector 0; the second pair's own target occurs once more, left out
    model = Matcher(num_items=6, dim=1)
    with torch.no_grad():
        model.items.weight.copy_(torch.tensor([[0.0], [0.0], [0.0], [1.0], [0.0], [2.0]]))
    batch = Batch(
        history=torch.tensor([[3], [5], [5]]), mask=torch.ones(3, 1, dtype=torch.bool), target=torch.tensor([3, 4, 4])
    )
    first = math.log(math.exp(1) + 2) - 1  # target 3 against two columns of item 4
    others = math.log(1 + math.exp(2)) - 0  # target 4 against item 3 only
    assert float(InBatchSoftmax()(model, batch).detach()) == pytest.approx((first + 2 * others) / 3, rel=1e-6)


def test_a_batch_without_any_target() -> None:
    model, batch = Matcher(), batch_of(False)
    empty = batch.replace(target=torch.zeros_like(batch.target))
    for loss in (FullSoftmax(), SampledSoftmax(5), InBatchSoftmax()):
        value = loss(model, empty)
        value.backward()
        assert float(value.detach()) == 0


def test_bce_weights() -> None:
    batch = Batch(label=torch.tensor([1.0, 0.0]), weight=torch.tensor([3.0, 1.0]))
    value = BCE()(lambda b: torch.zeros(2), batch)
    assert float(value) == pytest.approx(math.log(2))
    value = BCE()(lambda b: torch.tensor([2.0, 5.0]), batch)
    expected = (3 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(5))) / 4
    assert float(value) == pytest.approx(expected)
    unweighted = BCE()(lambda b: torch.tensor([2.0, 5.0]), Batch(label=batch.label))
    assert float(unweighted) == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(5))) / 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_negatives must be at least 1, received 0"):
        SampledSoftmax(0)
    model = Matcher()
    del model.spec
    with pytest.raises(ValueError, match="Matcher must keep its `spec`"):
        FullSoftmax()(model, batch_of(True))


def logits_of(values: Tensor) -> Any:
    return lambda batch: values


def test_weighted_logistic_by_hand() -> None:
    """A click of 5 seconds at logit 0, no click at logit log 3, where the weight does not matter."""
    batch = Batch(label=torch.tensor([1.0, 0.0]), weight=torch.tensor([5.0, 77.0]))
    logits = torch.tensor([0.0, math.log(3)])
    assert WeightedLogistic()(logits_of(logits), batch).item() == pytest.approx((5 * math.log(2) + math.log(4)) / 2)
    capped = WeightedLogistic(cap=2.0)(logits_of(logits), batch).item()
    assert capped == pytest.approx((2 * math.log(2) + math.log(4)) / 2)
    ones = batch.replace(weight=torch.ones(2))
    assert WeightedLogistic()(logits_of(logits), ones).item() == pytest.approx(BCE()(logits_of(logits), ones).item())


def test_weighted_logistic_has_the_watch_time_as_its_odds() -> None:
    """At exp(b) = Σ T / (N - k) the gradient of a lone bias is zero; at the unweighted odds it is not."""
    label = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    batch = Batch(label=label, weight=torch.tensor([30.0, 9, 9, 90, 9, 9, 9, 9], dtype=torch.float64))

    def slope(odds: float) -> float:
        bias = torch.tensor(math.log(odds), requires_grad=True)
        WeightedLogistic()(logits_of(bias.expand(8)), batch).backward()
        assert bias.grad is not None
        return float(bias.grad)

    assert slope((30 + 90) / 6) == pytest.approx(0.0, abs=1e-6)
    assert abs(slope(2 / 6)) > 1


@pytest.mark.parametrize("logit", [-500.0, 500.0])
def test_weighted_logistic_far_out(logit: float) -> None:
    batch = Batch(label=torch.tensor([1.0, 0.0]), weight=torch.tensor([3.0, 1.0]))
    logits = torch.full((2,), logit, requires_grad=True)
    value = WeightedLogistic()(logits_of(logits), batch)
    value.backward()
    assert value.item() == pytest.approx(750.0 if logit < 0 else 250.0)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_weighted_logistic_refuses() -> None:
    with pytest.raises(ValueError, match="name the column of the watch time as weight in the schema"):
        WeightedLogistic()(logits_of(torch.zeros(1)), Batch(label=torch.ones(1)))
    with pytest.raises(ValueError, match=r"cap .* must be positive, received 0"):
        WeightedLogistic(cap=0.0)


def test_cross_entropy_leaves_rows_without_a_label_out_and_weighs_classes() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]], requires_grad=True)
    batch = Batch(label=torch.tensor([0, 2, -1]))
    each = [-math.log(math.exp(2) / (math.exp(2) + 2)), -math.log(1 / (math.e + 2))]

    assert CrossEntropy()(lambda _: logits, batch).item() == pytest.approx(sum(each) / 2, rel=1e-6)
    weighted = CrossEntropy(class_weights=(1.0, 1.0, 3.0))(lambda _: logits, batch).item()
    assert weighted == pytest.approx((each[0] + 3 * each[1]) / 4, rel=1e-6)
    nothing = CrossEntropy()(lambda _: logits, Batch(label=torch.tensor([-1, -1, -1])))
    assert nothing.item() == 0.0
    nothing.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
