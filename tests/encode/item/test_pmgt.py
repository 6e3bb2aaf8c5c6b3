"""PMGT: attention by hand, what hidden features and empty contexts may change, and a planted graph."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.item.graph import ItemGraph
from funnelrec.encode.item.neighbourhoods import KEPT, SWAPPED, VISIBLE, ZEROED, Neighbourhoods
from funnelrec.encode.item.pmgt import PMGT
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import Terms

GROUPS, EACH = 6, 30


def planted(seed: int = 0) -> tuple[Neighbourhoods, torch.Tensor]:
    """180 items in 6 groups. People take items of one group. Four of the twelve features tell the group, the others
    nothing; half of the items lack the second modality, the last four. Items 2.. are real."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.cat([torch.tensor([-1, -2]), torch.arange(GROUPS).repeat_interleave(EACH)])
    users = torch.arange(600).repeat_interleave(10)
    members = torch.randint(EACH, (6000,), generator=generator)
    items = 2 + (users % GROUPS) * EACH + members
    features = 1.5 * torch.randn(len(group), 12, generator=generator)
    features[:, :4] *= 0.2
    features[:, :4] += torch.randn(GROUPS, 4, generator=generator)[group.clamp(min=0)]
    features[:2] = 0
    present = torch.ones(len(group), 2, dtype=torch.bool)
    present[::2, 1] = False
    features[~present[:, 1], 8:] = 0
    graph = ItemGraph.from_interactions(users, items, len(group), min_count=3)
    return Neighbourhoods(graph, features, present, torch.arange(2, len(group)), size=4), group


def model(**options: object) -> PMGT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PMGT(**{"feature_dims": (8, 4), "embedding_dim": 16, "hidden": 32, "max_len": 4, **options})  # type: ignore[arg-type]
    return made.eval()


def test_attention_by_hand() -> None:
    """Two slots, one head of width 1: Q = 2, K = (1, 0), D = (1, -1)."""
    attention = model(embedding_dim=2, num_heads=2, diversity=0.25).layers[0].attention
    attention.num_heads = 1
    with torch.no_grad():
        attention.into.weight.zero_()
        attention.into.bias.zero_()
        attention.into.weight[0, 0], attention.into.weight[2, 0] = 2.0, 1.0  # q_1 = 2 x_1, k_1 = x_1
        attention.into.weight[6, 0], attention.into.weight[6, 1] = 1.0, -1.0  # d_1 = x_1 - x_2
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    weights, _ = attention.weights(x, torch.tensor([[True, True]]))
    alike = [1 / (1 + math.exp(-2 / math.sqrt(2))), 0.5]  # of slot 1 in both rows
    unlike = [math.exp(1) / (math.exp(1) + math.exp(2)), math.exp(2) / (math.exp(1) + math.exp(2))]
    expected = [0.75 * a + 0.25 * u for a, u in zip(alike, unlike, strict=True)]
    assert weights[0, 0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)
    masked, _ = attention.weights(x, torch.tensor([[True, False]]))
    assert masked[0, 0].tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("diversity", [0.0, 0.2, 1.0])
def test_rows_of_attention_sum_to_one(diversity: float) -> None:
    items, _ = planted()
    batch = items.context(items.nodes[:9], torch.Generator().manual_seed(0))
    made = model(diversity=diversity)
    weights, _ = made.layers[0].attention.weights(made._embed(batch.features, batch.present), batch.mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not weights.masked_select(~batch.mask[:, None, None, :].expand_as(weights)).any()


def test_what_is_masked_or_missing_has_no_say() -> None:
    items, _ = planted()
    batch = items.context(items.nodes[:9], torch.Generator().manual_seed(0))
    mask = batch.mask.clone()
    mask[:, 3:] = False
    made = model()
    vectors = made(batch.replace(mask=mask))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(9))
    noise = torch.where(mask.unsqueeze(2), batch.features, 7.0)
    torch.testing.assert_close(made(batch.replace(mask=mask, features=noise)), vectors)
    assert not torch.allclose(made(batch.replace(features=noise)), made(batch))  # the control
    lacking = batch.features.clone()
    lacking[..., 8:][~batch.present[..., 1]] = 5.0
    torch.testing.assert_close(made(batch.replace(features=lacking)), made(batch))
    nobody = torch.zeros_like(mask)
    nobody[:, 0] = True
    assert torch.isfinite(made(batch.replace(mask=nobody, present=torch.zeros_like(batch.present)))).all()


def test_fates() -> None:
    """A fifth of the contexts' slots is hidden, eight tenths of it zeroed; never an item's own features."""
    items, _ = planted()
    index = torch.arange(len(items)).repeat(40)
    batch = items.gather(index, torch.Generator().manual_seed(0))
    assert batch.features.shape == (len(index), 3, 5, 12)
    assert (batch.fate[:, :, 0] == VISIBLE).all()
    context = batch.mask[:, :, 1:]
    fates = batch.fate[:, :, 1:][context]
    shares = [float((fates == kind).float().mean()) for kind in (ZEROED, KEPT, SWAPPED)]
    assert shares == pytest.approx([0.16, 0.02, 0.02], abs=0.006)
    assert (batch.fate[~batch.mask] == VISIBLE).all()
    same = (batch.features == batch.original).all(-1)
    assert same[(batch.fate == VISIBLE) & batch.mask].all()
    assert same[batch.fate == KEPT].all()
    assert not batch.features[batch.fate == ZEROED].any()
    assert float((~context).all(2).float().mean()) == pytest.approx(0.2, abs=0.02)  # taken away
    graph = items.graph
    rows = {tuple(f.tolist()): row for row, f in enumerate(items.features)}
    target, neighbour = ([rows[tuple(f.tolist())] for f in batch.original[:50, which, 0]] for which in (0, 1))
    for i, j in zip(target, neighbour, strict=True):
        assert j in graph.neighbours[graph.offsets[i] : graph.offsets[i + 1]].tolist()


def test_losses_by_hand() -> None:
    items, _ = planted()
    batch = items.gather(torch.arange(len(items)), torch.Generator().manual_seed(0))
    made = model(temperature=1.0)
    terms = made.training_terms(batch)
    vectors = torch.stack(
        [made(Batch(**{n: batch[n][:, which] for n in ("features", "present", "mask")})) for which in range(3)], 1
    )
    alike, strange = (vectors[:, 0] * vectors[:, 1]).sum(1), (vectors[:, 0] * vectors[:, 2]).sum(1)
    by_hand = 0.5 * (F.softplus(-alike).mean() + F.softplus(strange).mean())
    torch.testing.assert_close(terms["structure"], by_hand)
    assert terms["structure"].item() >= math.log(1 + math.exp(-1))
    with torch.no_grad():
        made.restore.weight.zero_()
        made.restore.bias.zero_()
    hidden = batch.fate != VISIBLE
    real = torch.cat(
        [batch.restorable[..., :1].expand(-1, -1, -1, 8), batch.restorable[..., 1:].expand(-1, -1, -1, 4)], -1
    )
    chosen = batch.original[hidden][real[hidden]]
    torch.testing.assert_close(made.training_terms(batch)["features"], chosen.square().mean())


def test_hidden_features_do_not_help_to_restore_themselves() -> None:
    items, _ = planted()
    batch = items.gather(torch.arange(len(items)), torch.Generator().manual_seed(0))
    zeroed = batch.fate == ZEROED
    made = model()
    shown = batch.features.masked_fill(zeroed.unsqueeze(3), 3.0)
    torch.testing.assert_close(
        made.training_terms(batch.replace(features=shown))["features"], made.training_terms(batch)["features"]
    )


def test_a_planted_graph() -> None:
    """Items that were never seen with anyone find their group by features alone, better than the features do."""
    items, group = planted()
    held = items.nodes[::7]
    known = items.nodes[~torch.isin(items.nodes, held)]
    graph = items.graph.without(held)
    train = Neighbourhoods(graph, items.features, items.present, known, size=4)
    made = model(temperature=0.2).train()
    fit(made, Batches(train, 62, shuffle=True), Terms(), epochs=50, lr=3e-3, progress=False)
    vectors = made.item_vectors(train, torch.arange(len(group)))
    torch.testing.assert_close(vectors, made.item_vectors(train, torch.arange(len(group))))

    def found(x: torch.Tensor) -> float:
        scores = F.normalize(x[held], dim=1) @ F.normalize(x[known], dim=1).T
        return float((group[known][scores.topk(5).indices] == group[held, None]).float().mean())

    plain = found(items.features)
    assert plain < 0.7
    assert found(vectors) > plain + 0.15


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embedding_dim, received 3 and 16"):
        model(num_heads=3)
    with pytest.raises(ValueError, match=r"diversity is in 0\.\.1 and temperature positive, received 2 and 1"):
        model(diversity=2, temperature=1)
    with pytest.raises(ValueError, match="feature_dims are the widths"):
        model(feature_dims=())
