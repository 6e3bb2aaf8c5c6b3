"""NeuralCF: digits, the three variants as parts of one another, and pre-training."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.rank.neural_cf import NeuralCF
from tests.contracts import World, full_spec, make_spec, quiet, rows_spec

SPEC = make_spec([("user", "user", 30, 1), ("item", "item", 20, 1)])
BATCH = World(SPEC).batch(16)


def model(variant: str, *, k: int = 4, spec: object = SPEC) -> NeuralCF:
    with torch.random.fork_rng():
        torch.manual_seed({"neumf": 0, "gmf": 1, "mlp": 2}[variant])
        ncf = NeuralCF(spec, embedding_dim=k, variant=variant).eval()
        with torch.no_grad():
            ncf.embedding.table.weight[1:].normal_()
    return ncf


def head(ncf: NeuralCF) -> torch.nn.Linear:
    return ncf.head.layers[0]


def test_by_hand() -> None:
    """k = 1, one layer. GMF 2 · 3 = 6, MLP ReLU(4 − 1) = 3, h = (1, 10), b = .5."""
    ncf = NeuralCF(make_spec([("user", "user", 3, 1), ("item", "item", 3, 1)]), embedding_dim=1, num_layers=1)
    with torch.no_grad():
        ncf.embedding.table.weight[2] = torch.tensor([2.0, 4.0])
        ncf.embedding.table.weight[4] = torch.tensor([3.0, 1.0])
        ncf.deep.layers[0].weight[:] = torch.tensor([[1.0, -1.0]])
        head(ncf).weight[:] = torch.tensor([[1.0, 10.0]])
        head(ncf).bias.fill_(0.5)
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    torch.testing.assert_close(ncf(batch), torch.tensor([36.5]))


def test_gmf_with_ones_is_matrix_factorisation() -> None:
    gmf = model("gmf")
    with torch.no_grad():
        head(gmf).weight.fill_(1.0)
        head(gmf).bias.zero_()
        vectors = gmf.embedding(BATCH)
    torch.testing.assert_close(gmf(BATCH), (vectors[:, 0] * vectors[:, 1]).sum(1))


def test_the_tower_halves_down_to_the_factors() -> None:
    """`[64, 32, 16, 8]` of the authors: vectors of 32, layers of 32, 16 and 8."""
    widths = [tuple(layer.weight.shape) for layer in model("mlp", k=8).deep.layers if hasattr(layer, "weight")]
    assert widths == [(32, 64), (16, 32), (8, 16)]
    tables, tower, top = 49 * (8 + 32), (64 + 1) * 32 + (32 + 1) * 16 + (16 + 1) * 8, 8 + 8 + 1
    assert sum(p.numel() for p in model("neumf", k=8).parameters()) == tables + tower + top


@pytest.mark.parametrize(("kept", "half"), [("gmf", slice(0, 4)), ("mlp", slice(4, 8))])
def test_half_of_the_head_is_half_of_the_model(kept: str, half: slice) -> None:
    neumf, part = model("neumf"), model(kept)
    with torch.no_grad():
        if kept == "gmf":
            part.embedding.table.weight.copy_(neumf.embedding.table.weight[:, :4])
        else:
            part.embedding.table.weight.copy_(neumf.embedding.table.weight[:, 4:])
            part.deep.load_state_dict(neumf.deep.state_dict())
        head(part).weight.copy_(head(neumf).weight[:, half])
        silent = slice(4, 8) if kept == "gmf" else slice(0, 4)
        head(neumf).weight[:, silent] = 0.0
    torch.testing.assert_close(neumf(BATCH), part(BATCH))


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("spec", [SPEC, full_spec()])
def test_pretrained_starts_between_its_parts(alpha: float, spec: object) -> None:
    gmf, mlp = model("gmf", spec=spec), model("mlp", spec=spec)
    batch = World(spec).batch(16)
    fused = NeuralCF.pretrained(gmf, mlp, alpha=alpha)
    expected = alpha * quiet(gmf, batch)[0] + (1 - alpha) * quiet(mlp, batch)[0]
    torch.testing.assert_close(quiet(fused, batch)[0], expected, rtol=1e-4, atol=1e-5)
    assert fused.config["variant"] == "neumf"


def test_exchanging_user_and_item_changes_the_network_and_not_the_product() -> None:
    world = World(make_spec([("user", "user", 20, 1), ("item", "item", 20, 1)]))
    batch = world.batch(8)
    swapped = batch.replace(ids=torch.stack((batch.ids[:, 1] - 19, batch.ids[:, 0] + 19), dim=1))
    for variant, same in (("gmf", True), ("mlp", False)):
        ncf = model(variant, spec=world.spec)
        before = quiet(ncf, batch)[0]
        with torch.no_grad():
            table = ncf.embedding.table.weight
            table[1:] = torch.cat((table[20:], table[1:20]))
        assert torch.allclose(quiet(ncf, swapped)[0], before, atol=1e-5) == same


def test_refuses() -> None:
    with pytest.raises(ValueError, match="does not name both; name user and item in the schema, or use rank/deepfm"):
        NeuralCF(rows_spec())
    with pytest.raises(ValueError, match="variant is 'neumf', 'gmf' or 'mlp', received 'svd'"):
        NeuralCF(SPEC, variant="svd")
    with pytest.raises(ValueError, match="received 'mlp' and 'gmf' of 4 and 4"):
        NeuralCF.pretrained(model("mlp"), model("gmf"))
    with pytest.raises(ValueError, match="num_layers is at least 1, received 0"):
        NeuralCF(SPEC, num_layers=0)
