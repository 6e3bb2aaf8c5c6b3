"""FiBiNET: the gate, the three kinds of bilinear pairs against loops, and the shallow form in digits."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.rank import fibinet
from funnelrec.rank.fibinet import FiBiNET, _Bilinear, _Gate
from tests.contracts import World, full_spec, make_spec, quiet

SPEC = full_spec()
NOTHING = Batch(ids=World(SPEC).batch(1).ids[:0], numbers=World(SPEC).batch(1).numbers[:0])
E = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
PAIRS = [(i, j) for i in range(5) for j in range(i + 1, 5)]


def test_by_hand() -> None:
    """Two fields of width 1, e = 2 and 3, all weights 1, bias .5: p = 2 · 1 · 3 = 6; the gate is
    ReLU(2 + 3) = 5 for both, v = 10 and 15, q = 150."""
    model = FiBiNET(make_spec([(n, "context", 3, 1) for n in "ab"]), embedding_dim=1, bilinear="all", hidden=())
    with torch.no_grad():
        for parameter in (*model.gate.parameters(), *model.plain.parameters(), *model.gated.parameters()):
            parameter.fill_(1.0)
        model.bias.fill_(0.5)
        model.embedding.table.weight[2] = torch.tensor([2.0, 0.25])
        model.embedding.table.weight[4] = torch.tensor([3.0, 0.25])
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    torch.testing.assert_close(model(batch), torch.tensor([0.5 + 0.5 + 6.0 + 150.0]))


@pytest.mark.parametrize(("kind", "matrices"), [("all", 1), ("each", 4), ("interaction", 10)])
def test_pairs_are_those_of_a_double_loop(kind: str, matrices: int) -> None:
    bilinear = _Bilinear(5, 4, kind)
    assert tuple(bilinear.weight.shape) == (matrices, 4, 4), "the last field stands left in no pair"
    which = {"all": lambda n, i: 0, "each": lambda n, i: i, "interaction": lambda n, i: n}[kind]
    expected = [(E[:, i] @ bilinear.weight[which(n, i)]) * E[:, j] for n, (i, j) in enumerate(PAIRS)]
    torch.testing.assert_close(bilinear(E), torch.stack(expected, dim=1))


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
@pytest.mark.parametrize("wide", [1, 24, 1000])  # a group for each left field, groups of one to three, one for all
def test_pairs_times_weights_in_groups(kind: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fibinet, "ROWS", 2)
    monkeypatch.setattr(fibinet, "WIDE", wide)
    bilinear, e = _Bilinear(5, 4, kind), E.clone().requires_grad_()
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out, expected = bilinear.times(e, weight), bilinear(e).flatten(1) @ weight.T
    torch.testing.assert_close(out, expected)
    inputs = (e, bilinear.weight, weight)
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
def test_a_batch_of_nothing(kind: str) -> None:
    model = FiBiNET(SPEC, bilinear=kind)
    model(NOTHING).sum().backward()
    assert quiet(model, NOTHING)[0].shape == (0,)


def test_the_identity_makes_it_the_hadamard_product() -> None:
    bilinear = _Bilinear(5, 4, "all")
    with torch.no_grad():
        bilinear.weight[0] = torch.eye(4)
    torch.testing.assert_close(bilinear(E), torch.stack([E[:, i] * E[:, j] for i, j in PAIRS], dim=1))


def test_gate_squeezes_means_and_is_closed_at_zero() -> None:
    gate = _Gate(5, 3, "relu")
    assert tuple(gate.squeeze.weight.shape) == (1, 5)
    expected = torch.relu(gate.excite(torch.relu(gate.squeeze(E.mean(2)))))
    torch.testing.assert_close(gate(E), expected)
    with torch.no_grad():
        gate.excite.weight.zero_()
    assert not gate(E).any()
    assert _Gate(2, 3, "sigmoid").squeeze.out_features == 1, "at least one hidden unit"


def test_open_gates_and_shared_matrices_make_both_halves_equal() -> None:
    model, batch = FiBiNET(SPEC), World(SPEC).batch(4)
    e = model.embedding(batch)
    model.gated.load_state_dict(model.plain.state_dict())
    torch.testing.assert_close(model.plain(e), model.gated(e * torch.ones(4, e.shape[1], 1)))


def test_fields_permute_with_the_rows_and_columns_of_the_gate() -> None:
    gate, order = _Gate(5, 2, "sigmoid"), torch.tensor([3, 0, 4, 1, 2])
    before = gate(E)
    with torch.no_grad():
        gate.squeeze.weight.copy_(gate.squeeze.weight[:, order])
        gate.excite.weight.copy_(gate.excite.weight[order])
    torch.testing.assert_close(gate(E[:, order]), before[:, order])


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"bilinear is one of all, each, inter.* received 'none', 'relu' and 3"):
        FiBiNET(SPEC, bilinear="none")
    with pytest.raises(ValueError, match="multiplies pairs of fields and this spec has only one"):
        FiBiNET(make_spec([("a", "context", 5, 1)]))
