"""xDeepFM: CIN against its definition, its gradients, its degree, and what never stays in memory."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.nn.crosses import fm_pairs
from funnelrec.rank import xdeepfm
from funnelrec.rank.xdeepfm import _CIN, XDeepFM, _Compress
from tests.contracts import World, full_spec, quiet

E = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))


def cin(maps: list[int], *, split_half: bool = False, fields: int = 4) -> _CIN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _CIN(fields, maps, split_half)


def by_definition(weights: list[torch.Tensor], e: torch.Tensor) -> torch.Tensor:
    """Eq. (6) and (8) in loops."""
    x, pooled = e, []
    for weight in weights:
        w = weight.view(len(weight), e.shape[1], x.shape[1])
        x = torch.stack(
            [
                sum(w[h, j, i] * x[:, i] * e[:, j] for i in range(x.shape[1]) for j in range(e.shape[1]))
                for h in range(len(w))
            ],
            dim=1,
        )
        pooled.append(x.sum(2))
    return torch.cat(pooled, dim=1)


def test_equals_the_definition() -> None:
    network = cin([3, 2, 4])
    torch.testing.assert_close(network(E), by_definition(list(network.filters), E))
    assert network.out_features == 9


def test_one_map_by_hand() -> None:
    """All weights 1: ‖Σ e_i‖² = 2 FM + Σ ‖e_i‖². Ones above the diagonal only: FM."""
    network = cin([1])
    with torch.no_grad():
        network.filters[0].fill_(1.0)
        torch.testing.assert_close(network(E).squeeze(1), 2 * fm_pairs(E) + E.square().sum((1, 2)))
        network.filters[0].copy_(torch.ones(4, 4).triu(1).view(1, 16))
        torch.testing.assert_close(network(E).squeeze(1), fm_pairs(E))


def test_layer_k_is_homogeneous_of_degree_k_plus_1() -> None:
    network = cin([3, 2])
    once, doubled = network(E), network(2 * E)
    torch.testing.assert_close(doubled[:, :3], 4 * once[:, :3])
    torch.testing.assert_close(doubled[:, 3:], 8 * once[:, 3:])


def test_the_order_of_the_components_does_not_matter() -> None:
    network = cin([3, 2])
    torch.testing.assert_close(network(E[:, :, torch.tensor([4, 2, 0, 1, 3])]), network(E))


def test_split_half_sends_each_map_one_way() -> None:
    network = cin([4, 6, 3], split_half=True)
    assert [tuple(w.shape) for w in network.filters] == [(4, 16), (6, 8), (3, 12)]
    assert network.out_features == 2 + 3 + 3
    whole = by_definition([network.filters[0]], E)
    torch.testing.assert_close(network(E)[:, :2], whole[:, 2:])
    with pytest.raises(ValueError, match=r"even but for the last with split_half, received \(3, 2\)"):
        cin([3, 2], split_half=True)
    with pytest.raises(ValueError, match=r"feature_maps are positive, .* received \(\)"):
        cin([])


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_gradients_whatever_the_size_of_the_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xdeepfm, "ROWS", rows)
    g = torch.Generator().manual_seed(1)
    x, e, w = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((7, 3), (7, 4), (2, 12)))
    out = torch.einsum("rh,rf,nfh->rn", x, e, w.view(2, 4, 3))
    torch.testing.assert_close(_Compress.apply(x, e, w), out)
    expected = torch.autograd.grad(out.square().sum(), (x, e, w))
    got = torch.autograd.grad(_Compress.apply(x, e, w).square().sum(), (x, e, w))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_products_are_not_kept() -> None:
    """What autograd saves is what went in; the products would be H times as large."""
    saved = []
    x, e, w = torch.randn(100, 8, requires_grad=True), torch.randn(100, 9), torch.randn(4, 72)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        _Compress.apply(x, e, w)
    assert sum(saved) == x.numel() + e.numel() + w.numel()


def test_in_bfloat16_the_gradient_is_close() -> None:
    model, batch = XDeepFM(full_spec(), feature_maps=(8, 4)), World(full_spec()).batch(64)
    with torch.no_grad():
        model.embedding.table.weight[1:].normal_()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(batch).sum().backward()
        return model.cin.filters[0].grad.clone()

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradient()
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.02 * exact.norm()


def test_without_the_network() -> None:
    model = XDeepFM(full_spec(), hidden=()).eval()
    assert model.deep is None
    assert quiet(model, World(full_spec()).batch(4))[0].shape == (4,)
