"""AFM: the weights run over the pairs, differ, and leave missing fields out; when they are equal it is FM over P."""

from __future__ import annotations

import math

import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.crosses import fm_pairs
from funnelrec.rank.afm import AFM
from tests.contracts import World, auc, full_spec, make_spec, quiet, train

SPEC = full_spec()
WORLD = World(SPEC)


def model() -> AFM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        afm = AFM(SPEC, embedding_dim=4).eval()
        with torch.no_grad():
            afm.embedding.table.weight[1:].normal_()
            afm.embedding.number_vectors.normal_()
    return afm


def test_by_hand() -> None:
    """Three fields of width 1: 2, 3, 1. Pairs 6, 2, 3; scores ln 2 · pair: weights 64 : 4 : 8; p = 10."""
    afm = AFM(make_spec([(n, "context", 3, 1) for n in "abc"]), embedding_dim=1, attention_dim=1).eval()
    with torch.no_grad():
        for row, value in ((2, 2.0), (4, 3.0), (6, 1.0)):
            afm.embedding.table.weight[row, 0] = value
        afm.attend.weight.fill_(math.log(2))
        afm.score.weight.fill_(1.0)
        afm.project.weight.fill_(10.0)
    batch = Batch(ids=torch.tensor([[2, 4, 6]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    pooled = (64 * 6 + 4 * 2 + 8 * 3) / 76
    torch.testing.assert_close(afm(batch), torch.tensor([10 * pooled]))


def test_weights_sum_to_one_over_the_pairs_and_differ() -> None:
    """The authors' code has all weights 1: this is what would show it."""
    afm = model()
    pairs, real = afm.pairs(afm.embedding(WORLD.batch(8)))
    weights = afm.weights(pairs, real)
    assert weights.shape == (8, 55)
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    assert (weights.std(1) > 0.2 * weights.mean(1)).all()


def test_equal_scores_make_it_fm_over_the_number_of_pairs() -> None:
    afm, batch = model(), WORLD.batch(8)
    with torch.no_grad():
        afm.score.weight.zero_()
    first_order, e = afm.embedding.with_linear(batch)
    torch.testing.assert_close(afm(batch), first_order + fm_pairs(e) / 55, rtol=1e-4, atol=1e-4)


def test_pairs_of_a_missing_field_have_no_weight() -> None:
    afm, batch = model(), WORLD.batch(4)
    ids = batch.ids.clone()
    ids[:, 0] = 0
    pairs, real = afm.pairs(afm.embedding(batch.replace(ids=ids)))
    missing = (afm.left == 0) | (afm.right == 0)
    weights = afm.weights(pairs, real)
    assert (weights[:, missing] == 0).all()
    torch.testing.assert_close(weights[:, ~missing].sum(1), torch.ones(4))


def test_one_field_has_no_pair_and_a_finite_logit() -> None:
    one = AFM(make_spec([("a", "context", 5, 1)]))
    assert quiet(one, World(one.embedding.spec).batch(4))[0].isfinite().all()


def test_the_weight_goes_to_the_pair_that_matters() -> None:
    """Label: the first two fields agree; ten pairs in all. Learning moves the attention to that pair."""
    spec = make_spec([(n, "context", 4, 1) for n in "abcde"])
    world = World(spec)

    def labelled(size: int, seed: int) -> Batch:
        batch = world.batch(size, seed=seed)
        return batch.replace(label=((batch.ids[:, 1] - batch.ids[:, 0]) == 3).float())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        afm = AFM(spec, dropout=0.0)
        train(afm, world, (labelled(256, s) for s in range(200)), lr=0.02)
    test = labelled(1000, 999)
    assert auc(test.label, quiet(afm, test)[0]) > 0.99
    with torch.no_grad():
        share = afm.weights(*afm.pairs(afm.embedding(test))).mean(0)
    assert int(share.argmax()) == 0
    assert share[0] > 0.3
