"""A matcher that learns from a matcher: the whole catalogue's probabilities, or the order of the first items."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.learn import distil, distil_ranking
from funnelrec.learn.distil import CatalogueDistillation
from funnelrec.learn.distil_ranking import (
    RankingDistillation,
    RelaxedRankingDistillation,
    discrepancy_weights,
    relaxed_ranking_loss,
)
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import FullSoftmax, SampledBCE, describe
from funnelrec.match.bert4rec import BERT4Rec
from funnelrec.match.comirec_sa import ComiRecSA
from funnelrec.match.gru4rec import GRU4Rec
from funnelrec.match.sasrec import SASRec
from tests.contracts import make_spec

ITEMS = 12
SPEC = make_spec([("user", "user", 40, 1), ("item", "item", ITEMS, 1)])


class Fixed(nn.Module):
    """One vector a user and the items' vectors, all parameters."""

    def __init__(self, users: Tensor, items: Tensor) -> None:
        super().__init__()
        self.users, self.items = nn.Parameter(users.clone()), nn.Parameter(items.clone())
        self.spec = SimpleNamespace(num_items=len(items))

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.users.unsqueeze(1), torch.ones(len(self.users), 1, dtype=torch.bool)

    def encode_items(self, rows: Tensor) -> Tensor:
        return self.items[rows]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fixed(seed: int, dim: int = 4, users: int = 30) -> Fixed:
    return Fixed(normal(users, dim, seed=seed), normal(ITEMS, dim, seed=seed + 100))


def targets(users: int = 30) -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(
        target=torch.randint(2, ITEMS, (users,), generator=g),
        history=torch.randint(2, ITEMS, (users, 3), generator=g),
    )


def gradients(loss: Any, model: nn.Module, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# --- probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 2**20], ids=["a row at a time", "at once"])
def test_it_is_hintons_loss(soft: float, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "chunk_rows", lambda row_bytes: max(1, chunk // row_bytes))
    student, teachers, batch = fixed(0), [fixed(1, dim=7), fixed(2)], targets()

    def plain(model: Fixed, batch: Batch) -> Tensor:
        s = model.users @ model.items[2:].T
        q = sum(((t.users @ t.items[2:].T) / temperature).softmax(1).detach() for t in teachers) / 2
        kl = F.kl_div((s / temperature).log_softmax(1), q, reduction="batchmean")
        return (1 - soft) * F.cross_entropy(s, batch.target - 2) + soft * temperature**2 * kl

    ours = gradients(CatalogueDistillation(teachers, temperature=temperature, soft=soft), student, batch)
    for a, b in zip(ours, gradients(plain, student, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


def test_a_student_who_agrees_learns_nothing_and_who_does_not_comes_nearer() -> None:
    teacher, batch = fixed(1), targets()
    value, *slopes = gradients(CatalogueDistillation(teacher, soft=1.0), Fixed(teacher.users, teacher.items), batch)
    assert abs(float(value)) < 1e-6
    assert all(float(slope.abs().max()) < 1e-7 for slope in slopes)
    assert gradients(CatalogueDistillation(teacher, soft=1.0), fixed(2), batch)[0] > 0.1


def test_without_a_soft_share_it_is_the_full_softmax_and_no_teacher_is_asked() -> None:
    class Silent(nn.Module):
        def encode_users(self, batch: Batch) -> Any:
            raise AssertionError("no teacher is asked")

    ours = gradients(CatalogueDistillation(Silent(), soft=0.0), fixed(0), targets())
    for a, b in zip(ours, gradients(FullSoftmax(), fixed(0), targets()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near() -> None:
    student, batch, loss = fixed(0), targets(), CatalogueDistillation(fixed(1), soft=0.5)
    exact = gradients(loss, student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(loss, student, batch)
    for a, b in zip(near, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < float((a - b).norm() / b.norm()) < 0.02  # not 0: the products did run in bfloat16


def test_a_user_of_whom_the_teacher_knows_nothing_is_left_out() -> None:
    class Deaf(Fixed):
        def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
            users, valid = super().encode_users(batch)
            return users, valid & (torch.arange(len(valid)) < 2).unsqueeze(1)

    student, batch = fixed(0), targets()
    some = CatalogueDistillation(Deaf(fixed(1).users, fixed(1).items))
    _, users, _ = gradients(some, student, batch)
    assert users[:2].any(1).all()
    assert not users[2:].any()
    nobody = gradients(some, student, Batch(target=torch.zeros(30, dtype=torch.int64), history=batch.history))
    assert all(not t.any() for t in nobody)


# --- the order of the first items ----------------------------------------------------------------------------------


def test_the_weights_by_hand() -> None:
    """λ = 2, μ = 1, ranks 1, 4, 3 for the teacher's 1, 2, 3: e^(-r/2) · tanh(max(rank − r, 0)) = 0, .367879 · .964028,
    0, so that the second item has all the weight; ranks 3, 2, 13: .606531 · .964028 and .223130 · 1."""
    ranks = torch.tensor([[1.0, 4.0, 3.0], [3.0, 2.0, 13.0], [1.0, 2.0, 3.0]])
    weights = discrepancy_weights(ranks, 2.0, 1.0)
    a, b = 0.606531 * 0.964028, 0.223130
    wanted = torch.tensor([[0.0, 1.0, 0.0], [a / (a + b), 0.0, b / (a + b)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)


def test_the_relaxed_order_by_hand() -> None:
    """Scores 2, 1 before one other of 0: −[2 − ln(e² + e + 1)] = .407606 and −[1 − ln(e + 1)] = .313262; over 2."""
    real = torch.ones(1, 1, dtype=torch.bool)
    loss = relaxed_ranking_loss(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0]]), real)
    assert loss.item() == pytest.approx((0.407606 + 0.313262) / 2, abs=1e-6)
    none = relaxed_ranking_loss(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0]]), ~real)  # the logistic of 2 − 1
    assert none.item() == pytest.approx(math.log1p(math.exp(-1.0)) / 2, abs=1e-6)


def test_what_the_relaxed_order_sees() -> None:
    wanted, other, real = normal(4, 5), normal(4, 9, seed=1), torch.ones(4, 9, dtype=torch.bool)
    loss = relaxed_ranking_loss(wanted, other, real)
    shuffled = relaxed_ranking_loss(wanted, other[:, torch.randperm(9)], real)
    torch.testing.assert_close(shuffled, loss)  # others have no order
    torch.testing.assert_close(relaxed_ranking_loss(wanted + 7, other + 7, real), loss)
    swapped = relaxed_ranking_loss(wanted[:, [1, 0, 2, 3, 4]], other, real)
    assert not torch.allclose(swapped, loss)
    assert (relaxed_ranking_loss(wanted + torch.eye(5)[0], other, real) < loss).all()
    first = relaxed_ranking_loss(wanted[:, :1], other, real)  # K = 1: the softmax of one against the others
    both = torch.cat([wanted[:, :1], other], 1)
    torch.testing.assert_close(first, F.cross_entropy(both, torch.zeros(4).long(), reduction="none"))
    assert relaxed_ranking_loss(wanted * 1e4, other * 1e4, real).isfinite().all()  # exp() of it would not be


@pytest.mark.parametrize("kind", [RankingDistillation, RelaxedRankingDistillation])
def test_what_was_observed_is_nobodys_lesson(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lesson is the teacher's best without the history and the target, and no other item than the sample is read;
    sampled items that are of the lesson or observed do not count."""
    student, teacher, batch = fixed(0), fixed(1), targets()
    seen: dict[str, Tensor] = {}

    def spy(self: Any, scores: Tensor, other: Tensor, real: Tensor, rest: Tensor) -> Tensor:
        seen.update(scores=scores.detach(), real=real, rest=rest)
        return scores.sum(1)

    monkeypatch.setattr(kind, "_ranking", spy)
    monkeypatch.setattr(distil_ranking, "chunk_rows", lambda row_bytes: 7)
    monkeypatch.setattr(torch, "randint", lambda low, high, shape: torch.arange(low, high))
    kind(teacher, top=3, others=10, soft=1.0)(student, batch)
    for row in range(30):
        observed = {*batch.history[row].tolist(), int(batch.target[row])}
        order = (teacher.users[row] @ teacher.items.T).argsort(descending=True).tolist()
        lesson = [item for item in order if item >= 2 and item not in observed][:3]
        torch.testing.assert_close(seen["scores"][row], student.users[row] @ student.items[lesson].T)
        assert seen["real"][row].tolist() == [i not in observed and i not in lesson for i in range(2, ITEMS)]
        assert int(seen["rest"][row]) == int(seen["real"][row].sum())


def test_ranks_are_estimated_from_the_sample() -> None:
    """Five other items, all sampled: scores .5 and −1 have two and four of them above, and .5 is above −1: ranks 3 and
    6. With a sample of five from ten they have twice as many above: 5 and 10."""
    loss = RankingDistillation(fixed(1), top=2, place=1.0, discrepancy=0.5)
    scores, other = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 1.0, 0.0, -0.5, -2.0]])
    real = torch.ones(1, 5, dtype=torch.bool)
    for rest, ranks in ((5, (3.0, 6.0)), (10, (5.0, 10.0))):
        value = loss._ranking(scores, other, real, torch.tensor([[rest]]))
        weights = discrepancy_weights(torch.tensor([ranks]), 1.0, 0.5)
        torch.testing.assert_close(value, -(weights * F.logsigmoid(scores)).sum(1))
    as_taught = loss._ranking(torch.tensor([[3.0, 2.5]]), other, real, torch.tensor([[5]]))
    assert as_taught.item() == 0  # nothing to learn; but the other way round there is
    assert loss._ranking(torch.tensor([[2.5, 3.0]]), other, real, torch.tensor([[5]])).item() > 0


class Sequences(Fixed):
    """`Fixed` with a vector at every position: user p of P = B · L."""

    def encode_positions(self, batch: Batch) -> Tensor:
        return self.users.view(*batch.target.shape, -1)


@pytest.mark.parametrize("kind", [RankingDistillation, RelaxedRankingDistillation])
@pytest.mark.parametrize("step", [1, 2**30], ids=["in pieces", "at once"])
def test_the_whole_loss_position_by_position(kind: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three people, four positions, some without a target: a loop over positions in plain Python gives the same."""
    monkeypatch.setattr(distil_ranking, "SCORES_BYTES", step)
    g = torch.Generator().manual_seed(3)
    history, target = torch.randint(2, ITEMS, (3, 4), generator=g), torch.randint(2, ITEMS, (3, 4), generator=g)
    target[0, :2], target[2, 3], history[0, 0] = 0, 0, 0
    batch = Batch(history=history, target=target)
    student, teacher = (Sequences(normal(12, 4, seed=s), normal(ITEMS, 4, seed=s + 9)) for s in (0, 1))

    def by_position(model: Sequences, batch: Batch) -> Tensor:
        each = []
        for person in range(3):
            observed = {*history[person].tolist(), *target[person].tolist()} - {0}
            for place in range(4):
                if target[person, place] == 0:
                    continue
                at = 4 * person + place
                order = (teacher.users[at] @ teacher.items.T).argsort(descending=True).tolist()
                lesson = [i for i in order if i >= 2 and i not in observed][:2]
                others = [i for i in range(2, ITEMS) if i not in observed and i not in lesson]
                s = model.users[at] @ model.items.T
                if kind is RelaxedRankingDistillation:
                    rest = s[others].exp().sum()
                    first, second = s[lesson[0]], s[lesson[1]]
                    from_both, from_second = (first.exp() + second.exp() + rest).log(), (second.exp() + rest).log()
                    each.append((from_both - first + from_second - second) / 2)
                else:
                    rank = [1 + sum(bool(s[i] > s[w]) for i in [*others, *lesson]) for w in lesson]
                    weights = discrepancy_weights(torch.tensor([rank]).float(), 10.0, 0.1)[0]
                    each.append(-(weights * F.logsigmoid(s[lesson])).sum())
        return 0.3 * FullSoftmax()(model, batch) + 0.7 * torch.stack(each).mean()

    monkeypatch.setattr(torch, "randint", lambda low, high, shape: torch.arange(low, high))
    ours = gradients(kind(teacher, soft=0.7, top=2, others=10, hard=FullSoftmax()), student, batch)
    for a, b in zip(ours, gradients(by_position, student, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- teachers ------------------------------------------------------------------------------------------------------


class Several(Fixed):
    """Three interests a user, of which not all are valid."""

    def __init__(self) -> None:
        super().__init__(normal(30, 12, seed=4), normal(ITEMS, 4, seed=5))
        self.valid = torch.tensor([[True, True, False], [True, False, False], [False, False, False]]).repeat(10, 1)

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.users.view(30, 3, 4), self.valid


def test_a_teacher_of_several_interests_answers_as_it_serves() -> None:
    """By the best of its valid interests, whatever the target; a user without any is left out."""
    student, teacher, batch = fixed(0), Several(), targets()
    scores = (teacher.users.view(30, 3, 4) @ teacher.items[2:].T).detach()
    best = scores.masked_fill(~teacher.valid.unsqueeze(2), -torch.inf).amax(1)
    known = teacher.valid.any(1)

    def plain(model: Fixed, batch: Batch) -> Tensor:
        s = (model.users @ model.items[2:].T)[known]
        return F.kl_div(s.log_softmax(1), best[known].softmax(1), reduction="batchmean")

    ours = gradients(CatalogueDistillation(teacher, soft=1.0), student, batch)
    for a, b in zip(ours, gradients(plain, student, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_teacher_of_another_catalogue_is_refused() -> None:
    other = Fixed(normal(30, 4), normal(ITEMS + 5, 4))
    for loss in (CatalogueDistillation(other), RelaxedRankingDistillation(other, top=2)):
        with pytest.raises(ValueError, match="same catalogue, received 17 and 12 item rows"):
            loss(fixed(0), targets())


# --- in training ---------------------------------------------------------------------------------------------------


class Taught:
    """Histories whose next item follows from the newest one; of a share of them the label is drawn at random."""

    def __init__(self, size: int, noise: float, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        first = torch.randint(0, ITEMS - 2, (size, 1), generator=g)
        self.history = 2 + (first + 3 * torch.arange(5)) % (ITEMS - 2)
        self.next = 2 + (first[:, 0] + 15) % (ITEMS - 2)
        wrong = torch.rand(size, generator=g) < noise
        self.target = torch.where(wrong, torch.randint(2, ITEMS, (size,), generator=g), self.next)

    def __len__(self) -> int:
        return len(self.target)

    def gather(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        return Batch(
            history=self.history[index],
            mask=torch.ones(len(index), 5, dtype=torch.bool),
            user=torch.full((len(index),), 2),
            target=self.target[index],
        )


def first_hits(model: Any, data: Taught) -> float:
    """How often the next item is the best of those that are not in the history."""
    batch = data.gather(torch.arange(len(data)))
    with torch.no_grad():
        interests, _ = model.encode_users(batch)
        scores = (interests @ model.encode_items(torch.arange(ITEMS)).T).amax(1)
    scores[:, :2] = -torch.inf
    scores.scatter_(1, batch.history, -torch.inf)
    return float((scores.argmax(1) == data.next).float().mean())


@pytest.fixture(scope="module")
def teacher() -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GRU4Rec(SPEC, embedding_dim=16, dropout=0.0, embedding_dropout=0.0, max_len=5)
        model.items.dense = True
        fit(model, Batches(Taught(600, 0.0, 0), 50, shuffle=True), FullSoftmax(), epochs=10, lr=1e-2, progress=False)
    assert first_hits(model, Taught(300, 0.0, 9)) > 0.95
    return model


def one_vector() -> SASRec:
    return SASRec(SPEC, embedding_dim=8, dropout=0.0, max_len=5)


def two_vectors() -> ComiRecSA:
    return ComiRecSA(SPEC, embedding_dim=8, num_interests=2, max_len=5)


def probabilities(teacher: nn.Module, soft: float) -> CatalogueDistillation:
    return CatalogueDistillation(teacher, soft=soft)


def order(teacher: nn.Module, soft: float) -> RelaxedRankingDistillation:
    return RelaxedRankingDistillation(teacher, top=2, others=6, soft=soft)


def best(teacher: nn.Module, soft: float) -> RankingDistillation:
    return RankingDistillation(teacher, top=1, others=40, soft=soft, hard=SampledBCE(num_negatives=2))


@pytest.mark.parametrize(
    ("loss", "student"),
    [
        (probabilities, one_vector),
        (probabilities, two_vectors),
        (order, one_vector),
        (order, two_vectors),
        (best, one_vector),  # trains the interest that the label chose, and these labels choose at random
    ],
)
def test_a_student_learns_what_its_labels_do_not_say(teacher: GRU4Rec, loss: Any, student: Any) -> None:
    """All labels are random, so that alone (soft=0) nothing can be learnt; the teacher, of another kind, knows."""
    scores = {}
    for name, soft in (("alone", 0.0), ("taught", 0.9)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = student()
            model.items.dense = True
            batches = Batches(Taught(600, 1.0, 3), 50, shuffle=True)
            fit(model, batches, loss(teacher, soft), epochs=12, lr=2e-2, progress=False)
        scores[name] = first_hits(model, Taught(300, 0.0, 9))
    assert scores["taught"] > 0.7, scores
    assert scores["alone"] < 0.45, scores  # by chance one of five


def test_models_that_hide_their_input_are_taught_by_their_kind(teacher: GRU4Rec) -> None:
    data = Taught(40, 0.0, 0)
    one = data.gather(torch.arange(40))
    batch = Batch(**{**one, "target": torch.cat([one.history[:, 1:], one.target.unsqueeze(1)], 1)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, other = (BERT4Rec(SPEC, embedding_dim=8, max_len=5, num_heads=1) for _ in range(2))
        for loss in (CatalogueDistillation(other), RelaxedRankingDistillation(other, top=2)):
            values = gradients(loss, student, batch)
            assert values[0].isfinite()
            assert values[1].any()
        assert CatalogueDistillation(teacher)(student, one).isfinite()  # one target a person: nothing is hidden
    with pytest.raises(ValueError, match="BERT4Rec cannot be taught by GRU4Rec"):
        CatalogueDistillation(teacher)(student, batch)
    with pytest.raises(ValueError, match="GRU4Rec cannot be taught by BERT4Rec"):
        RankingDistillation(student)(teacher, batch)


def test_what_cannot_be_is_refused(teacher: GRU4Rec) -> None:
    with pytest.raises(ValueError, match="its own teacher"):
        CatalogueDistillation(teacher)(teacher, targets())
    with pytest.raises(ValueError, match="a ranking has one teacher, received 2"):
        RankingDistillation([teacher, teacher])
    with pytest.raises(ValueError, match="top and others must be at least 1, received 0 and 40"):
        RelaxedRankingDistillation(teacher, top=0)
    with pytest.raises(ValueError, match=r"no top=8 items .* among 10; choose a smaller top"):
        RelaxedRankingDistillation(fixed(1), top=8)(fixed(0), targets())
    assert describe(CatalogueDistillation(fixed(1))) != describe(CatalogueDistillation(fixed(2)))
    assert "top=4" in describe(RankingDistillation(fixed(1), top=4))
