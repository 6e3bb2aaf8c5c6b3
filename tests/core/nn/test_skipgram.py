"""Skip-gram with negative sampling: the pairs, the step and the optimum."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.nn import skipgram
from funnelrec.core.nn.skipgram import Noise, Pairs, SkipGram, Tables


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(pairs: Pairs) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for item, context, _ in pairs.epoch():
        found.update(zip(item.tolist(), context.tolist(), strict=True))
    return found


USERS, OWN = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("block", [2**18, 1])
def test_all_pairs_of_a_set_and_none_across_users(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipgram, "PAIRS_AT_ONCE", block)
    pairs = Pairs(USERS, OWN, 2, None, False, generator())
    expected = {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)}
    assert counted(pairs) == Counter(expected)
    assert pairs.per_epoch() == len(expected)


def test_a_window_over_a_sequence() -> None:
    pairs = Pairs(torch.zeros(4, dtype=torch.int64), torch.arange(4), 1, None, True, generator())
    assert counted(pairs) == Counter({(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)})
    long = Pairs(torch.zeros(3000, dtype=torch.int64), torch.arange(3000), 3, None, True, generator())
    apart = Counter(abs(i - j) for i, j in counted(long))
    # the radius is 1, 2 or 3: a neighbour d away is reached with probability 1, 2/3, 1/3
    assert [apart[d] / 6000 for d in (1, 2, 3)] == pytest.approx([1, 2 / 3, 1 / 3], abs=0.03)
    assert long.per_epoch() == pytest.approx(apart.total(), rel=0.03)


def test_a_window_over_a_set_meets_every_pair_in_time() -> None:
    pairs = Pairs(torch.zeros(6, dtype=torch.int64), torch.arange(6), 1, None, False, generator())
    found = sum((counted(pairs) for _ in range(3000)), Counter())
    # 10 of the 30 pairs an epoch
    assert len(found) == 30
    assert all(n / 3000 == pytest.approx(1 / 3, abs=0.05) for n in found.values())


def test_frequent_items_are_thinned_out_before_the_window_is_laid() -> None:
    """One item is half of the events, a thousand others the rest. With t = .01: √.02 + .02 stay."""
    item = torch.stack([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 1001)], 1).flatten()
    pairs = Pairs(torch.zeros(2000, dtype=torch.int64), item, 1, 0.01, True, generator())
    assert float(pairs.stays[0]) == pytest.approx(math.sqrt(0.02) + 0.02)
    assert float(pairs.stays[1]) == 1
    found = counted(pairs)
    assert sum(n for (i, j), n in found.items() if i and j) > 1400, "the window reaches over what was left out"
    assert pairs.per_epoch() == pytest.approx(found.total(), rel=0.05)


def test_the_first_step_by_hand() -> None:
    """Outputs are zero: every score is 0, the loss is (n + 1) log 2, the inputs stay and the outputs move along u."""
    tables = Tables(9, 4, generator())
    assert float(tables.inputs.abs().max()) <= 0.5 / 4
    before = tables.inputs.clone()
    loss = tables.step(torch.tensor([2, 3]), torch.tensor([4, 5]), torch.tensor([[6, 7, 8], [6, 7, 8]]), 0.1)
    assert loss == pytest.approx(4 * math.log(2))
    assert torch.equal(tables.inputs, before)
    u = before[2]
    torch.testing.assert_close(tables.outputs[4], 0.1 * 0.5 * u / (0.1 + 0.25 * u.square().mean()).sqrt())
    both = 0.5 * (before[2] + before[3])
    torch.testing.assert_close(tables.outputs[6], -0.1 * both / (0.1 + both.square().mean()).sqrt())
    assert not tables.outputs[:4].any()


def test_a_step_is_adagrad_on_the_gradient_of_the_loss() -> None:
    tables, size = Tables(9, 4, generator()), 32
    tables.inputs, tables.outputs = (torch.randn(9, 4, generator=generator(s)) for s in (1, 2))
    item, context = (torch.randint(9, (size,), generator=generator(s)) for s in (3, 4))
    negatives = torch.randint(9, (size, 5), generator=generator(5))  # some are the context itself
    u, v = tables.inputs.clone().requires_grad_(), tables.outputs.clone().requires_grad_()
    positive = (u[item] * v[context]).sum(1)
    against = torch.einsum("bd,bnd->bn", u[item], v[negatives])
    real = negatives != context.unsqueeze(1)
    loss = -(F.logsigmoid(positive).sum() + (F.logsigmoid(-against) * real).sum())
    loss.backward()
    assert tables.step(item, context, negatives, 0.1) == pytest.approx(loss.item() / size, rel=1e-5)
    for table, leaf in ((tables.inputs, u), (tables.outputs, v)):
        scale = (0.1 + leaf.grad.square().mean(1, keepdim=True)).sqrt()
        torch.testing.assert_close(table, leaf.detach() - 0.1 * leaf.grad / scale)


def test_the_optimum_is_the_shifted_mutual_information() -> None:
    """⟨u, v⟩ → log #(i, j) / (n q_j (#i - #(i, j))) where negatives equal to the context do not count."""
    g = generator()
    user = torch.arange(3000).repeat_interleave(3)
    topic = torch.rand(3000, 1, generator=g)
    item = (6 * (0.6 * torch.rand(3000, 3, generator=g) + 0.4 * topic)).long().flatten()
    pairs = Pairs(user, item, 2, None, False, g)
    together = torch.zeros(6, 6)
    for (i, j), n in counted(pairs).items():
        together[i, j] += n
    q = torch.bincount(item).double() / len(item)
    tables, epochs = Tables(6, 12, g), 40
    for epoch in range(epochs):
        for centre, context, _ in pairs.epoch():
            for start in range(0, len(centre), 512):
                c, o = centre[start : start + 512], context[start : start + 512]
                negatives = torch.multinomial(q, 2 * len(c), replacement=True, generator=g).view(-1, 2)
                tables.step(c, o, negatives, 0.3 * (1 - epoch / epochs))
    expected = (together / (2 * q * (together.sum(1, keepdim=True) - together))).log()
    often = together > 200
    assert often.sum() > 12
    got = tables.inputs @ tables.outputs.T
    torch.testing.assert_close(got[often], expected[often].float(), atol=0.15, rtol=0)


def test_noise_follows_the_power_of_the_counts() -> None:
    counts = torch.tensor([0, 1, 10, 100, 1000])
    drawn = torch.bincount(Noise(counts, 0.75).draw(200_000, generator()), minlength=5) / 200_000
    expected = counts.clamp(min=1).double() ** 0.75
    torch.testing.assert_close(drawn.double(), expected / expected.sum(), atol=0.004, rtol=0)


@pytest.mark.parametrize("shared", [3, 4])
def test_shared_negatives_are_the_same_gradient(shared: int) -> None:
    """As if every pair had drawn the same ones, each counting a share."""
    own, together = Tables(9, 4, generator()), Tables(9, 4, generator())
    for tables in (own, together):
        tables.inputs, tables.outputs = (torch.randn(9, 4, generator=generator(s)) for s in (1, 2))
    item, context = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 4, 5, 5])
    negatives = torch.tensor([5, 7, 8, 7])[:shared]  # 5 is a context
    u, v = own.inputs.clone().requires_grad_(), own.outputs.clone().requires_grad_()
    against = (u[item] @ v[negatives].T) * 1.0
    real = negatives != context.unsqueeze(1)
    loss = -F.logsigmoid((u[item] * v[context]).sum(1)).sum() - 0.5 * (F.logsigmoid(-against) * real).sum()
    loss.backward()
    got = together.shared_step(item, context, negatives, 0.5, 0.1)
    assert got == pytest.approx(loss.item() / 4, rel=1e-5)
    for table, leaf in ((together.inputs, u), (together.outputs, v)):
        scale = (0.1 + leaf.grad.square().mean(1, keepdim=True)).sqrt()
        torch.testing.assert_close(table, leaf.detach() - 0.1 * leaf.grad / scale)
    plain = own.step(item, context, negatives.expand(4, -1), 0.1)
    again = Tables(9, 4, generator())
    again.inputs, again.outputs = (torch.randn(9, 4, generator=generator(s)) for s in (1, 2))
    assert again.shared_step(item, context, negatives, 1, 0.1) == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(again.inputs, own.inputs)
    torch.testing.assert_close(again.outputs, own.outputs)


@pytest.mark.parametrize("shared", [None, 20])
def test_words_of_one_context_become_synonyms(shared: int | None) -> None:
    """Words 0 and 1 stand between 2 and 3, word 4 between 5 and 6."""
    g = generator()
    middle = torch.randint(0, 3, (2000,), generator=g)
    middle = torch.tensor([0, 1, 4])[middle]
    left = torch.where(middle == 4, 5, 2)
    token = torch.stack([left, middle, left + 1], 1).flatten()
    train = SkipGram(embedding_dim=8, window=1, ordered=True, subsample=None, shared=shared, epochs=8, batch_size=256)
    inputs, _, losses = train(torch.arange(2000).repeat_interleave(3), token)
    cosine = F.normalize(inputs) @ F.normalize(inputs).T
    assert cosine[0, 1] > 0.9 > 0.5 > cosine[0, 4]
    assert losses[-1] < losses[0]
