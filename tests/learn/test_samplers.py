from __future__ import annotations

import math

import pytest
import torch

from funnelrec.learn.samplers import LogUniform, Popularity, Sampler, Uniform

COUNTS = torch.tensor([900, 900, 40, 30, 20, 10, 0, 5])


def samplers() -> list[Sampler]:
    return [Uniform(8), LogUniform(8), Popularity(COUNTS), Popularity(COUNTS, alpha=0.5)]


@pytest.mark.parametrize("sampler", samplers(), ids=repr)
def test_odds_are_what_log_q_says(sampler: Sampler) -> None:
    q = sampler.log_q_of(torch.arange(2, 8)).double().exp()
    assert float(q.sum()) == pytest.approx(1, abs=1e-6)
    n = 200_000
    rows, log_q = sampler.sample(n, torch.Generator().manual_seed(1))
    assert torch.equal(log_q, sampler.log_q_of(rows))
    share = torch.bincount(rows, minlength=8)[2:] / n
    assert rows.min() >= 2
    deviations = (share - q) / (q * (1 - q) / n).sqrt()
    assert float(deviations.abs().max()) < 4.5, "a share differs from its probability by more than chance"


def test_hand_worked_odds() -> None:
    assert Popularity(COUNTS).log_q_of(torch.tensor([2, 6])).exp().tolist() == pytest.approx([40 / 106, 1 / 106])
    assert Uniform(8).log_q_of(torch.tensor([5])).exp().tolist() == pytest.approx([1 / 6])
    first = math.log(2) / math.log(7)  # six items: (log 2 - log 1) / log 7
    assert LogUniform(8).log_q_of(torch.tensor([2])).exp().tolist() == pytest.approx([first])


@pytest.mark.parametrize("sampler", samplers(), ids=repr)
def test_torch_default_generator_is_the_default(sampler: Sampler) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first, _ = sampler.sample(50)
        torch.manual_seed(4)
        again, _ = sampler.sample(50)
        other, _ = sampler.sample(50)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_needs_a_real_item() -> None:
    with pytest.raises(ValueError, match="at least one real item: num_items above 2, received 2"):
        Uniform(2)


def test_repr_tells_counts_apart() -> None:
    assert repr(Popularity(COUNTS)) == repr(Popularity(COUNTS.clone()))
    assert repr(Popularity(COUNTS)) != repr(Popularity(COUNTS + 1))
