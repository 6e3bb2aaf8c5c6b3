"""The losses that hold a target against sampled negatives; and every loss with every model of match/."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import Table
from funnelrec.core.schema import Spec
from funnelrec.learn import losses
from funnelrec.learn.losses import (
    BPR,
    GBCE,
    TOP1,
    BPRMax,
    FullSoftmax,
    InBatchSoftmax,
    SampledBCE,
    SampledSoftmax,
    TOP1Max,
)
from funnelrec.learn.samplers import LogUniform, Popularity, Sampler, Uniform
from tests import contracts as c

FAMILY = (SampledBCE, GBCE, BPR, TOP1, TOP1Max, BPRMax)


class Lines(nn.Module):
    """A user is the mean of the history, one coordinate; an item's vector is a number."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.spec = Spec(num_items=len(values))
        self.items = Table(len(values), 1)
        with torch.no_grad():
            self.items.weight.copy_(torch.tensor(values).unsqueeze(1))

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.items(batch.history).mean(1, keepdim=True), batch.mask.any(1, keepdim=True)

    def encode_items(self, rows: Tensor) -> Tensor:
        vectors: Tensor = self.items(rows)
        return vectors


@dataclass(frozen=True)
class Given:
    """A sampler that gives what it was given, with odds of one in four."""

    rows: tuple[int, ...]

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(self.rows).repeat(-(-n // len(self.rows)))[:n]
        return rows, self.log_q_of(rows)

    def log_q_of(self, rows: Tensor) -> Tensor:
        return torch.full(rows.shape, -math.log(4))


def one_pair() -> tuple[Lines, Batch]:
    """A user 1 whose target scores 1; items 3 and 4 score 0 and 2."""
    model = Lines([0, 0, 1, 0, 2, 1])
    return model, Batch(history=torch.tensor([[5]]), mask=torch.tensor([[True]]), target=torch.tensor([2]))


BY_HAND = [
    # log(1 + e^-1), log 2, log(1 + e^2): .313262, .693147, 2.126928
    (SampledBCE(2), 1.044446),
    (GBCE(2, calibration=0.5), 1.018340),  # the target is drawn 2/4 times: β = 1 - .5 · .5
    (GBCE(2, calibration=0.0), 1.044446),
    (BPR(2), 0.813262),  # (log(1 + e^-1) + log(1 + e)) / 2
    # σ(-1) + σ(0) = .768941, σ(1) + σ(4) = 1.713073
    (TOP1(2), 1.241007),
    (TOP1Max(2), 1.600530),  # the softmax of 0 and 2: .119203, .880797
    (BPRMax(2, penalty=0.0), 1.126929),  # -log(.119203 · .731059 + .880797 · .268941)
    (BPRMax(2, penalty=0.5), 1.126929 + 0.5 * 3.523188),  # .880797 · 2²
    # ELU leaves 0, 1 and 2 as they are
    (BPRMax(2, penalty=0.5, elu=0.3), 1.126929 + 0.5 * 3.523188),
]


@pytest.mark.parametrize(("loss", "expected"), BY_HAND, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("shared", [True, False])
def test_by_hand(loss: Any, expected: float, shared: bool) -> None:
    model, batch = one_pair()
    value = replace(loss, sampler=Given((3, 4)), shared=shared)(model, batch)
    assert value.item() == pytest.approx(expected, abs=2e-6)


def test_elu_bends_negative_scores() -> None:
    model, batch = one_pair()
    with torch.no_grad():
        model.items.weight[3] = -1.0
    bent = 0.3 * (math.exp(-1) - 1)
    value = BPRMax(1, sampler=Given((3,)), penalty=1.0, elu=0.3)(model, batch)
    assert value.item() == pytest.approx(math.log(1 + math.exp(bent - 1)) + bent**2, abs=1e-6)


def test_with_one_negative_bpr_max_is_bpr() -> None:
    model, batch = one_pair()
    draw = Given((4,))
    assert BPRMax(1, draw, penalty=0.0)(model, batch).item() == pytest.approx(BPR(1, draw)(model, batch).item())
    assert TOP1Max(1, draw)(model, batch).item() == pytest.approx(TOP1(1, draw)(model, batch).item())


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("shared", [True, False])
def test_the_target_is_never_its_own_negative(kind: Any, shared: bool) -> None:
    model, batch = one_pair()
    without = kind(2, sampler=Given((3, 4)), shared=shared)(model, batch).item()
    drawn = kind(3, sampler=Given((3, 4, 2)), shared=shared)
    if kind is GBCE:
        drawn = replace(drawn, calibration=0.0)
        without = SampledBCE(2, sampler=Given((3, 4)))(model, batch).item()
    scale = 3 / 4 if kind in (SampledBCE, GBCE) else 1  # the mean is over what was drawn
    assert drawn(model, batch).item() == pytest.approx(without * scale, abs=1e-6)
    nothing = kind(2, sampler=Given((2,)), shared=shared)(model, batch)
    nothing.backward()
    assert nothing.isfinite()
    assert model.items.weight.grad.to_dense().isfinite().all()
    if kind not in (SampledBCE, GBCE):
        assert nothing.item() == 0


def several(seed: int = 0, size: int = 40) -> tuple[Lines, Batch]:
    g = torch.Generator().manual_seed(seed)
    model = Lines([0.0, 0.0, *torch.randn(28, generator=g).tolist()])
    history = torch.randint(2, 30, (size, 3), generator=g)
    return model, Batch(history=history, mask=history > 0, target=torch.randint(2, 30, (size,), generator=g))


@pytest.mark.parametrize("kind", [SampledBCE, BPR, TOP1, TOP1Max, BPRMax])
def test_the_other_targets_of_the_batch_as_negatives(kind: Any) -> None:
    model, batch = several()
    expected = kind(40, Given(tuple(batch.target.tolist())), shared=True)(model, batch)
    torch.testing.assert_close(kind(0, shared=True, in_batch=True)(model, batch), expected)
    more = kind(41, Given((*batch.target.tolist(), 7)), shared=True)(model, batch)
    torch.testing.assert_close(kind(1, Given((7,)), shared=True, in_batch=True)(model, batch), more)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("shared", [True, False])
def test_in_parts_the_value_and_the_gradient_are_the_same(
    kind: Any, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = kind(6, Given((3, 9, 4, 4, 20, 11)), shared=shared)

    def run() -> tuple[Tensor, Tensor]:
        model, batch = several()
        value = loss(model, batch)
        value.backward()
        return value.detach(), model.items.weight.grad.to_dense()

    whole = run()
    monkeypatch.setattr(losses, "SCORES_BYTES", 7 * 4 * 6)
    parts = run()
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])
    assert whole[1].abs().sum() > 0


@pytest.mark.parametrize("kind", FAMILY)
def test_large_scores_stay_finite(kind: Any) -> None:
    model, batch = several()
    with torch.no_grad():
        model.items.weight.mul_(1e3)
    value = kind(5, shared=True)(model, batch)
    value.backward()
    assert value.isfinite()
    assert model.items.weight.grad.to_dense().isfinite().all()


def learned_probabilities(loss: Any) -> Tensor:
    """σ of the scores that one user learns for eight items whose targets follow fixed shares."""
    counts = torch.tensor([0, 0, 64, 32, 16, 8, 4, 2, 1, 1])
    target = torch.arange(10).repeat_interleave(counts)
    batch = Batch(history=torch.full((128, 1), 1), mask=torch.ones(128, 1, dtype=torch.bool), target=target)
    model = Lines([0.0] * 10)
    model.items.dense = True
    model.encode_users = lambda b: (torch.ones(128, 1, 1), b.mask)  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(400):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            schedule.step()
    return model.items.weight.detach()[2:, 0].sigmoid()


@pytest.mark.parametrize("sampler", [None, Popularity(torch.tensor([0, 0, 64, 32, 16, 8, 4, 2, 1, 1]), alpha=0.5)])
def test_gbce_learns_probabilities_and_bce_exaggerates(sampler: Sampler | None) -> None:
    truth = torch.tensor([64, 32, 16, 8, 4, 2, 1, 1]) / 128
    calibrated = learned_probabilities(GBCE(4, sampler, shared=False, calibration=1.0))
    torch.testing.assert_close(calibrated, truth, atol=0.03, rtol=0.15)
    confident = learned_probabilities(SampledBCE(1, sampler))
    odds = torch.full((8,), 1 / 8) if sampler is None else sampler.log_q_of(torch.arange(2, 10)).exp()
    torch.testing.assert_close(confident, truth / (truth + (1 - truth) * odds), atol=0.05, rtol=0.1)
    assert (confident > 2 * truth)[1:].all()


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match=r"num_negatives must be at least 1 .* received 0"):
        BPR(0)
    with pytest.raises(ValueError, match="set shared=True too"):
        BPR(1, in_batch=True)
    with pytest.raises(ValueError, match=r"calibration must lie in \[0, 1\], received 1.5"):
        GBCE(calibration=1.5)
    with pytest.raises(ValueError, match="in_batch must be False"):
        GBCE(in_batch=True)


# --- every loss with every model -----------------------------------------------------------------------------------

MODELS = [name for name in zoo.names("match") if hasattr(zoo.load(name), "encode_users")]
FULL = c.World(c.full_spec())
SAMPLERS: tuple[Sampler | None, ...] = (None, LogUniform(62), Popularity(torch.arange(62), alpha=0.75))


def every_loss() -> list[Any]:
    found: list[Any] = [FullSoftmax(), InBatchSoftmax(), InBatchSoftmax(Uniform(62))]
    for sampler in SAMPLERS:
        found += [SampledSoftmax(8, sampler=sampler), GBCE(8, sampler), GBCE(8, sampler, shared=False)]
        for kind in (SampledBCE, BPR, TOP1, TOP1Max, BPRMax):
            found += [kind(8, sampler), kind(8, sampler, shared=True, in_batch=True)]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_loss_trains_every_model(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load(name)(FULL.spec)
        last = FULL.batch(64)
        batches = [last]
        if hasattr(model, "encode_positions"):
            targets = torch.cat([last.history[:, 1:], last.target.unsqueeze(1)], 1).masked_fill(~last.mask, 0)
            batches.append(last.replace(target=targets))
        for loss in every_loss():
            for batch in batches:
                model.train().zero_grad()
                value = loss(model, batch)
                value.backward()
                assert value.isfinite(), repr(loss)
                for parameter_name, parameter in model.named_parameters():
                    gradient = parameter.grad.to_dense()
                    assert gradient.isfinite().all() and gradient.abs().sum() > 0, f"{loss!r}: {parameter_name}"
