"""The language model: fused layers against cells by hand, a state that goes on, and what it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from funnelrec.data.batches import Batches
from funnelrec.encode.text.language_model import Carried, LanguageModel, StreamExamples
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy, SampledSoftmax
from funnelrec.learn.samplers import Popularity

CELLS = ("rnn", "lstm", "gru")


def built(cell: str = "lstm", tokens: int = 12, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    options = {"embedding_dim": 8, "hidden_dim": 8, "dropout": 0.0, **changes}
    return LanguageModel(num_tokens=tokens, cell=cell, **options).eval()  # type: ignore[arg-type]


def text(*shape: int, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(2, tokens, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: LanguageModel, content: Tensor) -> Tensor:
    """Eq. (1)-(3), one token after the other."""
    outputs = []
    states = [torch.zeros(2, len(content), model.hidden_dim) for _ in model.layers]
    for t in range(content.shape[1]):
        x = model.table.weight[content[:, t]]
        for number, layer in enumerate(model.layers):
            h, c = states[number]
            inward = x @ layer.weight_ih_l0.T + layer.bias_ih_l0
            across = h @ layer.weight_hh_l0.T + layer.bias_hh_l0
            if isinstance(layer, torch.nn.LSTM):
                i, f, g, o = (inward + across).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif isinstance(layer, torch.nn.GRU):
                r, z, _ = (inward + across).sigmoid().chunk(3, 1)
                n = (inward.chunk(3, 1)[2] + r * across.chunk(3, 1)[2]).tanh()
                h = (1 - z) * n + z * h
            else:
                h = (inward + across).tanh()
            states[number] = torch.stack([h, c])
            x = h
        outputs.append(x @ model.out.weight.T + model.out.bias)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("cell", CELLS)
def test_the_fused_layers_are_the_equations(cell: str) -> None:
    model, content = built(cell), text(3, 7)
    torch.testing.assert_close(model(content)[0], by_hand(model, content), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_windows_with_the_state_carried_are_one_long_text(cell: str) -> None:
    model, content = built(cell), text(2, 9)
    whole, end = model(content)
    first, state = model(content[:, :4])
    second, state = model(content[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, end)
    forgotten, _ = model(content[:, 4:])
    assert not torch.allclose(forgotten, second), "the state matters"


def test_a_stream_goes_down_its_columns() -> None:
    stream = StreamExamples(torch.arange(20), columns=2, window=4)
    first, second = Batches(stream, 2).epoch(0)
    assert first.text.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert second.text.tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert second.label.tolist() == [[5, 6, 7, 8], [13, 14, 15, 16]]
    assert first.fresh.all() and not second.fresh.any()
    with pytest.raises(ValueError, match="8 tokens do not fill 2 columns of one window of 4"):
        StreamExamples(torch.arange(8), columns=2, window=4)


def test_training_carries_the_state_and_no_gradient() -> None:
    model = built()
    carried, stream = Carried(model, 2), StreamExamples(text(42), columns=2, window=5)
    batches = list(Batches(stream, 2).epoch(0))
    logits = [carried(batch) for batch in batches]
    columns = text(42)[:40].view(2, 20)
    torch.testing.assert_close(torch.cat(logits, 1), model(columns)[0])
    model.zero_grad()
    logits[1].sum().backward()
    alone = {n: p.grad.clone() for n, p in model.named_parameters()}
    state = model(columns[:, :5])[1].detach()
    model.zero_grad()
    model(columns[:, 5:10], state)[0].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[name])
    assert torch.equal(carried(batches[0]), logits[0]), "a new epoch begins anew"


@pytest.mark.parametrize("columns", [1, 3])
def test_perplexity_by_hand(columns: int) -> None:
    model, rows = built().train(), text(32)
    nats = []
    length = math.ceil(31 / columns)
    for start in range(0, 31, length):
        part = rows[start : start + length + 1]
        log_p = by_hand(model, part[None, :-1])[0].log_softmax(1)
        nats += (-log_p)[torch.arange(len(part) - 1), part[1:]].tolist()
    assert model.perplexity(rows, columns=columns, window=4) == pytest.approx(math.exp(sum(nats) / 31), rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="needs more than 3 tokens, received 3"):
        model.perplexity(rows[:3], columns=3)


def test_an_untrained_model_knows_nothing_and_a_uniform_one_exactly_so() -> None:
    model, rows = built(tokens=50), text(400, tokens=50)
    assert math.log(model.perplexity(rows)) == pytest.approx(math.log(50), rel=0.03)
    with torch.no_grad():
        model.out.weight.zero_()
    assert model.perplexity(rows) == pytest.approx(50, rel=1e-5)


def test_tied_weights_are_one_table_with_both_gradients() -> None:
    model = built()
    assert model.out.weight is model.table.weight
    model(torch.full((1, 1), 3))[0][..., 5].sum().backward()
    grad = model.table.weight.grad
    assert grad is not None
    assert grad[3].any() and grad[5].any() and not grad[4].any()
    assert built(tied=False).out.weight is not built(tied=False).table.weight
    assert built(hidden_dim=16)(text(2, 3))[0].shape == (2, 3, 12), "another width goes through a projection"


def test_dropout_is_locked_over_time_and_differs_between_texts() -> None:
    model = built(dropout=0.5).train()
    dropped = model._locked(torch.ones(6, 4, 8))
    assert torch.equal(dropped[0], dropped[5])
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    words = built(token_dropout=0.5).train()
    seen = words._look_up(text(40, 9))
    gone = (seen == 0).all(-1)
    assert all(len(set(gone[text(40, 9) == token].tolist())) == 1 for token in range(2, 12)), "a token goes everywhere"


def test_padding_on_the_right_is_not_read() -> None:
    model, content = built(), text(2, 5)
    longer = torch.cat([content, torch.zeros(2, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(model.encode(longer), model.encode(content))
    assert model.encode(longer).shape == (2, model.num_features)


def alternating() -> Tensor:
    """A, b, b, A, b, b …: what comes next needs two tokens of memory."""
    return torch.tensor([2, 3, 3] * 120)


@pytest.mark.parametrize("cell", CELLS)
def test_a_rule_that_needs_memory_is_learnt(cell: str) -> None:
    model = built(cell, tokens=4, num_layers=1)
    stream = StreamExamples(alternating(), columns=4, window=10)
    fit(Carried(model, 4), Batches(stream, 4), CrossEntropy(), epochs=40, lr=0.02, clip_norm=1.0, progress=False)
    assert model.perplexity(alternating()) < 1.1
    written = model.sample(torch.tensor([[2, 3]]), 6, torch.Generator().manual_seed(0))
    assert written.tolist() == [[3, 2, 3, 3, 2, 3]]


def test_a_sample_of_the_tokens_is_enough_to_learn_from() -> None:
    g = torch.Generator().manual_seed(1)
    following = torch.randint(2, 40, (40,), generator=g)
    rows = [2]
    for coin in torch.rand(3000, generator=g).tolist():
        rows.append(int(following[rows[-1]]) if coin < 0.9 else 2 + int(38 * coin) % 38)
    stream = torch.tensor(rows)
    model = built(tokens=40, num_layers=1, embedding_dim=16, hidden_dim=16)
    loss = SampledSoftmax(10, sampler=Popularity(torch.bincount(stream, minlength=40)))
    before = model.perplexity(stream)
    fit(Carried(model, 8), Batches(StreamExamples(stream, 8, 20), 8), loss, epochs=12, lr=0.02, progress=False)
    assert model.perplexity(stream) < 0.25 * before


def test_resuming_a_run_gives_the_same_model(tmp_path: Path) -> None:
    def trained(folder: Path | None, *epochs: int) -> Tensor:
        for number in epochs:
            torch.manual_seed(0)
            model = LanguageModel(num_tokens=12, embedding_dim=8, hidden_dim=8, dropout=0.2)
            batches = Batches(StreamExamples(text(200), 4, 6), 4)
            fit(Carried(model, 4), batches, CrossEntropy(), epochs=number, folder=folder, progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(tmp_path, 1, 2), trained(None, 2))
    assert not torch.equal(trained(None, 1), trained(None, 2))


def test_sampling_is_seeded_and_may_be_narrow() -> None:
    model = built()
    begin = text(3, 4)
    one, two = (model.sample(begin, 8, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (3, 8) and int(one.min()) >= 2
    greedy = model.sample(begin, 8, torch.Generator().manual_seed(6), top=1)
    assert torch.equal(greedy, model.sample(begin, 8, torch.Generator().manual_seed(7), temperature=1e-6))
    with pytest.raises(ValueError, match="temperature must be positive, received 0"):
        model.sample(begin, 1, temperature=0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="cell must be one of rnn, lstm, gru, received 'elman'"):
        built("elman")
    with pytest.raises(ValueError, match="num_layers must be at least 1, received 0"):
        built(num_layers=0)
    assert built().config["num_tokens"] == 12
