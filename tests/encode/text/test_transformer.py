from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.transformer import Attention, causal_bias, padding_bias, sinusoidal_positions
from funnelrec.data.batches import Batches
from funnelrec.encode.text.decoding import BEGIN, END, beam_search, greedy
from funnelrec.encode.text.transformer import Transformer
from funnelrec.learn.fit import fit
from funnelrec.learn.schedules import Noam
from funnelrec.learn.text import KeepWeights, NextToken, average_weights, token_scores

ROWS, LENGTH = 14, 10  # padding, unknown, begin, end and ten symbols


class Copies:
    """Texts of ten symbols, at least four long, whose translation is the text itself."""

    def __init__(self, number: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(4, ROWS, (number, LENGTH), generator=generator)
        lengths = torch.randint(4, LENGTH + 1, (number, 1), generator=generator)
        self.rows[torch.arange(LENGTH) >= lengths] = 0

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        source = self.rows[index]
        target = torch.nn.functional.pad(source, (1, 1))
        target[:, 0] = BEGIN
        target[torch.arange(len(index)), 1 + (source != 0).sum(1)] = END
        return Batch(source=source, target=target)


def small(**changed: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_dim": 64, "num_layers": 2, "num_heads": 4, "ff_dim": 128, "dropout": 0.1}
    return Transformer(**{"source_tokens": ROWS, "target_tokens": ROWS, **sizes, "max_len": 80, **changed})


@pytest.fixture(scope="module")
def copier() -> Transformer:
    """Trained on the copy task, once for all tests that need a model that means what it writes."""
    model = small(pre_norm=True)
    batches = Batches(Copies(4000), 64, shuffle=True)
    fit(model, batches, NextToken(0.1), epochs=8, lr=1.0, schedule=Noam(64, 150), progress=False)
    return model


def batch(number: int = 6, seed: int = 5) -> Batch:
    return Copies(number, seed).gather(torch.arange(number), None)


# ------------------------------------------------------------------------------------------------------ worked by hand
def test_positions_by_hand() -> None:
    table = sinusoidal_positions(3, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    # p = 2: the first pair turns by 1 a step, the second by 1 / 10000^(2/4) = 0.01
    assert table[2].tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)])
    with pytest.raises(ValueError, match="must be even, received 5"):
        sinusoidal_positions(3, 5)


def test_products_of_positions_depend_on_their_distance_alone() -> None:
    table = sinusoidal_positions(40, 16).double()
    products = table @ table.T
    for distance in (0, 3, 17):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_attention_by_hand() -> None:
    attention = Attention(1, 1)
    for linear in (attention.query, attention.key, attention.value, attention.out):
        torch.nn.init.ones_(linear.weight)
    x = torch.tensor([[[0.0], [math.log(2.0)]]])
    # the first query is 0 and weighs both alike: ln 2 / 2. The second: scores 0 and (ln 2)²
    weight = math.exp(math.log(2) ** 2)
    expected = [math.log(2) / 2, math.log(2) * weight / (1 + weight)]
    assert attention(x).flatten().tolist() == pytest.approx(expected)
    assert attention(x, bias=causal_bias(2, x.device)).flatten().tolist() == pytest.approx([0.0, expected[1]])
    only_first = padding_bias(torch.tensor([[True, False]]))
    assert attention(x, bias=only_first).flatten().tolist() == pytest.approx([0.0, 0.0])
    assert padding_bias(torch.tensor([[True, True]])) is None
    nothing = attention(x, bias=padding_bias(torch.tensor([[False, False]])))
    assert nothing.isfinite().all()


def test_attention_agrees_with_the_fused_one() -> None:
    torch.manual_seed(0)
    ours = Attention(16, 4)
    torch_like = super(Attention, ours).forward
    x, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [2], [4]])
    assert torch.allclose(ours(x, bias=padding_bias(mask)), torch_like(x, mask=mask), atol=1e-6)
    assert torch.allclose(ours(x, bias=causal_bias(5, x.device)), torch_like(x, causal=True), atol=1e-6)


class Constant:
    """Logits that do not depend on anything; two tokens to predict."""

    def __init__(self, logits: list[float], token: int) -> None:
        self.row, self.token = torch.tensor(logits), token

    def token_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.row.expand(2, -1), torch.tensor([self.token, self.token])

    def logits(self, states: Tensor) -> Tensor:
        return states


def test_label_smoothing_by_hand() -> None:
    """Four tokens, ε = 0.2: the target is (.05, .85, .05, .05)."""
    equal = Constant([0.0] * 4, token=1)
    assert float(NextToken(0.2)(equal, batch())) == pytest.approx(math.log(4))
    q = [0.05, 0.85, 0.05, 0.05]
    entropy = -sum(p * math.log(p) for p in q)  # the floor: 0.588
    at_target = Constant([math.log(p) for p in q], token=1)
    assert float(NextToken(0.2)(at_target, batch())) == pytest.approx(entropy)
    sure = Constant([0.0, 9.0, 0.0, 0.0], token=1)
    assert float(NextToken(0.2)(sure, batch())) > entropy
    assert float(NextToken(0.0)(sure, batch())) < 0.001
    # perplexity is that of the loss without smoothing
    assert token_scores(at_target, [batch()])["perplexity"] == pytest.approx(1 / 0.85)


def test_the_loss_is_a_mean_over_tokens() -> None:
    model = small(dropout=0.0)
    data = batch()
    logits, wanted = model(data)[:, :-1].flatten(0, 1), data.target[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=0)
    assert torch.allclose(NextToken()(model, data), expected, atol=1e-6)
    assert token_scores(model, [data])["nll"] == pytest.approx(expected.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------- what may see what
def earlier_change(model: Transformer) -> float:
    """How much the logits of the first four tokens change when later ones do."""
    data = batch()
    changed = data.target.clone()
    changed[:, 4:] = changed[:, 4:].flip(1)
    with torch.no_grad():
        return float((model(data) - model(data.replace(target=changed)))[:, :4].abs().max())


@pytest.mark.parametrize("pre_norm", [True, False])
def test_what_comes_later_changes_nothing_before(pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(pre_norm=pre_norm).eval()
    assert earlier_change(model) < 1e-6
    # the same look at a decoder without the causal rule sees the change
    monkeypatch.setattr(
        "funnelrec.encode.text.transformer.causal_bias", lambda length, device: torch.zeros(length, length)
    )
    assert earlier_change(model) > 1e-3


@pytest.mark.parametrize("pre_norm", [True, False])
def test_padding_changes_nothing(pre_norm: bool) -> None:
    model, data = small(pre_norm=pre_norm).eval(), batch()
    longer = data.replace(
        source=torch.nn.functional.pad(data.source, (0, 3)), target=torch.nn.functional.pad(data.target, (0, 2))
    )
    with torch.no_grad():
        real = data.target != 0
        assert torch.allclose(model(data)[real], model(longer)[:, :-2][real], atol=1e-5)
        assert torch.allclose(NextToken()(model, data), NextToken()(model, longer), atol=1e-6)


def test_without_positions_the_order_of_the_source_is_not_seen() -> None:
    model = small().eval()
    source = torch.randint(4, ROWS, (2, 7))
    order = torch.randperm(7)
    with torch.no_grad():
        assert not torch.allclose(model.encode(source)[:, order], model.encode(source[:, order]), atol=1e-3)
        model.get_buffer("positions").zero_()
        assert torch.allclose(model.encode(source)[:, order], model.encode(source[:, order]), atol=1e-5)


def test_tied_weights() -> None:
    three, two, none = small(), small(tie="target", source_tokens=20), small(tie="none")
    assert three.source_table.weight is three.target_table.weight is three.output.weight
    assert two.target_table.weight is two.output.weight
    assert two.source_table.weight.shape == (20, 64)
    counts = [sum(p.numel() for p in model.parameters()) for model in (three, two, none)]
    assert [after - before for before, after in pairwise(counts)] == [20 * 64, (14 + 14 - 20) * 64]
    with pytest.raises(ValueError, match="one vocabulary for both languages, received 20 and 14"):
        small(source_tokens=20)
    with pytest.raises(ValueError, match="received 'both'"):
        small(tie="both")
    with pytest.raises(ValueError, match="a text of 90 tokens exceeds max_len=80"):
        small().encode(torch.ones(1, 90, dtype=torch.int64))


def test_the_size_of_the_published_base_model() -> None:
    with torch.device("meta"):
        model = Transformer(source_tokens=37_000, target_tokens=37_000)
    # 37,000 · 512 + 6 · (4 · (512² + 512) + 2 · 512 · 2048 + 2560 + 2 · 1024) + 6 · (8 · …): 63.1 M, as published
    assert sum(p.numel() for p in model.parameters()) == 63_082_496


# ------------------------------------------------------------------------------------------------------------ writing
class Uncached:
    """The same model, computed anew from the first token on at each step."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    class Past:
        def __init__(self, source: Tensor, text: Tensor) -> None:
            self.source, self.text = source, text

        def select(self, rows: Tensor) -> Uncached.Past:
            return Uncached.Past(self.source[rows], self.text[rows])

    def start(self, source: Tensor) -> Uncached.Past:
        return self.Past(source, source[:, :0])

    def step(self, written: Tensor, past: Uncached.Past) -> tuple[Tensor, Uncached.Past]:
        text = torch.cat([past.text, written.unsqueeze(1)], dim=1)
        logits = self.model(Batch(source=past.source, target=text))[:, -1]
        return logits, self.Past(past.source, text)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_writing_with_a_memory_is_writing_without(pre_norm: bool) -> None:
    model = small(pre_norm=pre_norm).eval()
    source = batch(20).source
    for write in (
        lambda m: greedy(m, source, most=15),
        lambda m: beam_search(m, source, width=4, alpha=0.6, most=15),
    ):
        (rows, score), (again, score_again) = write(model), write(Uncached(model))
        assert torch.equal(rows, again)
        assert torch.allclose(score, score_again, atol=1e-4)


def test_the_copy_task(copier: Transformer) -> None:
    sources = Copies(300, seed=9).rows
    for rows, _ in (greedy(copier, sources), beam_search(copier, sources, width=4)):
        longest = sources.shape[1]
        assert rows.shape[1] <= longest
        assert torch.equal(torch.nn.functional.pad(rows, (0, longest - rows.shape[1])), sources)
    rows, _ = greedy(small().eval(), sources[:20])  # the check can fail: an untrained model does not copy
    assert rows.shape[1] > longest or not torch.equal(rows, sources[:20, : rows.shape[1]])


def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse(copier: Transformer) -> None:
    model, source = small(pre_norm=True).eval(), batch(40).source
    for one in (model, copier):
        rows, total = greedy(one, source)
        beam_rows, beam_total = beam_search(one, source, width=1, alpha=0.0)
        ended = (rows != 0).sum(1) < source.shape[1] + 50
        assert torch.allclose(total[ended], beam_total[ended], atol=1e-4)
        width = max(rows.shape[1], beam_rows.shape[1])
        rows, beam_rows = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (rows, beam_rows))
        assert torch.equal(rows[ended], beam_rows[ended])
    _, total = greedy(copier, source)
    _, wide = beam_search(copier, source, width=4, alpha=0.0)
    assert bool((wide >= total - 1e-4).all())


class Table:
    """Log-probabilities of the next token by the one before; texts of up to three tokens can be counted by hand."""

    def __init__(self, next_token: dict[int, dict[int, float]]) -> None:
        self.next_token = next_token

    class Past:
        def select(self, rows: Tensor) -> Table.Past:
            return self

    def start(self, source: Tensor) -> Table.Past:
        return self.Past()

    def step(self, written: Tensor, past: Table.Past) -> tuple[Tensor, Table.Past]:
        logits = torch.full((len(written), 8), -1e9)
        for row, token in enumerate(written.tolist()):
            for then, share in self.next_token.get(token, {END: 1.0}).items():
                logits[row, then] = math.log(share)
        return logits, past


def test_the_beam_by_hand() -> None:
    """Greedy takes 4 (.6), which leads to .6 · .5 · .9 = .27; the beam finds 5, .4 · 1 · 1 = .4."""
    table = Table({BEGIN: {4: 0.6, 5: 0.4}, 4: {6: 0.5, 7: 0.5}, 5: {6: 1.0}, 6: {END: 1.0}, 7: {END: 1.0}})
    source = torch.full((3, 1), 4)
    rows, total = greedy(table, source)
    assert rows.tolist() == [[4, 6]] * 3
    assert total.tolist() == pytest.approx([math.log(0.3)] * 3)
    rows, total = beam_search(table, source, width=2, alpha=0.0)
    assert rows.tolist() == [[5, 6]] * 3
    assert total.tolist() == pytest.approx([math.log(0.4)] * 3)
    _, scored = beam_search(table, source, width=2, alpha=1.0)  # three tokens, the end counted: (5 + 3) / 6
    assert scored.tolist() == pytest.approx([math.log(0.4) / (8 / 6)] * 3)


def test_the_length_penalty_prefers_the_longer_text() -> None:
    """The end at once has .5; 4 4 end has .5 · .8 · 1, less, but more a token."""
    table = Table({BEGIN: {END: 0.5, 4: 0.5}, 4: {5: 0.8, END: 0.2}, 5: {END: 1.0}})
    source = torch.full((1, 1), 4)
    short, _ = beam_search(table, source, width=3, alpha=0.0)
    long, _ = beam_search(table, source, width=3, alpha=2.0)
    assert (short.tolist(), long.tolist()) == ([[0]], [[4, 5]])
    with pytest.raises(ValueError, match=r"received 0 and 0\.6"):
        beam_search(table, source, width=0)


def test_a_text_without_an_end_is_cut() -> None:
    table, source = Table({BEGIN: {4: 1.0}, 4: {4: 1.0}}), torch.full((2, 1), 4)
    for rows, score in (greedy(table, source, most=5), beam_search(table, source, width=2, most=5)):
        assert rows.tolist() == [[4] * 5] * 2
        assert score.tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ training
class Stop(Exception):
    """The run is left here."""


class Stopping(NextToken):
    """Leaves the run before a step."""

    def __init__(self, step: int) -> None:
        super().__init__(0.1)
        object.__setattr__(self, "left", [step])

    def __repr__(self) -> str:
        return repr(NextToken(0.1))

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        self.left[0] -= 1  # type: ignore[attr-defined]
        if self.left[0] < 0:  # type: ignore[attr-defined]
            raise Stop
        return super().__call__(model, batch)


@pytest.mark.parametrize("fault", [False, True])
def test_resumed_in_mid_epoch_to_the_bit(tmp_path: Path, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(Copies(200), 20, shuffle=True)  # 10 steps an epoch

    def run(model: Transformer, folder: Path | None, loss: NextToken) -> dict[str, Tensor]:
        kept = KeepWeights(model, tmp_path / f"epochs-{folder is None}", keep=2)
        epochs = iter(range(3) if folder is None or loss.__class__ is Stopping else range(1, 3))

        def validate() -> dict[str, float]:
            kept(next(epochs))
            return {}

        fit(
            model, batches, loss, epochs=3, lr=1.0, schedule=Noam(64, 10), folder=folder, checkpoint_every=7,
            validate=validate, progress=False,
        )  # fmt: skip
        kept.load_average()
        return model.state_dict()

    whole = run(small(), None, NextToken(0.1))
    with pytest.raises(Stop):
        run(small(), tmp_path / "run", Stopping(17))  # the newest checkpoint is that of step 14, in mid-epoch
    if fault:  # the control: random numbers that are not put back
        monkeypatch.setattr("funnelrec.learn.checkpoint._set_rng", lambda states, model: None)
    resumed = run(small(), tmp_path / "run", NextToken(0.1))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) is not fault


def test_the_mean_of_checkpoints(tmp_path: Path) -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(5)},
    ]
    mean = average_weights(states)
    assert mean["w"].tolist() == [2.0, 4.0]
    assert int(mean["n"]) == 5
    same = average_weights([states[0]] * 3)
    assert torch.equal(same["w"], states[0]["w"])
    with pytest.raises(ValueError, match="no checkpoint"):
        average_weights([])
    with pytest.raises(ValueError, match="different shapes"):
        average_weights([states[0], {"w": torch.zeros(3)}])
    with pytest.raises(ValueError, match="keep must be at least 1"):
        KeepWeights(small(), tmp_path, keep=0)
    model = small()
    kept = KeepWeights(model, tmp_path, keep=2)
    for epoch, value in enumerate((1.0, 2.0, 4.0)):
        torch.nn.init.constant_(model.encoder[0].feed_forward.inner.weight, value)
        kept(epoch)
    assert [path.name for path in kept.files()] == ["epoch-000001.safetensors", "epoch-000002.safetensors"]
    kept.load_average()
    assert model.encoder[0].feed_forward.inner.weight.unique().tolist() == [3.0]
