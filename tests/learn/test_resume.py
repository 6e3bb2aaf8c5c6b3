from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from funnelrec.data.batches import Batches
from funnelrec.learn.checkpoint import TENSORS, CheckpointError
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.regularise import RowL2


def test_stopped_after_every_step_the_end_is_the_same_to_the_bit(harness: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(harness.__file__), "every", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"stops": 59, "equal": 59, "steps_done_twice": 0}


def test_the_result_and_the_model_are_the_same_too(harness: ModuleType, tmp_path: Path) -> None:
    first, second = harness.make_model(), harness.make_model()
    whole = harness.train(None, model=first)
    with pytest.raises(harness.Stop):
        harness.train(tmp_path, harness.stopping_at(40))
    resumed = harness.train(tmp_path, model=second)
    assert resumed.history == whole.history
    assert (resumed.best_epoch, resumed.best_metric) == (whole.best_epoch, whole.best_metric)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("table", ["lazy_adam", "rowwise_adagrad"])
def test_so_it_is_with_penalties_and_two_kinds_of_optimisers(harness: ModuleType, tmp_path: Path, table: str) -> None:
    options = {
        "table": table,
        "ftrl": {"users": {"alpha": 0.1, "l1": 0.01}},
        "proximal": {"items": {"l1": 0.01, "l21": 0.01}, "body.0": {"l1": 0.01}},
        "table_l2": RowL2(0.1, torch.arange(30)),
    }
    first, second = harness.make_model(), harness.make_model()
    harness.train(None, model=first, **options)
    for step in (7, 20, 20):  # counted from where the run goes on
        with pytest.raises(harness.Stop):
            harness.train(tmp_path, harness.stopping_at(step), **options)
    harness.train(tmp_path, model=second, **options)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert 0 < int((first.items.weight == 0).sum()) < first.items.weight.numel()


def test_a_finished_run_is_not_run_again_but_can_be_prolonged(harness: ModuleType, tmp_path: Path) -> None:
    harness.train(tmp_path, epochs=2)
    again = harness.Hooked()
    assert len(harness.train(tmp_path, again, epochs=2).history) == 2
    assert again.calls == 0
    assert len(harness.train(tmp_path, again, epochs=3).history) == 3
    assert again.calls == 12


def test_resume_false_starts_anew(harness: ModuleType, tmp_path: Path) -> None:
    harness.train(tmp_path, epochs=2)
    anew = harness.Hooked()
    harness.train(tmp_path, anew, epochs=1, resume=False)
    assert anew.calls == 12


def test_damaged_newest_checkpoint_still_ends_at_the_same_bits(harness: ModuleType, tmp_path: Path) -> None:
    harness.train(tmp_path / "whole")
    with pytest.raises(harness.Stop):
        harness.train(tmp_path / "hurt", harness.stopping_at(30))
    newest = sorted((tmp_path / "hurt").glob("step-*"))[-1] / TENSORS
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        harness.train(tmp_path / "hurt")
    assert harness.digest(tmp_path / "hurt") == harness.digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, r"fit\.lr: 0\.02 -> 0\.5"),
        ({"seed": 9}, r"fit\.seed: 3 -> 9"),
        ({"table": "rowwise_adagrad"}, r"fit\.table: lazy_adam -> rowwise_adagrad"),
        ({"schedule": None}, r"fit\.schedule: Cosine\(steps=60, warmup=5, floor=0\.0\) -> None"),
    ],
)
def test_another_configuration_is_refused_with_what_differs(
    harness: ModuleType, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    harness.train(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match=message):
        harness.train(tmp_path, **options)


def test_another_model_or_other_data_is_refused(harness: ModuleType, tmp_path: Path) -> None:
    class Named(harness.Rows):  # type: ignore[misc]
        class dataset:
            fingerprint = "aaa"

    settings: dict[str, Any] = {"epochs": 1, "folder": tmp_path, "progress": False}
    batches = Batches(Named(), 8, seed=1)
    fit(harness.make_model(), batches, BCE(), **settings)
    wider = harness.make_model()
    wider.body[3] = nn.Dropout(0.4)
    with pytest.raises(CheckpointError, match=r"\(modules\.body\.3: Dropout\(p=0\.3, .*\) -> Dropout\(p=0\.4, "):
        fit(wider, batches, BCE(), **settings)
    with pytest.raises(CheckpointError, match=r"data\.batch_size: 8 -> 12"):
        fit(harness.make_model(), Batches(Named(), 12, seed=1), BCE(), **settings)
    Named.dataset.fingerprint = "bbb"
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: aaa -> bbb"):
        fit(harness.make_model(), batches, BCE(), **settings)
