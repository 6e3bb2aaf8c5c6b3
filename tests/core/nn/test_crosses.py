from __future__ import annotations

import torch

from funnelrec.core.nn.crosses import bi_interaction, fm_pairs, fm_with_vectors, pair_index


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


def test_rows_with_their_weights_give_the_same_and_its_gradient() -> None:
    rows = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
    e, w = rows[..., :3], rows[..., 3]
    expected = w.sum(1) + fm_pairs(e)
    weights = torch.randn(5, 6, 3, dtype=torch.float64)
    outer = torch.randn(5, dtype=torch.float64)
    ((outer * expected).sum() + (weights * e).sum()).backward()
    gradient, rows.grad = rows.grad, None
    value, vectors = fm_with_vectors(rows)
    torch.testing.assert_close(value, expected)
    assert torch.equal(vectors, e)
    ((outer * value).sum() + (weights * vectors).sum()).backward()
    torch.testing.assert_close(rows.grad, gradient)


def test_under_autocast_the_pairs_stay_exact() -> None:
    rows = torch.randn(5, 6, 4, requires_grad=True)
    value = fm_with_vectors(rows)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low, vectors = fm_with_vectors(rows)
    assert torch.equal(low, value) and vectors.dtype == torch.bfloat16
    (low.sum() + vectors.sum().float()).backward()
    assert rows.grad.dtype == torch.float32 and bool((rows.grad[..., 3] == 1).all())


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
