"""Training on lanes: states that are carried and reset, and the authors' losses against their plain formulas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.data.batches import Batches
from funnelrec.data.histories import Histories
from funnelrec.data.lanes import SessionParallel
from funnelrec.learn.fit import TrainingInterrupted, fit
from funnelrec.learn.lanes import Lanes, SharedBPRMax, SharedSoftmax, _bpr_max
from funnelrec.match.gru4rec import GRU4Rec

ITEMS = 30
COUNTS = torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(1, ITEMS - 1)])


def model(**options: object) -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GRU4Rec(Spec(num_users=2, num_items=ITEMS), **{"embedding_dim": 8, "item_bias": True, **options})
        with torch.no_grad():
            made.items.weight.mul_(30)
            made.bias.weight.normal_()
    return made.eval()


def steps(sessions: list[list[int]], lanes: int) -> SessionParallel:
    user = np.repeat(np.arange(len(sessions)), [len(s) for s in sessions])
    items = np.concatenate([np.array(s) for s in sessions])
    histories = Histories.build(user, items, np.arange(len(items)), len(sessions))
    return SessionParallel(SimpleNamespace(train_histories=histories), lanes)  # type: ignore[arg-type]


def random_sessions(number: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(2, ITEMS, draw.integers(2, 9)).tolist() for _ in range(number)]


def one_step(size: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(2, ITEMS, (2, size), generator=generator)
    return Batch(
        history=rows[0].unsqueeze(1), mask=torch.ones(size, 1, dtype=torch.bool), target=rows[1],
        lane=torch.arange(size), fresh=torch.zeros(size, dtype=torch.bool),
    )  # fmt: skip


def vectors_on_lanes(made: GRU4Rec, sessions: list[list[int]], *, reset: bool = True) -> dict[tuple[int, ...], Tensor]:
    """The vector after each prefix of each session."""
    lanes, seen, found = Lanes(made, 3), {}, {}
    for batch in Batches(steps(sessions, 3), 1).epoch(0):
        forget = batch if reset else batch.replace(fresh=torch.zeros_like(batch.fresh))
        users = lanes.encode_users(forget)[0][:, 0]
        for lane, item, fresh, user in zip(
            batch.lane.tolist(), batch.history[:, 0].tolist(), batch.fresh, users, strict=True
        ):
            seen[lane] = (*(() if fresh else seen[lane]), item)
            found[seen[lane]] = user
    return found


@torch.no_grad()
def test_a_session_on_a_lane_is_the_session_alone() -> None:
    """... whatever ran in the lane before; a planted fault, states that are never reset, is caught."""
    made, sessions = model(num_layers=2), random_sessions(20)
    found, spoilt = vectors_on_lanes(made, sessions), vectors_on_lanes(made, sessions, reset=False)
    wrong = 0
    for prefix, vector in found.items():
        rows = torch.tensor([prefix])
        alone = made.encode_users(Batch(history=rows, mask=rows > 0))[0][0, 0]
        torch.testing.assert_close(vector, alone)
        wrong += not torch.allclose(spoilt[prefix], alone, atol=1e-3)
    assert wrong > len(found) / 2


def test_the_dropped_out_state_is_the_one_that_is_carried() -> None:
    made = model(dropout=0.5).train()
    lanes = Lanes(made, 5)
    users = lanes.encode_users(one_step())[0][:, 0, :8]
    assert torch.equal(lanes.states[0], users.detach()) and bool((users == 0).any())
    assert not lanes.states.requires_grad


def all_columns(loss: SharedSoftmax | SharedBPRMax, lanes: Lanes, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores [b, b + n] as in the paper, every duplicate a column of its own, and the item rows of the columns."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        rows = torch.cat([batch.target, loss.sampler.sample(loss.num_negatives)[0]])
    return lanes.encode_users(batch)[0][:, 0] @ lanes.encode_items(rows).T, rows


def slow_softmax(loss: SharedSoftmax, scores: Tensor, rows: Tensor) -> Tensor:
    size = len(scores)
    popular = COUNTS[rows].float()
    scores = scores - loss.log_q * torch.cat([popular[:size], popular[size:] ** loss.alpha]).log()
    return F.cross_entropy(scores, torch.arange(size))


def slow_bpr_max(loss: SharedBPRMax, scores: Tensor, rows: Tensor) -> Tensor:
    scores = scores if loss.elu is None else F.elu(scores, loss.elu)
    others = ~torch.eye(*scores.shape, dtype=torch.bool)
    share = scores.masked_fill(~others, -torch.inf).softmax(1)
    wins = torch.sigmoid(scores.diagonal().unsqueeze(1) - scores)
    return (loss.penalty * (share * scores**2).sum(1) - (share * wins).sum(1).log()).mean()


@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (SharedSoftmax(40, COUNTS, 0.3, log_q=1.0), slow_softmax),
        (SharedSoftmax(0, COUNTS), slow_softmax),
        (SharedBPRMax(40, COUNTS, 0.3, penalty=0.9, elu=0.7), slow_bpr_max),
        (SharedBPRMax(9, COUNTS, penalty=2.0), slow_bpr_max),
    ],
)
def test_losses_are_those_of_the_paper(loss: SharedSoftmax | SharedBPRMax, slow: object) -> None:
    made, batch = model(), one_step()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        value = loss(Lanes(made, 5), batch)
    value.backward()
    mine = {name: p.grad.to_dense().clone() for name, p in made.named_parameters()}
    made.zero_grad()
    expected = slow(loss, *all_columns(loss, Lanes(made, 5), batch))  # type: ignore[operator]
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad.to_dense(), msg=name)


@pytest.mark.parametrize("elu", [None, 1.0, 0.5])
@pytest.mark.parametrize("scale", [1, 60])
def test_bpr_max_has_the_gradient_of_autograd(elu: float | None, scale: int) -> None:
    """Also where a pair has lost so clearly that its probability is 0 beside the 1e-24 below the logarithm."""
    torch.manual_seed(0)
    own, penalty = torch.randint(0, 30, (16,)), 0.9
    times = torch.bincount(torch.cat([own, torch.randint(0, 30, (40,))]), minlength=30).clamp(min=1).double()
    scores = (torch.randn(16, 30).double() * scale).requires_grad_()
    x = scores if elu is None else F.elu(scores, elu)
    counted = times.repeat(16, 1).scatter_add(1, own.unsqueeze(1), -torch.ones(16, 1).double())
    share = (x + counted.log()).softmax(1)
    beaten = (share * torch.sigmoid(x.gather(1, own.unsqueeze(1)) - x)).sum(1)
    expected = (penalty * (share * x**2).sum(1) - (beaten + 1e-24).log()).mean()
    expected.backward()
    assert bool((beaten < 1e-24).any()) == (scale == 60)
    value, gradient = _bpr_max(scores.detach().clone(), own, times, penalty, elu)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, scores.grad, atol=1e-12, rtol=1e-9)


def test_open_lanes_count_as_a_share_of_all() -> None:
    batch = one_step()
    alone, among_ten = (SharedSoftmax(0, COUNTS)(Lanes(model(), n), batch) for n in (5, 10))
    torch.testing.assert_close(among_ten, alone / 2)


def test_one_lane_without_negatives_teaches_nothing() -> None:
    assert float(SharedBPRMax(0, COUNTS)(Lanes(model(), 1), one_step(1)).detach()) == 0.0
    with pytest.raises(ValueError, match="num_negatives must be at least 0, received -1"):
        SharedSoftmax(-1, COUNTS)


def test_bfloat16_is_close() -> None:
    losses = []
    for low in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses.append(SharedBPRMax(40, COUNTS)(Lanes(model(), 5), one_step()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.0)
    losses[1].backward()


def test_it_learns_what_follows_what() -> None:
    """Item n is followed by n + 1, but by n - 1 in a session that began with item 2: the state must remember."""
    sessions = [[2, *range(25, 19, -1)] if n % 2 else [3, *range(20, 26)] for n in range(200)]
    for loss in (SharedSoftmax(16, COUNTS, 0.0), SharedBPRMax(16, COUNTS, 0.0, elu=0.5)):
        torch.manual_seed(0)
        made = GRU4Rec(Spec(num_users=2, num_items=ITEMS), embedding_dim=16, dropout=0.0, embedding_dropout=0.0)
        fit(Lanes(made, 10), Batches(steps(sessions, 10), 1), loss, epochs=8, lr=0.2, table="adagrad", momentum=0.2)
        for session in (sessions[0], sessions[1]):
            rows = torch.tensor([session])
            users = made.encode_positions(Batch(history=rows, mask=rows > 0))[0, 1:-1]
            best = (users @ made.encode_items(torch.arange(2, ITEMS)).T).argmax(1) + 2
            assert best.tolist() == session[2:]


def test_an_interrupted_run_goes_on_with_its_states(tmp_path: Path) -> None:
    def weights(folder: Path, stop_at: int | None) -> Tensor:
        made = model()
        calls = []

        class Stopping(SharedSoftmax):
            def __call__(self, trained: object, batch: Batch) -> Tensor:
                calls.append(0)
                if len(calls) == stop_at:
                    raise TrainingInterrupted(143)
                return super().__call__(trained, batch)

        fit(
            Lanes(made, 4), Batches(steps(random_sessions(30), 4), 1), Stopping(8, COUNTS), epochs=2, lr=0.1,
            table="adagrad", folder=folder, checkpoint_every=1, progress=False,
        )  # fmt: skip
        return made.items.weight.detach().clone()

    whole = weights(tmp_path / "whole", None)
    with pytest.raises(TrainingInterrupted):
        weights(tmp_path / "cut", 9)
    assert torch.equal(weights(tmp_path / "cut", None), whole)
