"""A tiny training run to be stopped, killed and damaged, in this process or in others.

Everything that could hide a fault is in it: every example differs, batches are shuffled and drawn with their own
generator, dropout and `training_terms` use torch's generator, tables are lazy, the rate follows a schedule, gradients
are clipped, and validation draws random numbers of its own.

    python harness.py run FOLDER [--limit-at STEP] [--twice-at STEP]
    python harness.py every FOLDER
    python harness.py kills FOLDER NUMBER SEED [--fault NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import Table
from funnelrec.data.batches import Batches
from funnelrec.learn import checkpoint
from funnelrec.learn.fit import FitResult, fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.schedules import Cosine

ROWS, BATCH_SIZE, EPOCHS = 96, 8, 5
STEPS = ROWS // BATCH_SIZE * EPOCHS


class Rows:
    """Labelled rows, no two alike."""

    def __init__(self, n: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(11)
        self.user = torch.randint(1, 20, (n,), generator=generator)
        self.item = torch.randint(1, 30, (n,), generator=generator)
        self.numbers = torch.arange(n).unsqueeze(1) / n + torch.randn(n, 3, generator=generator)
        self.label = torch.randint(0, 2, (n,), generator=generator).float()

    def __len__(self) -> int:
        return len(self.label)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        noise = torch.randn(len(index), 3, generator=generator) / 10
        return Batch(
            user=self.user[index],
            item=self.item[index],
            numbers=self.numbers[index] + noise,
            label=self.label[index],
        )


class Model(nn.Module):
    """Two lazy tables and a small network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = Table(20, 4, std=0.1), Table(30, 4, std=0.1)
        self.body = nn.Sequential(nn.Linear(11, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, batch: Batch) -> Tensor:
        joined = torch.cat([self.users(batch.user), self.items(batch.item), batch.numbers], 1)
        logits: Tensor = self.body(joined).squeeze(1)
        return logits

    def training_terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"noise": 0.01 * (self.items(batch.item) * torch.randn(batch.size, 4)).sum()}


class Hooked:
    """BCE that first calls `hook(number of calls so far)`."""

    def __init__(self, hook: Callable[[int], None] = lambda calls: None) -> None:
        self.hook, self.calls, self.bce = hook, 0, BCE()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.hook(self.calls)
        self.calls += 1
        return self.bce(model, batch)


def make_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Model()


def train(
    folder: Path | None, loss: Hooked | None = None, model: nn.Module | None = None, **options: object
) -> FitResult:
    """The run of this file; `options` replace those of `fit`."""
    model = make_model() if model is None else model
    rows = Rows()

    def validate() -> dict[str, float]:
        with torch.no_grad():
            torch.rand(7)
            return {"score": -float(BCE()(model, rows.gather(torch.arange(len(rows)), torch.Generator())))}

    settings: dict[str, object] = {
        "epochs": EPOCHS, "lr": 0.02, "schedule": Cosine(steps=STEPS, warmup=5), "clip_norm": 0.5, "validate": validate,
        "metric": "score", "seed": 3, "folder": folder, "checkpoint_every": 3, "progress": False, "weight_decay": 0.01,
    }  # fmt: skip
    batches = Batches(rows, BATCH_SIZE, shuffle=True, seed=1)
    return fit(model, batches, Hooked() if loss is None else loss, **{**settings, **options})  # type: ignore[arg-type]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of the newest checkpoint's weights, of its optimiser state, and of everything."""
    with checkpoint.Checkpoints(folder) as store:
        found = store.load()
        newest = store.all()[-1]
    assert found is not None
    result = {}
    for group in ("weights", "optimizer"):
        sha = hashlib.sha256()
        for name, tensor in sorted(found[0][group].items()):
            sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
        result[group] = sha.hexdigest()
    result["everything"] = hashlib.sha256((newest / checkpoint.MANIFEST).read_bytes()).hexdigest()
    return result


def plant(fault: str | None) -> None:
    """Break resuming on purpose: the harness has to notice."""
    if fault == "rng":
        checkpoint._set_rng = lambda states, model: None
    elif fault == "position":
        right = checkpoint.Run.load

        def wrong(self: checkpoint.Run) -> object:
            found = right(self)
            if found is not None:
                found[0].batch = max(0, found[0].batch - 1)
            return found

        checkpoint.Run.load = wrong  # type: ignore[assignment,method-assign]
    elif fault is not None:
        raise ValueError(f"no fault is called {fault!r}")


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a copy of this process; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def kills(folder: Path, number: int, seed: int, fault: str | None) -> dict[str, object]:
    """`number` SIGKILLs at random instants, each followed by a resume, over as many whole runs as that takes."""
    undisturbed = folder / "undisturbed"
    started = time.monotonic()
    os.waitpid(forked(lambda: train(undisturbed)), 0)
    seconds = time.monotonic() - started
    plant(fault)
    generator = random.Random(seed)
    done = half_written = resumed = 0
    finals = []
    while done < number:
        run = folder / f"run-{len(finals)}"
        while True:
            child = forked(lambda run=run: train(run))  # type: ignore[misc]
            time.sleep(generator.uniform(0.0, 0.6 * seconds) if done < number else 0)
            if done < number:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                done += 1
                half_written += any(run.glob(f"{checkpoint.TEMPORARY}*"))
                resumed += any(run.glob(f"{checkpoint.PREFIX}*"))
                continue
            finals.append(digest(run) if os.WEXITSTATUS(status) == 0 else {"failed": str(status)})
            break
    expected = digest(undisturbed)
    return {
        "kills": done,
        "runs": len(finals),
        "equal": sum(final == expected for final in finals),
        "killed_while_writing": half_written,
        "resumed_from_checkpoint": resumed,
        "seconds": round(time.monotonic() - started, 1),
    }


class Stop(Exception):
    """The run is left here."""


def stopping_at(step: int) -> Hooked:
    """A loss that leaves the run before its `step`-th step, counted from 0."""

    def hook(calls: int) -> None:
        if calls == step:
            raise Stop

    return Hooked(hook)


def every(folder: Path) -> dict[str, int]:
    """Stop after each step of the run, resume, and compare the end."""
    checkpoint._flush = lambda path: None  # no power is cut here, so the disk need not be waited for
    train(folder / "whole")
    whole = digest(folder / "whole")
    equal = twice = 0
    for step in range(1, STEPS):
        with contextlib.suppress(Stop):
            train(folder / str(step), stopping_at(step), checkpoint_every=step)
        resumed = Hooked()
        train(folder / str(step), resumed, checkpoint_every=STEPS)
        twice += resumed.calls - (STEPS - step)
        equal += digest(folder / str(step)) == whole
    return {"stops": STEPS - 1, "equal": equal, "steps_done_twice": twice}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "every", "kills"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int, nargs="?", default=0)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--fault")
    parser.add_argument("--limit-at", type=int)
    parser.add_argument("--twice-at", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "kills":
        sys.stdout.write(json.dumps(kills(arguments.folder, arguments.number, arguments.seed, arguments.fault)))
        return

    if arguments.what == "every":
        sys.stdout.write(json.dumps(every(arguments.folder)))
        return

    def hook(calls: int) -> None:
        time.sleep(arguments.slow)
        if calls == arguments.limit_at:  # a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        if calls == arguments.twice_at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    train(arguments.folder, Hooked(hook))


if __name__ == "__main__":
    main()
