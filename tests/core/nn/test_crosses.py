from __future__ import annotations

import torch

from funnelrec.core.nn.crosses import bi_interaction, fm_pairs, pair_index


def test_by_hand() -> None:
    # <a,b> = 11, <a,c> = -1, <b,c> = -7  with a = (1,2), b = (3,4), c = (-1,-1)... <a,c> = -3
    e = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [-1.0, -1.0]]])
    assert fm_pairs(e).tolist() == [11.0 - 3.0 - 7.0]


def test_equals_the_double_loop_and_is_quadratic() -> None:
    e = torch.randn(5, 6, 4, dtype=torch.float64)
    brute = sum((e[:, i] * e[:, j]).sum(1) for i in range(6) for j in range(i + 1, 6))
    torch.testing.assert_close(fm_pairs(e), brute)
    torch.testing.assert_close(fm_pairs(3 * e), 9 * fm_pairs(e))
    torch.testing.assert_close(fm_pairs(e[:, torch.randperm(6)]), fm_pairs(e))


def test_one_field_has_no_pairs() -> None:
    torch.testing.assert_close(fm_pairs(torch.randn(5, 1, 4)), torch.zeros(5), rtol=0, atol=1e-6)


def test_gradient_is_the_sum_of_the_others() -> None:
    e = torch.randn(2, 4, 3, requires_grad=True)
    fm_pairs(e).sum().backward()
    torch.testing.assert_close(e.grad, e.detach().sum(1, keepdim=True) - e.detach())


def test_bi_interaction_sums_to_the_pairs_and_equals_the_double_loop() -> None:
    e = torch.randn(5, 6, 4, dtype=torch.float64)
    brute = sum(e[:, i] * e[:, j] for i in range(6) for j in range(i + 1, 6))
    torch.testing.assert_close(bi_interaction(e), brute)
    torch.testing.assert_close(bi_interaction(e).sum(1), fm_pairs(e))
    torch.testing.assert_close(bi_interaction(e[:, torch.randperm(6)]), brute)


def test_pair_index() -> None:
    left, right = pair_index(4)
    assert left.tolist() == [0, 0, 0, 1, 1, 2]
    assert right.tolist() == [1, 2, 3, 2, 3, 3]
    assert pair_index(1)[0].tolist() == []
