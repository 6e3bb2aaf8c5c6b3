from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.text.decoding import BEGIN, END, beam_search, greedy
from funnelrec.encode.text.transformer import Transformer
from funnelrec.learn.fit import fit
from funnelrec.learn.schedules import Noam
from funnelrec.learn.text import KeepWeights, NextToken, token_scores

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

    def copied(model: Transformer, write: Callable[..., tuple[Tensor, Tensor]]) -> float:
        """The share of sentences written without one mistake."""
        rows, _ = write(model, sources)
        more = rows.shape[1] - sources.shape[1]
        rows, wanted = (torch.nn.functional.pad(x, (0, max(0, n))) for x, n in ((rows, -more), (sources, more)))
        return (rows == wanted).all(1).float().mean().item()

    for write in (greedy, partial(beam_search, width=4)):
        assert copied(copier, write) > 0.97
        assert copied(small().eval(), write) < 0.1  # an untrained model does not copy


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
