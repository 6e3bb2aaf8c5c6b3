"""Averaging, recurrence and convolution over words: what padding may not change, and what each can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.text.average import WordAverage
from funnelrec.encode.text.classifier import TextClassifier, begin_from, token_table
from funnelrec.encode.text.rnn import MERGES, TextRNN
from funnelrec.encode.text.textcnn import TextCNN
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy

TOKENS = 30
NETWORKS: dict[str, Any] = {
    "average": lambda **o: WordAverage(num_tokens=TOKENS, **o),
    "pairs": lambda **o: WordAverage(num_tokens=TOKENS, buckets=50, **o),
    "cnn": lambda **o: TextCNN(num_tokens=TOKENS, num_filters=6, **o),
    **{f"rnn-{m}": lambda m=m, **o: TextRNN(num_tokens=TOKENS, hidden_dim=6, merge=m, **o) for m in MERGES},
    "rnn-last": lambda **o: TextRNN(num_tokens=TOKENS, hidden_dim=6, pooling="last", **o),
    "rnn-max": lambda **o: TextRNN(num_tokens=TOKENS, hidden_dim=6, pooling="max", cell="gru", **o),
    "rnn-deep": lambda **o: TextRNN(num_tokens=TOKENS, hidden_dim=4, num_layers=3, residual=True, cell="rnn", **o),
}


def built(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = NETWORKS[name](embedding_dim=8, **options)
    return network.eval()


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_changes_nothing_and_the_shortest_texts_are_read(name: str) -> None:
    network, content = built(name, num_classes=3), text(4, 7)
    content[1, 1:] = 0  # one word
    content[2, 5:] = 0
    content[3] = 0  # none
    logits = network(content)
    longer = torch.cat([content, torch.zeros(4, 6, dtype=torch.int64)], 1)
    torch.testing.assert_close(network(longer), logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network(content[1:2, :1]), logits[1:2], atol=1e-6, rtol=1e-5)
    assert logits.shape == (4, 3) and logits.isfinite().all()
    assert not network.encode(content)[3].any(), "a text without a word is the zero vector"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns_and_no_classes_means_vectors(name: str) -> None:
    network = built(name)
    network(text(5, 6)).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    vectors = built(name, num_classes=0)
    assert torch.equal(vectors(text(5, 6)), vectors.encode(text(5, 6)))
    assert vectors(text(5, 6)).shape == (5, vectors.num_features)


def test_only_averaging_does_not_care_for_the_order() -> None:
    content = text(3, 8)
    shuffled = content[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    for name, cares in (("average", False), ("pairs", True), ("cnn", True), ("rnn-concat", True)):
        network = built(name)
        assert torch.allclose(network(content), network(shuffled), atol=1e-6) != cares, name


def test_averages_by_hand() -> None:
    network = built("average", num_classes=0)
    e = network.table.weight
    got = network(torch.tensor([[3, 4, 0], [5, 0, 0]]))
    torch.testing.assert_close(got, torch.stack([(e[3] + e[4]) / 2, e[5]]))
    pairs = built("pairs", num_classes=0)
    e, f = pairs.table.weight, pairs.pairs.weight
    both = f[1 + (3 * 1_000_003 + 4) % 50]
    torch.testing.assert_close(pairs(torch.tensor([[3, 4, 0]])), ((e[3] + e[4] + both) / 2).unsqueeze(0))


def test_merges_by_hand() -> None:
    """The six joins have the same two readers inside; readers swapped over a text turned round swap states."""
    content = text(2, 5)
    states = {}
    for merge in MERGES:
        network = built(f"rnn-{merge}", num_classes=0)
        if merge in ("forward", "backward"):
            source = built("rnn-concat", num_classes=0)
            layer = source.layers[0].ahead if merge == "forward" else source.layers[0].behind
            (network.layers[0].ahead or network.layers[0].behind).load_state_dict(layer.state_dict())
            network.table.load_state_dict(source.table.state_dict())
        states[merge] = network.states(content)[0]
    f, g = states["forward"], states["backward"]
    torch.testing.assert_close(states["concat"], torch.cat([f, g], 2))
    torch.testing.assert_close(states["sum"], f + g)
    torch.testing.assert_close(states["average"], (f + g) / 2)
    torch.testing.assert_close(states["multiply"], f * g)
    network = built("rnn-concat", num_classes=0)
    layer = network.layers[0]
    layer.ahead, layer.behind = layer.behind, layer.ahead
    turned = network.states(content.flip(1))[0].flip(1)
    torch.testing.assert_close(turned, torch.cat([g, f], 2))
    assert built("rnn-concat").num_features == 12 and built("rnn-sum").num_features == 6


def test_the_last_state_is_that_after_the_last_word_of_each_reader() -> None:
    network, content = built("rnn-last", num_classes=0), text(2, 6)
    content[1, 4:] = 0
    states, _ = network.states(content)
    v = network(content)
    torch.testing.assert_close(v[0], torch.cat([states[0, 5, :6], states[0, 0, 6:]]))
    torch.testing.assert_close(v[1], torch.cat([states[1, 3, :6], states[1, 0, 6:]]))


def test_layers_that_add_nothing_are_the_identity() -> None:
    torch.manual_seed(0)
    network = TextRNN(
        num_tokens=TOKENS, embedding_dim=8, hidden_dim=4, num_layers=3, residual=True, num_classes=0
    ).eval()
    with torch.no_grad():
        for name, parameter in network.layers.named_parameters():
            if "weight" in name or "bias" in name:
                parameter.zero_()
    content = text(2, 5)
    torch.testing.assert_close(network.states(content)[0], network.table(content))


def test_a_filter_by_hand() -> None:
    """One filter (1, 2) of two words: windows 0a, ab, bc, c0 of a = 1, b = -3, c = 2."""
    network = TextCNN(num_tokens=5, embedding_dim=1, widths=(2,), num_filters=1, num_classes=0).eval()
    with torch.no_grad():
        network.table.weight[2:, 0] = torch.tensor([1.0, -3.0, 2.0])
        network.filters[0].weight[:] = torch.tensor([[[1.0, 2.0]]])
        network.filters[0].bias.fill_(0.5)
    # 2·1, 1 - 6, -3 + 4, 2, each + .5
    assert network(torch.tensor([[2, 3, 4]])).item() == pytest.approx(2.5)
    with torch.no_grad():
        network.filters[0].weight.neg_()
    assert network(torch.tensor([[2, 3, 4, 0, 0]])).item() == pytest.approx(5.5)
    assert network(torch.tensor([[2, 0, 0]])).item() == 0, "max(-1, -2) + .5 < 0; padding alone would be .5"


class Phrases:
    """Texts of 8 words, with the words 5 6 7 in this order somewhere (class 1) or in another order (class 0)."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(3)
        self.text = torch.randint(8, TOKENS, (n, 8), generator=g)
        self.label = torch.randint(0, 2, (n,), generator=g)
        place = torch.randint(0, 6, (n,), generator=g)
        wrong = torch.tensor([[6, 5, 7], [7, 6, 5], [5, 7, 6]])
        for i in range(n):
            phrase = torch.tensor([5, 6, 7]) if self.label[i] else wrong[i % 3]
            self.text[i, place[i] : place[i] + 3] = phrase

    def __len__(self) -> int:
        return len(self.text)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        return Batch(text=self.text[index], label=self.label[index])


@pytest.mark.parametrize(
    ("name", "least", "most"), [("cnn", 0.99, 1.0), ("rnn-concat", 0.95, 1.0), ("average", 0, 0.6)]
)
def test_a_planted_phrase_is_found_by_those_who_read_in_order(name: str, least: float, most: float) -> None:
    data = Phrases(600)
    torch.manual_seed(0)
    network = NETWORKS[name](embedding_dim=16, dropout=0.0)
    fit(TextClassifier(network), Batches(data, 50, shuffle=True), CrossEntropy(), epochs=12, lr=2e-2, progress=False)
    right = float((network(data.text).argmax(1) == data.label).float().mean())
    assert least <= right <= most


def test_vectors_from_elsewhere() -> None:
    torch.manual_seed(0)
    table = token_table(12, 4)
    assert not table.weight[0].any() and float(table.weight.detach().abs().max()) <= 0.25
    vectors = torch.randn(5, 4)
    assert begin_from(table, torch.arange(2, 7), vectors, frozen=True) == pytest.approx(0.5)
    assert torch.equal(table.weight[2:7], vectors)
    assert not table.weight[0].any() and not table.weight.requires_grad
    assert float(table.weight[7:].detach().var()) == pytest.approx(float(vectors.var()), rel=0.6)
    with pytest.raises(ValueError, match="build the network with embedding_dim=3"):
        begin_from(table, torch.arange(2, 7), torch.randn(5, 3))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="merge must be one of concat, sum, average, multiply, forward, backward"):
        TextRNN(num_tokens=5, merge="mix")
    with pytest.raises(ValueError, match="pooling must be one of last, mean, max, received 'min'"):
        TextRNN(num_tokens=5, pooling="min")
    with pytest.raises(ValueError, match="widths are numbers of words"):
        TextCNN(num_tokens=5, widths=())
