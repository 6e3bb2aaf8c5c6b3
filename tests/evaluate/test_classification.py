"""A classifier's verdict: areas, rates, thresholds, temperatures; and the pictures that go with it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from funnelrec.evaluate import plots
from funnelrec.evaluate.classification import choose_threshold, proportion, softmax, softmax_temperature, verdict
from funnelrec.evaluate.gradcam import grad_cam
from funnelrec.evaluate.pictures import confusion_matrix, confusion_picture, overlay, tiles


def test_wilson_by_hand() -> None:
    interval = proportion(8, 10)
    assert (interval.mean, round(interval.low, 4), round(interval.high, 4)) == (0.8, 0.4902, 0.9433)
    assert proportion(10, 10).high == 1.0
    assert proportion(10, 10).low < 0.75
    assert math.isnan(proportion(0, 0).mean)


def test_two_classes_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    positive = np.array([0.1, 0.6, 0.2, 0.55, 0.9])
    found = verdict(labels, np.stack([1 - positive, positive], 1))
    assert found.predicted.tolist() == [0, 1, 0, 1, 1]
    assert found.auc.mean == pytest.approx(5 / 6)
    assert found.sensitivity is not None
    assert found.specificity is not None
    assert (found.sensitivity.mean, found.specificity.mean) == (1.0, pytest.approx(2 / 3))
    assert found.balanced == pytest.approx(5 / 6)
    assert found.brier == pytest.approx(np.mean([0.01, 0.36, 0.04, 0.45**2, 0.01]))
    assert found.log_loss == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.55, 0.9]).mean())
    assert verdict(labels, np.stack([1 - positive, positive], 1), 0.57).predicted.tolist() == [0, 1, 0, 0, 1]
    assert set(found.numbers()) >= {"auc", "auc_low", "sensitivity_high", "ece", "balanced_accuracy"}


def test_more_classes() -> None:
    labels = np.array([0, 1, 2, 2])
    probability = np.eye(3)[[0, 1, 2, 0]] * 0.7 + 0.1
    found = verdict(labels, probability)
    assert found.sensitivity is None
    assert found.accuracy.mean == 0.75
    assert found.balanced == pytest.approx(2.5 / 3)
    assert found.auc.mean == pytest.approx(np.mean([5 / 6, 1.0, 0.75]))
    assert math.isnan(found.auc.low)
    assert "auc" in found.numbers()


def test_a_perfect_calibrator_has_no_error_and_a_sure_one_has() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (5000, 1)) * np.array([[0.0, 1.0]])
    p = softmax(logits)[:, 1]
    labels = (generator.random(5000) < p).astype(np.int64)
    assert verdict(labels, softmax(logits)).ece < 0.02
    sure = verdict(labels, softmax(logits * 4)).ece
    assert sure > 0.08
    temperature = softmax_temperature(labels, logits * 4)
    assert temperature == pytest.approx(4.0, rel=0.1)
    assert verdict(labels, softmax(logits * 4, temperature)).ece < 0.02
    three = generator.normal(0, 2, (5000, 3))
    chosen = (softmax(three).cumsum(1) > generator.random((5000, 1))).argmax(1)
    assert softmax_temperature(chosen, three / 3) == pytest.approx(1 / 3, rel=0.1)


def test_the_threshold_parts_the_classes_best() -> None:
    labels = np.array([0, 0, 0, 1, 0, 1, 1])
    p = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9])
    assert choose_threshold(labels, p) == pytest.approx(0.35)  # 3 of 3 found, 1 of 4 wrongly: better than 2 and 0
    assert choose_threshold(np.array([0, 1, 0, 1]), np.full(4, 0.5)) == 0.5
    with pytest.raises(ValueError, match="rows of both classes"):
        choose_threshold(np.ones(3, dtype=np.int64), p[:3])


class Looker(nn.Module):
    """Class 1 is the mean of channel 0, class 0 that of channel 1."""

    def maps(self, content: Tensor) -> Tensor:
        return content

    def pool(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))

    def head(self, vector: Tensor) -> Tensor:
        return vector[:, [1, 0]]


def test_grad_cam_points_at_what_speaks_for_the_class() -> None:
    content = torch.zeros(2, 2, 6, 6)
    content[:, 0, 1, 2] = 3.0
    content[:, 1, 4, 4] = 5.0
    heat = grad_cam(Looker(), content, torch.tensor([1, 0]))
    assert [int(h.argmax()) for h in heat] == [1 * 6 + 2, 4 * 6 + 4]
    assert heat.amax((1, 2)).tolist() == [1.0, 1.0]
    assert float(heat[0, 4, 4]) == 0.0
    assert not grad_cam(Looker(), -content, torch.tensor([1, 0])).any()  # nothing speaks for it


def test_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    small = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
    warm = overlay(np.zeros((2, 3, 4, 4), dtype=np.uint8), np.linspace(0, 1, 32).reshape(2, 4, 4))
    assert warm.shape == (2, 4, 4, 3)
    assert warm[1, 3, 3].sum() > warm[0, 0, 0].sum()
    found = []
    for name in ("a", "b"):
        figure = tiles("Title", "subtitle", [("grey", small), ("colour", warm)], ["1", "2"])
        found.append(plots.save(figure, tmp_path, f"tiles_{name}")[0].read_bytes())
        plots.save(confusion_picture("Title", "subtitle", matrix, ["x", "yy", "zzz"]), tmp_path, f"matrix_{name}")
    assert found[0] == found[1]
    assert (tmp_path / "matrix_a.png").read_bytes() == (tmp_path / "matrix_b.png").read_bytes()
