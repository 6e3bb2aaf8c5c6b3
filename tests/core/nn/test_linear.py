"""The product that leaves MKL where MKL is slow: the same numbers, gradients, and rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.core.nn import linear as module
from funnelrec.core.nn.linear import Linear, linear, product


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, whatever this machine would choose; small products too."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN operator for linear layers")
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "FEW", 1)
    return bool(request.param)


def test_by_hand(onednn: bool) -> None:
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, -1.0]]), torch.tensor([0.5, 0.0])
    assert linear(x, weight, bias).tolist() == [[11.5, 3.0]]
    assert product(x, weight).tolist() == [[11.0, 3.0]]


@pytest.mark.parametrize("shape", [(7, 6), (3, 5, 6), (2, 3, 4, 6), (1, 6), (0, 6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_torch(onednn: bool, shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    layer, x, toward = Linear(6, 4, bias=with_bias), torch.randn(shape), torch.randn(*shape[:-1], 4)
    found, expected = [], []
    for results, forward in ((found, layer), (expected, lambda x: F.linear(x, layer.weight, layer.bias))):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(toward)
        results += [y, leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_any_layout_is_read_rightly(onednn: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8).T, torch.randn(6, 5).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-6)
    part = torch.randn(5, 20)[:, 7:13]
    torch.testing.assert_close(linear(x, part), F.linear(x, part), rtol=1e-5, atol=1e-6)
    wide = torch.randn(6).expand(3, 4, 6)
    torch.testing.assert_close(linear(wide, weight), F.linear(wide, weight), rtol=1e-5, atol=1e-6)
    leaf = torch.randn(4, 6, requires_grad=True)
    linear(leaf, weight).sum().backward()  # a gradient that is one number, expanded
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(4, 6), rtol=1e-5, atol=1e-6)


def test_part_of_a_wider_matrix_is_copied_and_a_transposed_one_is_not() -> None:
    weight = torch.randn(4, 12)
    assert module._dense(weight[:, 3:9]).is_contiguous()
    assert module._dense(weight) is weight
    turned = weight.t()
    assert module._dense(turned) is turned


def test_only_what_needs_a_gradient_gets_one(onednn: bool) -> None:
    frozen = Linear(6, 4).requires_grad_(False)
    leaf = torch.randn(3, 6, requires_grad=True)
    frozen(leaf).sum().backward()
    assert leaf.grad is not None and frozen.weight.grad is None and frozen.bias.grad is None
    with torch.no_grad():
        assert not frozen(leaf).requires_grad


def test_other_types_and_autocast_are_torch_s(onednn: bool) -> None:
    layer = Linear(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 6)).dtype == torch.bfloat16
        assert product(torch.randn(3, 6), torch.randn(4, 6)).dtype == torch.float32
    assert layer.double()(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64
    assert (
        product(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)).tolist()
        == [[3.0] * 2] * 2
    )


def test_graphs_that_are_exported_hold_torch_s_own_layer(onednn: bool) -> None:
    program = torch.export.export(nn.Sequential(Linear(6, 4)), (torch.randn(3, 6),))
    assert "aten.linear.default" in {str(node.target) for node in program.graph.nodes}


def test_the_large_product_leaves_mkl_where_mkl_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        called.append(tuple(x.shape))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(module, "_onednn", spy)
    for slow, expected in ((True, [(4096, 64)]), (False, [])):
        monkeypatch.setattr(module, "_mkl_is_slow", lambda slow=slow: slow)
        called.clear()
        linear(torch.randn(4096, 64), torch.randn(64, 64))
        linear(torch.randn(2, 64), torch.randn(2**17, 64))  # few rows: reading the weights is all the work
        linear(torch.randn(256, 64), torch.randn(64, 64))  # too small to pay
        assert called == expected
