from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.learn.text import KeepWeights, NextToken, average_weights, token_scores

NOTHING = Batch()


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
    assert float(NextToken(0.2)(equal, NOTHING)) == pytest.approx(math.log(4))
    q = [0.05, 0.85, 0.05, 0.05]
    entropy = -sum(p * math.log(p) for p in q)  # the floor: 0.588
    at_target = Constant([math.log(p) for p in q], token=1)
    assert float(NextToken(0.2)(at_target, NOTHING)) == pytest.approx(entropy)
    sure = Constant([0.0, 9.0, 0.0, 0.0], token=1)
    assert float(NextToken(0.2)(sure, NOTHING)) > entropy
    assert float(NextToken(0.0)(sure, NOTHING)) < 0.001
    # perplexity is that of the loss without smoothing
    assert token_scores(at_target, [NOTHING])["perplexity"] == pytest.approx(1 / 0.85)


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
        KeepWeights(nn.Linear(2, 2), tmp_path, keep=0)
    model = nn.Linear(2, 2)
    kept = KeepWeights(model, tmp_path, keep=2)
    for epoch, value in enumerate((1.0, 2.0, 4.0)):
        torch.nn.init.constant_(model.weight, value)
        kept(epoch)
    assert [path.name for path in kept.files()] == ["epoch-000001.safetensors", "epoch-000002.safetensors"]
    kept.load_average()
    assert model.weight.unique().tolist() == [3.0]
