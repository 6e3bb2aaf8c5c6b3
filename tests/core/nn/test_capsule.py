from __future__ import annotations

import pytest
import torch

from funnelrec.core.nn.capsule import SlotVotes, route, squash


def test_squash_by_hand() -> None:
    out = squash(torch.tensor([[0.6, 0.8], [3.0, 4.0], [0.0, 0.0]]))
    # length 1 -> 1/2; length 5 -> 25/26; zero stays zero
    torch.testing.assert_close(out, torch.tensor([[0.3, 0.4], [0.6 * 25 / 26, 0.8 * 25 / 26], [0.0, 0.0]]))


def test_squash_shortens_and_keeps_the_direction() -> None:
    s = torch.randn(200, 5) * torch.logspace(-3, 2, 200).unsqueeze(1)
    out = squash(s)
    assert (out.norm(dim=1) < 1).all()
    torch.testing.assert_close(torch.cosine_similarity(out, s), torch.ones(200), atol=1e-4, rtol=0)


def test_squash_has_a_finite_gradient_at_zero() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    squash(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()
    control = torch.zeros(1, 3, requires_grad=True)
    squash(control, eps=0.0).sum().backward()
    assert control.grad is not None and control.grad.isnan().any()
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squash, (s,))


def test_one_iteration_is_the_even_split() -> None:
    votes = torch.randn(2, 7, 10, 4)
    torch.testing.assert_close(route(votes, iterations=1), squash(votes.sum(1) / 10))


def test_two_iterations_by_hand() -> None:
    # one input, two capsules, votes 1 and 0: v = squash(1/2) = 0.2 for the first, logits become 0.2 and 0
    votes = torch.tensor([[[[1.0], [0.0]]]])
    c = 1 / (1 + torch.exp(torch.tensor(-0.2)))
    torch.testing.assert_close(route(votes, iterations=2)[0, 0, 0], c**2 / (1 + c**2), atol=1e-6, rtol=1e-5)


def test_one_capsule_takes_everything_whatever_the_iterations() -> None:
    votes, mask = torch.randn(3, 5, 1, 4), torch.rand(3, 5) > 0.3
    expected = squash((votes * mask[..., None, None]).sum(1))
    for iterations in (1, 2, 5):
        torch.testing.assert_close(route(votes, mask, torch.randn(3, 5, 1), iterations=iterations), expected)


def test_the_softmax_runs_over_the_capsules() -> None:
    # with all votes of an input equal over capsules and huge, constant logits per input, each input still gives 1
    votes = torch.ones(1, 3, 2, 1)
    logits = torch.tensor([[[5.0, 5.0], [0.0, 0.0], [-5.0, -5.0]]])
    torch.testing.assert_close(route(votes, logits=logits, iterations=1), squash(torch.full((1, 2, 1), 1.5)))


def test_padding_other_examples_and_order() -> None:
    votes, logits = torch.randn(3, 6, 4, 5), torch.randn(3, 6, 4)
    mask = torch.rand(3, 6) > 0.3
    out = route(votes, mask, logits)
    junk = torch.where(mask[..., None, None], votes, torch.full_like(votes, 30.0))
    torch.testing.assert_close(route(junk, mask, logits), out)
    torch.testing.assert_close(route(votes[1:2], mask[1:2], logits[1:2]), out[1:2])
    order = torch.randperm(6)
    torch.testing.assert_close(route(votes[:, order], mask[:, order], logits[:, order]), out)
    assert route(votes, torch.zeros_like(mask), logits).eq(0).all()
    longer = torch.cat([torch.randn(3, 2, 4, 5), votes], 1)
    longer_mask = torch.cat([torch.zeros(3, 2, dtype=torch.bool), mask], 1)
    torch.testing.assert_close(route(longer, longer_mask, torch.cat([logits[:, :2], logits], 1)), out)


def test_shared_votes_need_unequal_logits() -> None:
    shared = torch.randn(2, 6, 1, 5).expand(-1, -1, 3, -1)
    same = route(shared)
    torch.testing.assert_close(same[:, 0], same[:, 2])
    different = route(shared, logits=torch.randn(1, 6, 3))
    assert not torch.allclose(different[:, 0], different[:, 2], atol=1e-3)


def test_votes_without_an_axis_of_capsules_are_the_same_for_all() -> None:
    votes, logits = torch.randn(2, 6, 5), torch.randn(2, 6, 3)
    mask = torch.rand(2, 6) > 0.3
    expected = route(votes.unsqueeze(2).expand(-1, -1, 3, -1), mask, logits)
    torch.testing.assert_close(route(votes, mask, logits), expected)
    with pytest.raises(ValueError, match="need logits that differ"):
        route(votes, mask)


def test_a_capsule_without_logits_takes_nothing() -> None:
    votes, logits = torch.randn(2, 6, 5), torch.randn(1, 6, 3)
    off = torch.tensor([False, True, False])
    out = route(votes, logits=logits.masked_fill(off, -torch.inf))
    assert not out[:, 1].any()
    torch.testing.assert_close(out[:, [0, 2]], route(votes, logits=logits[..., [0, 2]]))


def test_agreement_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    votes = torch.randn(1, 20, 4, 8, generator=generator) * 0.3
    votes[:, :, 0] = torch.randn(8, generator=generator) * 0.3
    lengths = [route(votes, iterations=r)[0, 0].norm().item() for r in range(1, 6)]
    assert lengths == sorted(lengths) and lengths[4] > lengths[0] + 0.05


def test_detached_routing_has_the_same_value_and_another_gradient() -> None:
    votes = torch.randn(2, 6, 3, 4, requires_grad=True)
    detached, full = route(votes), route(votes, detach=False)
    torch.testing.assert_close(detached, full)
    (one,) = torch.autograd.grad(detached.square().sum(), votes)
    (other,) = torch.autograd.grad(full.square().sum(), votes)
    assert one.isfinite().all() and not torch.allclose(one, other)
    # the detached gradient is that of one iteration that starts at the final logits
    start = torch.zeros(2, 6, 3)
    for r in (1, 2):
        v = route(votes.detach(), iterations=r)
        start = start + torch.einsum("bkd,blkd->blk", v, votes.detach())
    (expected,) = torch.autograd.grad(route(votes, logits=start, iterations=1).square().sum(), votes)
    torch.testing.assert_close(one, expected)


def test_refuses_no_iteration() -> None:
    with pytest.raises(ValueError, match="at least 1 iteration, received 0"):
        route(torch.randn(1, 2, 3, 4), iterations=0)


def test_slot_votes_by_hand() -> None:
    """Two slots, two capsules: the newest item goes through the maps of row 0, the one before through row 1."""
    votes = SlotVotes(5, 2, 2)
    with torch.no_grad():
        votes.maps.zero_()
        votes.maps[0] = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0]])
        votes.maps[1] = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    out = votes(torch.tensor([[[1.0, 1.0], [10.0, 1.0]]]))
    assert out[0, 1].tolist() == [[10.0, 1.0], [3.0, 20.0]]
    assert out[0, 0].tolist() == [[5.0, 0.0], [1.0, 1.0]]
