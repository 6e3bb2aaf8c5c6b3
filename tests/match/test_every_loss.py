"""Every matcher with vectors learns from every loss and every sampler, though none of them knows the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import Table
from funnelrec.learn import distil_ranking, losses
from funnelrec.learn.distil import CatalogueDistillation
from funnelrec.learn.losses import extra_terms
from funnelrec.learn.samplers import LogUniform, Popularity, Uniform
from tests.contracts import make_spec

USERS, ITEMS, LENGTH = 12, 42, 6
STEP = 1e-3  #: length of the step; to the first order the loss falls by that times the norm of the gradient
COUNTS = torch.arange(ITEMS, 0, -1)
SAMPLERS = {"uniform": Uniform(ITEMS), "popularity": Popularity(COUNTS, alpha=0.75), "log-uniform": LogUniform(ITEMS)}
LOSSES: dict[str, losses.Loss] = {
    "FullSoftmax": losses.FullSoftmax(),
    "InBatchSoftmax": losses.InBatchSoftmax(SAMPLERS["popularity"]),
    "GBCE": losses.GBCE(num_negatives=16),
    "BPRMax shared": losses.BPRMax(num_negatives=16, shared=True, in_batch=True),
    **{f"SampledSoftmax {name}": losses.SampledSoftmax(16, sampler=s) for name, s in SAMPLERS.items()},
    **{
        f"{kind.__name__} popularity": kind(num_negatives=8, sampler=SAMPLERS["popularity"])
        for kind in (losses.SampledBCE, losses.BPR, losses.BPRMax, losses.TOP1, losses.TOP1Max)
    },
}
TAUGHT: dict[str, Any] = {
    "CatalogueDistillation": lambda teacher: CatalogueDistillation(teacher, temperature=2.0, soft=0.7),
    "RankingDistillation": lambda teacher: distil_ranking.RankingDistillation(teacher, top=5, others=16),
    "RelaxedRankingDistillation": lambda teacher: distil_ranking.RelaxedRankingDistillation(teacher, top=5, others=16),
}
VECTORS = [n for n in zoo.names() if n.startswith("match/") and hasattr(zoo.load(n), "encode_users")]


def a_batch(model: Any) -> Batch:
    """Person u takes items u, u + 1, …: the last is the target, or each the target of the one before."""
    rows = 2 + (torch.arange(USERS).unsqueeze(1) * 3 + torch.arange(LENGTH + 1)) % (ITEMS - 2)
    history, every = rows[:, :-1], hasattr(model, "encode_positions")
    return Batch(
        history=history,
        mask=torch.ones_like(history, dtype=torch.bool),
        user=torch.arange(USERS) + 2,
        time=torch.arange(USERS) * 86_400,
        target=rows[:, 1:] if every else rows[:, -1],
    )


def value(model: Any, loss: losses.Loss) -> torch.Tensor:
    """The loss in training, with the same negatives and the same dropout each time."""
    batch = a_batch(model)
    torch.manual_seed(1)
    return loss(model.train(), batch) + sum(extra_terms(model, batch).values())


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("loss", [*LOSSES, *TAUGHT])
def test_a_small_step_down_the_gradient_of_every_pair_lowers_its_loss(name: str, loss: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = make_spec([("user", "user", USERS + 2, 1), ("item", "item", ITEMS, 1)])
        model: Any = zoo.load(name)(spec, embedding_dim=16)
        for part in model.modules():
            if isinstance(part, Table):
                part.dense = True
        trains = LOSSES[loss] if loss in LOSSES else TAUGHT[loss](zoo.load(name)(spec, embedding_dim=8))
        before = value(model, trains)
        before.backward()
        learning = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learning])
        assert torch.isfinite(norm) and model.items.weight.grad.abs().sum() > 0
        with torch.no_grad():
            for p in learning:
                p -= STEP / norm * p.grad
            fall = float(before - value(model, trains))
    assert 0.5 < fall / (STEP * float(norm)) < 1.5


def test_the_list_of_losses_is_whole() -> None:
    ranking = {"BCE", "CrossEntropy", "ListSoftmax", "Loss", "Terms", "WeightedLogistic"}
    of_matchers = {n for n in losses.__all__ if isinstance(getattr(losses, n), type)} - ranking
    assert {type(loss).__name__ for loss in LOSSES.values()} == of_matchers
    assert len(VECTORS) >= 7
