"""DeepFM: it is FM plus an MLP on one table, and either part alone where the other is silenced."""

from __future__ import annotations

import torch
from torch import nn

from funnelrec.core.batch import Batch
from funnelrec.rank.deepfm import DeepFM
from funnelrec.rank.fm import FM
from tests.contracts import World, full_spec, make_spec, rows_spec

SPEC = full_spec()


def model(**arguments: int) -> DeepFM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deepfm = DeepFM(SPEC, hidden=(8, 8), **arguments).eval()
        with torch.no_grad():
            deepfm.embedding.table.weight[1:].normal_()
    return deepfm


def silence(part: nn.Module) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()


def test_by_hand() -> None:
    """One known value a field: v = 2 and −1, w = .5 and .25, and a network that says ReLU(e₁ − e₂) + .1 = 3.1."""
    one = DeepFM(make_spec([("a", "context", 3, 1), ("b", "context", 3, 1)]), embedding_dim=1, hidden=(1,)).eval()
    with torch.no_grad():
        one.embedding.table.weight[2] = torch.tensor([2.0, 0.5])
        one.embedding.table.weight[4] = torch.tensor([-1.0, 0.25])
        first, last = (layer for layer in one.deep.layers if isinstance(layer, nn.Linear))
        first.weight.copy_(torch.tensor([[1.0, -1.0]]))
        last.weight.fill_(1.0)
        last.bias.fill_(0.1)
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    torch.testing.assert_close(one(batch), torch.tensor([0.75 - 2.0 + 3.1]))  # ⟨w,x⟩ + pair + network


def test_without_the_network_it_is_fm() -> None:
    deepfm, batch = model(embedding_dim=4), World(SPEC).batch(16)
    silence(deepfm.deep)
    fm = FM(SPEC, embedding_dim=4)
    fm.embedding.load_state_dict(deepfm.embedding.state_dict())
    torch.testing.assert_close(deepfm(batch), fm(batch))


def test_logit_is_the_sum_of_both_parts() -> None:
    deepfm, batch = model(embedding_dim=4), World(SPEC).batch(16)
    both, deep = deepfm(batch), deepfm.deep(deepfm.embedding(batch).flatten(1)).squeeze(1)
    assert deep.abs().sum() > 0
    silence(deepfm.deep)
    torch.testing.assert_close(both - deep, deepfm(batch), rtol=1e-4, atol=1e-4)


def test_the_table_learns_from_both_parts() -> None:
    """∂/∂table of the whole = ∂/∂table through the network + ∂/∂table through FM: one shared table."""
    deepfm, batch = model(embedding_dim=4), World(SPEC).batch(16)

    def gradient(part: str) -> torch.Tensor:
        deepfm.zero_grad()
        network = deepfm.deep(deepfm.embedding(batch).flatten(1)).squeeze(1)
        {"both": deepfm(batch), "network": network, "fm": deepfm(batch) - network}[part].sum().backward()
        return deepfm.embedding.table.weight.grad.to_dense().clone()

    through_network = gradient("network")
    assert through_network[:, :-1].abs().sum() > 0
    assert (through_network[:, -1] == 0).all(), "the first-order weights are no input of the network"
    torch.testing.assert_close(gradient("both"), through_network + gradient("fm"), rtol=1e-4, atol=1e-4)


def test_one_table_and_nothing_else_grows_with_the_vocabulary() -> None:
    tables = [p for p in DeepFM(rows_spec(), embedding_dim=4).parameters() if p.shape[:1] == (rows_spec().table_rows,)]
    assert [tuple(t.shape) for t in tables] == [(rows_spec().table_rows, 5)]
