from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funnelrec.learn.fit as fit_module
from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.learn.checkpoint import PREFIX, Checkpoints
from funnelrec.learn.fit import FitResult, NonFiniteError, TrainingInterrupted, fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.schedules import Constant


def bits(model: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


def trained(harness: ModuleType, folder: Path | None = None, **options: Any) -> bytes:
    model = harness.make_model()
    harness.train(folder, model=model, **{"epochs": 2, **options})
    return bits(model)


def test_same_seed_same_bits_whatever_else_goes_on(harness: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"metric": None, "patience": None}

    def noisy() -> dict[str, float]:
        torch.manual_seed(99)
        torch.rand(1000)
        return {"score": 0.0}

    reference = trained(harness, validate=None, **settings)
    variants = {
        "again": trained(harness, validate=None, **settings),
        "validation that reseeds torch": trained(harness, validate=noisy, **settings),
        "checkpoints": trained(harness, tmp_path, validate=None, **settings),
        "a progress bar": trained(harness, validate=None, progress=True, **settings),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        variants["another state of torch's generator"] = trained(harness, validate=None, **settings)
    assert [name for name, found in variants.items() if found != reference] == []
    assert trained(harness, validate=None, seed=4, **settings) != reference, "the control must differ"


def test_the_callers_generator_is_not_touched(harness: ModuleType) -> None:
    before = torch.get_rng_state()
    trained(harness)
    assert torch.equal(torch.get_rng_state(), before)


class Scalar(nn.Module):
    """One number; the loss is its distance from what the batches ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, batch: Batch) -> Tensor:
        self.modes.append(self.training)
        return self.value.expand(batch.size)


class Ones:
    def __len__(self) -> int:
        return 8

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        return Batch(label=torch.ones(len(index)))


def fit_scalar(scores: list[float], **options: Any) -> tuple[Scalar, FitResult, list[float]]:
    model, seen = Scalar(), []
    answers = iter(scores)

    def validate() -> dict[str, float]:
        assert not model.training
        seen.append(float(model.value.detach()))
        return {"score": next(answers)}

    settings: dict[str, Any] = {"epochs": len(scores), "metric": "score", "progress": False, **options}
    result = fit(model, Batches(Ones(), 4), BCE(), validate=validate, **settings)
    return model, result, seen


def test_best_weights_are_kept_and_patience_ends_the_run() -> None:
    model, result, seen = fit_scalar([0.1, 0.5, 0.5, 0.4, 0.9], patience=2)
    assert (result.stopped_by, result.best_epoch, result.best_metric) == ("patience", 1, 0.5)
    assert [entry["score"] for entry in result.history] == [0.1, 0.5, 0.5, 0.4]
    assert [entry["step"] for entry in result.history] == [2, 4, 6, 8]
    assert float(model.value.detach()) == seen[1] != seen[3]
    assert not model.training
    assert all(model.modes)
    assert result.seconds > 0


def test_minimise_and_nan_is_never_best() -> None:
    model, result, seen = fit_scalar([float("nan"), 3.0, 2.0, 5.0], minimise=True)
    assert (result.stopped_by, result.best_epoch, result.best_metric) == ("epochs", 2, 2.0)
    assert float(model.value.detach()) == seen[2]


def test_without_a_metric_the_last_weights_stay() -> None:
    model, result, seen = fit_scalar([0.9, 0.1], metric=None)
    assert (result.best_epoch, result.best_metric) == (None, None)
    assert float(model.value.detach()) == seen[1]


def test_one_step_of_adam_with_schedule_and_clipping_by_hand() -> None:
    # d/dx BCE(0, 1) = -0.5; Adam's first step is the rate whatever the size, so 0.1 · 1/4 (warm-up) = 0.025
    class One(Ones):
        def __len__(self) -> int:
            return 4

    for clip_norm in (None, 0.01):
        model = Scalar()
        fit(
            model, Batches(One(), 4), BCE(), epochs=1, lr=0.1, schedule=Constant(4), clip_norm=clip_norm, progress=False
        )  # fmt: skip
        assert float(model.value.detach()) == pytest.approx(0.025, rel=1e-4)


def test_clipping_bounds_the_norm_over_tables_and_dense_parts_together(harness: ModuleType) -> None:
    from funnelrec.learn.guard import clip, collect_gradients

    model = harness.make_model()
    rows = harness.Rows()
    (BCE()(model, rows.gather(torch.arange(20), torch.Generator())) * 100).backward()
    truth = torch.cat(
        [(p.grad.to_dense() if p.grad.is_sparse else p.grad).flatten() for p in model.parameters()]
    ).norm()
    gradients = collect_gradients(model)
    norm = torch.nn.utils.get_total_norm(gradients)
    assert float(norm) == pytest.approx(float(truth), rel=1e-5)
    clip(gradients, norm, 0.5)
    after = torch.cat(
        [(p.grad.to_dense() if p.grad.is_sparse else p.grad).flatten() for p in model.parameters()]
    ).norm()
    assert float(after) == pytest.approx(0.5, rel=1e-4)
    assert model.items.weight.grad.is_sparse


def test_training_terms_are_added() -> None:
    class WithTerm(Scalar):
        def training_terms(self, batch: Batch) -> dict[str, Tensor]:
            return {"one": 10 * self.value, "two": 10 * self.value}

    model = WithTerm()
    fit(model, Batches(Ones(), 4), BCE(), epochs=1, lr=0.1, progress=False)
    assert float(model.value.detach()) < 0, "20 x outweighs the pull of the labels"


def test_the_bar_is_drawn_on_a_terminal_only(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from funnelrec.learn import progress

    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(progress.Progress, "update", lambda self, task, **fields: drawn.append(fields))
    trained(harness, progress=True)
    assert drawn == []
    monkeypatch.setenv("FORCE_COLOR", "1")
    trained(harness, progress=False)
    assert drawn == []
    trained(harness, progress=True)
    assert drawn[-1]["completed"] == 24
    assert drawn[-1]["loss"] > 0
    assert "best" in drawn[-1]["best"]


def test_bfloat16_trains(harness: ModuleType) -> None:
    model = harness.make_model()
    result = harness.train(None, model=model, epochs=3, bf16=True)
    assert result.history[-1]["loss"] < 0.8
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---- numbers that are not finite ----


class Poisoned:
    """Rows of the harness, one of which is spoiled."""

    def __init__(self, rows: Any, name: str, row: int, value: float) -> None:
        self.rows, self.name, self.row, self.value = rows, name, row, value

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        batch = self.rows.gather(index, generator)
        spoiled = batch[self.name].clone()
        spoiled[index == self.row] = self.value
        return batch.replace(**{self.name: spoiled})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["numbers", "label"])
def test_a_bad_feature_or_label_stops_before_the_step(
    harness: ModuleType, tmp_path: Path, name: str, value: float
) -> None:
    batches = Batches(Poisoned(harness.Rows(), name, 50, value), 8, shuffle=True, seed=1)
    model = harness.make_model()
    with pytest.raises(NonFiniteError, match=r"at step \d+, epoch 0, batch \d+ .*The step was not taken") as caught:
        fit(model, batches, BCE(), epochs=1, folder=tmp_path, checkpoint_every=1, progress=False)
    error = caught.value
    expected = next(i for i in range(12) if 50 in batches.rows(0, i))
    assert (error.step, error.epoch, error.batch) == (expected, 0, expected)
    assert 50 in error.examples
    assert len(error.examples) == 8
    assert f"batch.{name} in rows " in str(error)
    assert error.tensor.startswith(f"batch.{name}")
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with Checkpoints(tmp_path) as store:
        found = store.load()
    assert found is not None
    assert found[1]["position"]["step"] == expected, "the last good step is kept"
    for key, tensor in model.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(tensor, found[0]["weights"][key]), "the step was not taken"


def test_a_bad_gradient_names_the_parameter(harness: ModuleType) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.steep = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

        def forward(self, batch: Batch) -> Tensor:
            return (self.fine + self.steep.abs().sqrt()).expand(batch.size)  # the slope of √ at 0 is infinite

    model = Steep()
    with pytest.raises(NonFiniteError, match=r"the gradient is nan at step 0.* gradient of steep"):
        fit(model, Batches(Ones(), 4), BCE(), epochs=1, progress=False)
    assert [float(p.detach()) for p in model.parameters()] == [1.0, 0.0]


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_freed_memory_is_kept_while_it_trains(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        seen.append("begins")
        try:
            yield
        finally:
            seen.append("ends")

    monkeypatch.setattr(fit_module, "kept_memory", recorded)
    monkeypatch.setattr(fit_module, "_step", lambda *_: seen.append("step") or 0.0)
    if ends == "well":
        fit_scalar([0.5])
    else:
        with pytest.raises(StopIteration):
            fit_scalar([], epochs=1)
    assert seen == ["begins", "step", "step", "ends"]


# ---- signals ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_leaves(
    harness: ModuleType, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def hook(calls: int) -> None:
        if calls == 20:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterrupted) as caught:
        harness.train(tmp_path / "stopped", harness.Hooked(hook), checkpoint_every=None)
    assert caught.value.code == code
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    with Checkpoints(tmp_path / "stopped") as store:
        found = store.load()
    assert found is not None
    assert found[1]["position"]["step"] == 21
    harness.train(tmp_path / "stopped")
    harness.train(tmp_path / "whole")
    assert harness.digest(tmp_path / "stopped") == harness.digest(tmp_path / "whole")


def command(harness: ModuleType, *arguments: object) -> list[str]:
    return [sys.executable, str(harness.__file__), *map(str, arguments)]


def test_sigterm_from_outside(harness: ModuleType, tmp_path: Path) -> None:
    with subprocess.Popen(command(harness, "run", tmp_path, "--slow", 0.05)) as process:
        while not list(tmp_path.glob(f"{PREFIX}*")):
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    with Checkpoints(tmp_path) as store:
        found = store.load()
    assert found is not None
    assert 0 < found[1]["position"]["step"] < harness.STEPS


def test_a_second_signal_ends_the_process_at_once(harness: ModuleType, tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(command(harness, "run", tmp_path, "--twice-at", 7), timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 50, "the step that hangs for 60 s was not waited for"


def test_outside_the_main_thread_handlers_stay(harness: ModuleType) -> None:
    seen: list[object] = []

    def hook(calls: int) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: harness.train(None, harness.Hooked(hook), epochs=1))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert set(seen) == {before}


def test_a_full_disk_leaves_the_last_good_checkpoint(harness: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        command(harness, "run", tmp_path / "full", "--limit-at", 20), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "could not write the checkpoint of step 21" in done.stderr
    for folder in ("full", "whole"):
        subprocess.run(command(harness, "run", tmp_path / folder), check=True)
    assert harness.digest(tmp_path / "full") == harness.digest(tmp_path / "whole")


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, received 0"),
        ({"patience": 0}, "patience must be at least 1, received 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, received 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"validate": None}, "metric 'score' needs validate="),
        ({"metric": None, "patience": 3}, "patience needs metric="),
        ({"metric": "auc"}, "validate returned no 'auc'; it returned score"),
    ],
)
def test_options_are_checked(harness: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.train(None, **options)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="there is no batch to train on"):
        fit(Scalar(), Batches(Ones(), 9, drop_last=True), BCE(), epochs=1)
