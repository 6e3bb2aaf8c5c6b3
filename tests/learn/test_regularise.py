"""Row penalties: which rows they touch, by how much, and that their zeros are exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import Table
from funnelrec.data.batches import Batches
from funnelrec.learn.optim import make_optimizers
from funnelrec.learn.regularise import Proximal, RowL2


def table(rows: int = 6, dim: int = 2) -> Table:
    made = Table(rows, dim)
    with torch.no_grad():
        made.weight[1:] = torch.arange(1.0, rows).view(-1, 1)
    return made


def test_l2_by_hand() -> None:
    """Row 3 is looked up twice and row 5 once, each with gradient 1 a use: 2 + .1 · 3 and 1 + .1 · 5."""
    made = table()
    made(torch.tensor([3, 5, 3])).sum().backward()
    RowL2(0.1).add_to(made.weight)
    gradient = made.weight.grad.to_dense()
    assert gradient[:, 0].tolist() == pytest.approx([0, 0, 0, 2.3, 0, 1.5])


def test_mini_batch_aware_divides_by_the_count() -> None:
    """λ / n_j of DIN's Eq. (6): n = 3 and 10 for the rows 3 and 5."""
    made = table()
    made(torch.tensor([3, 5, 3])).sum().backward()
    RowL2(0.1, torch.tensor([9, 9, 9, 3, 9, 10])).add_to(made.weight)
    gradient = made.weight.grad.to_dense()
    assert gradient[:, 0].tolist() == pytest.approx([0, 0, 0, 2 + 0.1 / 3 * 3, 0, 1 + 0.1 / 10 * 5])


class _Examples:
    """Three examples; the second has an empty history."""

    ids = torch.tensor([[1, 3], [1, 0], [1, 4]])
    history_ids = torch.tensor([[[3], [0]], [[0], [0]], [[4], [3]]])

    def __len__(self) -> int:
        return 3

    def gather(self, index: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
        return Batch(ids=self.ids[index], history_ids=self.history_ids[index])


def test_counts_are_those_of_an_epoch() -> None:
    held = RowL2.mini_batch_aware(0.1, Batches(_Examples(), 2), rows=6)
    assert held.counts is not None
    assert held.counts.tolist() == [4, 3, 0, 3, 2, 0]


def test_over_an_epoch_it_is_the_l2_of_the_whole_table() -> None:
    """Σ over batches of Σ_r ‖row r‖² / (2 n_r), where each value is in n_r batches, is ‖table‖² / 2: DIN's Eq. (5)."""
    batches = [torch.tensor([1, 2, 3]), torch.tensor([2, 3, 5]), torch.tensor([3, 4])]
    held = RowL2(1.0, torch.cat(batches).bincount(minlength=6))
    total = torch.zeros(6, 2)
    for ids in batches:
        made = table()
        (made(ids) * 0).sum().backward()
        held.add_to(made.weight)
        total += made.weight.grad.to_dense()
    torch.testing.assert_close(total, table().weight.detach())


def test_dense_parameters_shrink_at_their_own_rate() -> None:
    """Tables at .5, the rest at .1: with l1 = 1 they lose .5 and .1 where nothing else moves them."""
    model = nn.ModuleDict({"made": table(), "line": nn.Linear(1, 1)})
    nn.init.constant_(model["line"].weight, 2.0)
    optimizers = make_optimizers(model, lr=0.1, table_lr=0.5, proximal={"made": {"l1": 1.0}, "line": {"l1": 1.0}})
    (model["made"](torch.tensor([3])).sum() * 0 + model["line"](torch.zeros(1)).sum() * 0).backward()
    optimizers.step()
    assert model["made"].weight[3].tolist() == [2.5, 2.5]
    assert model["line"].weight.item() == pytest.approx(1.9)


def test_padding_and_rows_outside_the_batch_stay() -> None:
    made = table()
    optimizers = make_optimizers(made, lr=0.1, table_l2=0.5)
    before = made.weight.detach().clone()
    (made(torch.tensor([0, 3])) * 0).sum().backward()
    optimizers.step()
    assert (made.weight != before).any(1).nonzero().flatten().tolist() == [3]
    assert made.weight[3, 0] < 3


def test_a_dense_gradient_is_pulled_as_a_whole() -> None:
    made = nn.Parameter(torch.tensor([[1.0], [2.0]]))
    made.grad = torch.zeros(2, 1)
    RowL2(0.5).add_to(made)
    assert made.grad.flatten().tolist() == [0.5, 1.0]
    RowL2(0.5).add_to(nn.Parameter(torch.ones(2, 1)))  # no gradient, nothing to do


def test_options_of_a_run_tell_counts_apart() -> None:
    one, same, other = (RowL2(0.1, torch.tensor(c)) for c in ([1, 2], [1, 2], [2, 1]))
    assert repr(one) == repr(same) != repr(other)
    assert repr(RowL2(0.1)) == "RowL2(0.1)"


def test_soft_thresholds_by_hand() -> None:
    """η = .1, l1 = 5: (1, −.3) becomes (.5, 0); then l21 = 2 takes .2 from a length of .5."""
    weight = nn.Parameter(torch.tensor([[1.0, -0.3], [1.0, -0.3]]))
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.zeros(1, 2), (2, 2), check_invariants=False)
    Proximal([weight], lr=0.1, l1=5.0).step()
    assert weight.flatten().tolist() == pytest.approx([1.0, -0.3, 0.5, 0.0])
    Proximal([weight], lr=0.1, l21=2.0).step()
    assert weight.flatten().tolist() == pytest.approx([1.0, -0.3, 0.3, 0.0])


def test_a_row_vanishes_as_a_whole() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
    weight.grad = torch.zeros(3, 2)
    Proximal([weight], lr=1.0, l21=0.6).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0 * 0.88, 4.0 * 0.88], [0.0, 0.0], [0.0, 0.0]]))
    assert (weight[1] == 0).all()


def test_a_huge_penalty_leaves_nothing() -> None:
    made = table()
    made(torch.arange(6)).sum().backward()
    optimizers = make_optimizers(made, lr=0.1, proximal={"weight": {"l1": 1e4, "l21": 1e4}})
    optimizers.step()
    assert not made.weight.any()


def test_the_threshold_follows_the_schedule() -> None:
    made = table()
    optimizers = make_optimizers(made, lr=0.1, proximal={"weight": {"l1": 1.0}})
    optimizers.set_lr_factor(0.0)
    before = made.weight.detach().clone()
    made(torch.arange(6)).sum().backward()
    optimizers.step()
    assert torch.equal(made.weight, before)


def test_refuses() -> None:
    weight = nn.Parameter(torch.ones(3, 1))
    weight.grad = torch.ones(3, 1)
    with pytest.raises(ValueError, match="counts of 2 rows do not belong to a table of 3"):
        RowL2(0.1, torch.tensor([1, 2])).add_to(weight)
    with pytest.raises(ValueError, match=r"strength must be positive, received -1"):
        RowL2(-1)
    with pytest.raises(ValueError, match=r"one of them positive, received 0\.0 and 0\.0"):
        Proximal([weight], lr=0.1)
