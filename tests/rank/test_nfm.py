"""NFM: the pooled pairs, and the cases in which it is FM."""

from __future__ import annotations

import torch

from funnelrec.core.batch import Batch
from funnelrec.rank.fm import FM
from funnelrec.rank.nfm import NFM
from tests.contracts import World, full_spec, make_spec, quiet

SPEC = full_spec()


def fill(model: torch.nn.Module) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model.embedding.table.weight[1:].normal_()


def test_by_hand() -> None:
    """Vectors (2, 1) and (−1, 3), w = .5 and .25, pooled (−2, 3), network ReLU(−2 + 3) · 10 + .1."""
    nfm = NFM(
        make_spec([("a", "context", 3, 1), ("b", "context", 3, 1)]), embedding_dim=2, hidden=(1,), batch_norm=False
    ).eval()
    with torch.no_grad():
        nfm.embedding.table.weight[2] = torch.tensor([2.0, 1.0, 0.5])
        nfm.embedding.table.weight[4] = torch.tensor([-1.0, 3.0, 0.25])
        nfm.top.layers[0].weight.fill_(1.0)
        nfm.top.layers[-1].weight.fill_(10.0)
        nfm.top.layers[-1].bias.fill_(0.1)
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    torch.testing.assert_close(nfm(batch), torch.tensor([0.75 + 10.0 + 0.1]))


def test_without_hidden_layers_and_norm_it_starts_as_fm() -> None:
    nfm, fm = NFM(SPEC, embedding_dim=5, hidden=(), batch_norm=False), FM(SPEC, embedding_dim=5)
    fill(nfm)
    fm.embedding.load_state_dict(nfm.embedding.state_dict())
    batch = World(SPEC).batch(16)
    torch.testing.assert_close(quiet(nfm, batch), quiet(fm, batch), rtol=1e-4, atol=1e-4)


def test_dropout_and_batch_norm_act_on_the_pooled_pairs() -> None:
    """In training the pooled vector is normalised over the batch and then thinned out."""
    batch = World(SPEC).batch(64)
    nfm = NFM(SPEC, embedding_dim=8, hidden=(), pair_dropout=0.5)
    fill(nfm)
    seen = []
    nfm.top.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    nfm.train()
    nfm(batch)
    nfm.drop.p = 0.0
    nfm(batch)
    dropped, kept = seen
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(kept.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(kept.std(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)
