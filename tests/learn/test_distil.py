from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.evaluate.metrics import auc
from funnelrec.learn.distil import Distillation, bernoulli_kl
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE, CrossEntropy, WeightedLogistic, describe
from funnelrec.rank.deepfm import DeepFM
from funnelrec.rank.logistic_regression import LogisticRegression
from tests.contracts import World, make_spec, rows_spec


class Says(nn.Module):
    """A ranker whose logits are its parameters."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, batch: Batch) -> Tensor:
        return self.logits


class Noisy(nn.Module):
    """Dropout and batch norm: what a teacher must not do in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(2, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.out(self.drop(self.norm(batch.numbers))).squeeze(1)


def labels(*values: float, **more: Tensor) -> Batch:
    return Batch(label=torch.tensor(values, dtype=torch.float32), **more)


def gradient(loss: Any, student: Says, batch: Batch) -> Tensor:
    student.zero_grad()
    loss(student, batch).backward()
    assert student.logits.grad is not None
    return student.logits.grad.clone()


def test_the_loss_by_hand() -> None:
    """T = 2, s = 2, t = -2: σ(s/T) = .731059, q = .268941. KL = q ln(q/p) + (1-q) ln((1-q)/(1-p)) = .462117, times 4
    is 1.848469; BCE of s = 2 and y = 1 is ln(1 + e^-2) = .126928; with a = .25 the whole is .557313."""
    student, teacher = Says(2.0), Says(-2.0)
    loss = Distillation(teacher, temperature=2.0, soft=0.25)
    parts = loss.parts(student, labels(1.0))
    assert parts["soft"].item() == pytest.approx(1.848469, abs=1e-6)
    assert parts["hard"].item() == pytest.approx(0.126928, abs=1e-6)
    assert loss(student, labels(1.0)).item() == pytest.approx(0.557313, abs=1e-6)
    # T (σ(s/T) − q) = 2 · .462117, a quarter of it, and three quarters of σ(2) − 1
    slope = 0.25 * 2 * 0.462117 + 0.75 * (0.880797 - 1)
    assert float(gradient(loss, student, labels(1.0))) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_student_who_agrees_learns_nothing(temperature: float) -> None:
    logits = (-3.0, 0.0, 0.7, 20.0)
    loss = Distillation(Says(*logits), temperature=temperature, soft=1.0)
    student = Says(*logits)
    assert loss(student, labels(0, 1, 0, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(gradient(loss, student, labels(0, 1, 0, 1)), torch.zeros(4))
    assert gradient(loss, Says(-3.0, 0.0, 0.8, 20.0), labels(0, 1, 0, 1))[2] > 0  # who is surer is drawn back


def test_without_a_soft_share_it_is_the_hard_loss_to_the_bit() -> None:
    class Silent(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            raise AssertionError("no teacher is asked")

    student, batch = Says(0.3, -1.2, 2.0), labels(1, 0, 1, weight=torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(Distillation(Silent(), soft=0.0)(student, batch), BCE()(student, batch))
    cap = WeightedLogistic(cap=1.0)
    assert torch.equal(Distillation(Silent(), soft=0.0, hard=cap)(student, batch), cap(student, batch))


def test_at_temperature_1_it_is_the_cross_entropy_of_a_mixture() -> None:
    """(1 − a) BCE(s, y) + a BCE(s, q) = BCE(s, (1 − a) y + a q), and KL = BCE − H(q)."""
    student, teacher, batch = Says(0.3, -1.2, 2.0), Says(1.0, -2.0, 0.1), labels(1, 0, 0)
    q = torch.sigmoid(teacher.logits.detach())
    mixture = lambda model, _: F.binary_cross_entropy_with_logits(model.logits, 0.4 * batch.label + 0.6 * q)  # noqa: E731
    loss = Distillation(teacher, soft=0.6)
    torch.testing.assert_close(gradient(loss, student, batch), gradient(mixture, student, batch))
    entropy = -(q * q.log() + (1 - q) * (1 - q).log()).mean()
    torch.testing.assert_close(loss(student, batch) + 0.6 * entropy, mixture(student, batch))


def test_the_size_of_the_gradient_does_not_hang_on_the_temperature() -> None:
    """With T² it stays within a factor of two from T = 1 to 20; without, it falls as 1 / T²."""
    student, teacher, batch = Says(0.5, -1.0, 1.5), Says(-0.5, 0.5, 2.5), labels(0, 0, 0)
    sizes = {t: float(gradient(Distillation(teacher, t, 1.0), student, batch).norm()) for t in (1.0, 2.0, 5.0, 20.0)}
    assert max(sizes.values()) / min(sizes.values()) < 2
    assert sizes[20.0] / 20**2 < sizes[1.0] / 200  # what it would be without: the factor is what holds it up


def test_a_high_temperature_matches_logits() -> None:
    """T² KL → (s − t)² / 8 as T grows, half of what a mean of squares times 1/4 would weigh."""
    s, t = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(bernoulli_kl(s, torch.sigmoid(t / 100), 100.0), (s - t) ** 2 / 8, rtol=1e-3, atol=0)


def test_several_teachers_are_averaged_as_probabilities() -> None:
    loss = Distillation([Says(4.0), Says(0.0)], soft=1.0)
    mean = (1 / (1 + math.exp(-4.0)) + 0.5) / 2
    assert float(loss.targets(labels(1.0))) == pytest.approx(mean, abs=1e-6)  # .741, while σ of the mean logit is .881
    student = Says(math.log(mean / (1 - mean)))
    assert float(gradient(loss, student, labels(0.0)).abs()) < 1e-6


def test_a_teacher_stays_as_it_is() -> None:
    """In training mode dropout and batch norm would make other targets every time and move the buffers."""
    teacher = Noisy().train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    batch = labels(1, 0, 1, 0, numbers=torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    student, loss = Says(0.0, 0.0, 0.0, 0.0), Distillation(teacher, soft=0.5)
    first = gradient(loss, student, batch)
    assert torch.equal(gradient(loss, student, batch), first)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    teacher.train()
    assert torch.equal(gradient(loss, student, batch), first)  # put back into eval mode


def test_rows_without_a_label_learn_from_the_teacher_alone() -> None:
    nan = float("nan")
    student, teacher = Says(0.3, -1.2, 2.0), Says(1.0, -2.0, 0.1)
    weight = torch.tensor([1.0, 2.0, 3.0])
    parts = Distillation(teacher).parts(student, labels(1, nan, nan, weight=weight))
    assert parts["hard"].item() == pytest.approx(math.log1p(math.exp(-0.3)), abs=1e-6)
    each = bernoulli_kl(student.logits, torch.sigmoid(teacher.logits))
    torch.testing.assert_close(parts["soft"], (each * weight).sum() / 6)
    nobody = Distillation(teacher, soft=0.5)(student, labels(nan, nan, nan))
    torch.testing.assert_close(nobody, 0.5 * each.mean())
    assert gradient(Distillation(teacher), student, labels(1, nan, nan)).isfinite().all()


def test_what_cannot_be_is_refused() -> None:
    teacher = Says(1.0)
    with pytest.raises(ValueError, match="temperature must be positive, received 0"):
        Distillation(teacher, temperature=0.0)
    with pytest.raises(ValueError, match=r"between 0 and 1, received 1\.5"):
        Distillation(teacher, soft=1.5)
    with pytest.raises(ValueError, match="at least one teacher"):
        Distillation([])
    with pytest.raises(ValueError, match="its own teacher"):
        Distillation(teacher)(teacher, labels(1.0))


def test_a_checkpoint_knows_its_teacher() -> None:
    """The text of a loss is part of a run's fingerprint: other weights are another loss, the same weights are not."""
    one, other = describe(Distillation(Says(1.0))), describe(Distillation(Says(2.0)))
    assert one != other
    assert one == describe(Distillation(Says(1.0)))
    assert "soft=0.5" in one


class Taught:
    """Rows of which only the first `known` have a label; a click is that two fields agree."""

    def __init__(self, size: int, known: int, seed: int) -> None:
        drawn = torch.randint(0, 8, (size, 2), generator=torch.Generator().manual_seed(seed))
        self.ids = torch.stack([2 + drawn[:, 0], 11 + drawn[:, 1]], dim=1).int()
        agree = (drawn[:, 0] % 4 == drawn[:, 1] % 4).float()
        noise = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
        self.truth = agree
        self.label = torch.where(torch.arange(size) < known, torch.where(noise, 1 - agree, agree), torch.nan)

    def __len__(self) -> int:
        return len(self.label)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        return Batch(ids=self.ids[index], numbers=torch.zeros(len(index), 0), label=self.label[index])


def test_a_student_with_few_labels_learns_what_its_teacher_knows() -> None:
    """Any pair of rankers: here one DeepFM teaches a smaller one, through `fit`, on rows of which 3 % are labelled."""
    spec = make_spec([("a", "context", 10, 1), ("b", "context", 10, 1)])
    data, everything = Taught(3000, 90, 0), Taught(3000, 3000, 0)
    scores = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = DeepFM(spec, embedding_dim=8, hidden=(32,), dropout=0.1)
        fit(teacher, Batches(everything, 100, shuffle=True), BCE(), epochs=8, lr=1e-2, progress=False)
        for name, soft in (("alone", 0.0), ("taught", 0.9)):
            torch.manual_seed(1)
            student = DeepFM(spec, embedding_dim=2, hidden=(8,), dropout=0.0)
            loss = Distillation(teacher, soft=soft)
            fit(student, Batches(data, 100, shuffle=True), loss, epochs=8, lr=1e-2, progress=False)
            with torch.no_grad():
                scores[name] = auc(data.truth.numpy(), student(data.gather(torch.arange(3000), None)).numpy())
    assert scores["taught"] > 0.95
    assert scores["taught"] > scores["alone"] + 0.1


def test_the_teacher_may_be_of_another_kind() -> None:
    world = World(rows_spec())
    teacher, student = DeepFM(world.spec), LogisticRegression(world.spec)
    value = Distillation(teacher)(student, world.batch(16))
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None for p in teacher.parameters())


class Chooses(Says):
    """A classifier whose logits are its parameters: one row."""

    def forward(self, batch: Batch) -> Tensor:
        return self.logits.unsqueeze(0)


CLASS = Batch(label=torch.tensor([1]))


def test_classes_by_hand() -> None:
    """T = 2, s = (0, 0, 0), t = (2 ln 2, 0, 0): q = (.5, .25, .25), p = 1/3 each. KL = ln 3 - 1.5 ln 2 = .0588915,
    times 4 is .235566; cross-entropy is ln 3 = 1.098612; with a = .25 the whole is .882851."""
    student, teacher = Chooses(0.0, 0.0, 0.0), Chooses(2 * math.log(2), 0.0, 0.0)
    loss = Distillation(teacher, temperature=2.0, soft=0.25, hard=CrossEntropy())
    parts = loss.parts(student, CLASS)
    assert parts["soft"].item() == pytest.approx(0.235566, abs=1e-6)
    assert loss(student, CLASS).item() == pytest.approx(0.882851, abs=1e-6)
    # dL_soft/ds = T (p - q)
    only = gradient(Distillation(teacher, temperature=2.0, soft=1.0), student, CLASS)
    torch.testing.assert_close(only, 2 * torch.tensor([1 / 3 - 0.5, 1 / 3 - 0.25, 1 / 3 - 0.25]))


def test_a_classifier_that_agrees_learns_nothing_and_a_constant_says_nothing() -> None:
    student = Chooses(1.0, -2.0, 0.5)
    for shift in (0.0, 7.0):
        soft = Distillation(Chooses(1.0 + shift, -2.0 + shift, 0.5 + shift), temperature=3.0, soft=1.0)
        assert soft(student, CLASS).item() == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(gradient(soft, student, CLASS), torch.zeros(3), atol=1e-6, rtol=0)


def test_at_high_temperature_classes_match_logits() -> None:
    """KL · T² → |s - t|² / 2C for logits of mean zero."""
    s, t = torch.tensor([1.0, -0.5, -0.5]), torch.tensor([-1.0, 2.0, -1.0])
    soft = Distillation(Chooses(*t.tolist()), temperature=100.0, soft=1.0)
    assert soft(Chooses(*s.tolist()), CLASS).item() == pytest.approx(float((s - t).square().sum()) / 6, rel=0.01)


def test_classes_without_soft_part_are_cross_entropy_and_bce_is_refused() -> None:
    student, teacher = Chooses(0.3, -1.0), Chooses(5.0, 0.0)
    hard = Distillation(teacher, soft=0.0, hard=CrossEntropy())
    assert torch.equal(hard(student, CLASS), CrossEntropy()(student, CLASS))
    unlabelled = Distillation(teacher, soft=0.5, hard=CrossEntropy()).parts(student, Batch(label=torch.tensor([-1])))
    assert unlabelled["hard"] == 0 < unlabelled["soft"]
    with pytest.raises(ValueError, match=r"pass hard=CrossEntropy\(\)"):
        Distillation(teacher)(student, CLASS)
