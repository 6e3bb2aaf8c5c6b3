"""Distillation: what a student with 1/14 of its teacher's parameters keeps of the teacher's lead in AUC.

Run:      python recipes/rank/distil.py [--seeds 5] [--labels 1.0]
Hardware: 1 CPU core, 1 GB; about 40 seconds a seed on a core shared with other work
Expected: of the gap in AUC between the student alone and its teacher, the taught student closes .95 ± .17 (mean and
          standard deviation of 5 seeds; at least .80 is the band); test AUC .8438 ± .0030 (teacher), .8244 ± .0051
          (alone), .8432 ± .0040 (taught), .8878 (oracle)

Each seed is a world of its own (800 people, 500 items, about 63,000 impressions for training, split by time). Teacher
and student are both DeepFM, of width 32 with layers 256-128 and of width 6 with one layer of 32, so what is closed is
not a difference of kind. All three see the same impressions and the same labels. The student alone is trained twice,
with the taught one's setting and with dropout and a lower rate, and the better one on the validation part counts: it is
tuned more than the taught one, which has one setting. Test rows are scored once by the weights of the best epoch.

--labels .1 hides nine of ten labels from both students; the teacher has them all, and teaches on all impressions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from funnelrec import Dataset, zoo
from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.data.batches import Batches, Examples
from funnelrec.data.examples import Impressions
from funnelrec.data.sources.simulate import World
from funnelrec.evaluate.metrics import auc
from funnelrec.evaluate.protocol import evaluate_ranker
from funnelrec.learn.distil import Distillation
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE, Loss

MODEL = "rank/deepfm"
SOFT = 0.9


@dataclass(frozen=True)
class Setting:
    """A model's size and how it is trained."""

    embedding_dim: int
    hidden: tuple[int, ...]
    dropout: float
    lr: float
    patience: int = 5

    def build(self, spec: Spec, seed: int) -> nn.Module:
        """The untrained model."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = zoo.load(MODEL)(
                spec, embedding_dim=self.embedding_dim, hidden=self.hidden, dropout=self.dropout
            )
            return model


TEACHER = Setting(32, (256, 128), dropout=0.2, lr=3e-3, patience=2)
STUDENT = Setting(6, (32,), dropout=0.0, lr=1e-2)
ALONE = (STUDENT, Setting(6, (32,), dropout=0.2, lr=3e-3))


class Rows:
    """Impressions of which some have their label hidden (NaN) or are left out altogether."""

    def __init__(self, examples: Impressions, labelled: Tensor, *, only_labelled: bool) -> None:
        self.examples = examples
        self.labelled = labelled
        self.rows = labelled.nonzero().squeeze(1) if only_labelled else torch.arange(len(examples))

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        """The examples `index` of those that are left."""
        rows = self.rows[index]
        batch = self.examples.gather(rows, generator)
        return batch.replace(label=batch.label.masked_fill(~self.labelled[rows], torch.nan))


@dataclass(frozen=True)
class Outcome:
    """Test AUCs of one seed, the share of the teacher's parameters, and microseconds to score a row."""

    oracle: float
    teacher: float
    alone: float
    taught: float
    size: float
    cost: tuple[float, float]  #: teacher, student

    @property
    def kept(self) -> float:
        """The share of the gap between the student alone and the teacher that the taught student closes."""
        return (self.taught - self.alone) / (self.teacher - self.alone)


class Trainer:
    """One world: trains on its training part, chooses the epoch on its validation part."""

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.seed = data, seed
        self.train, valid, test = (Impressions(data, part) for part in ("train", "valid", "test"))
        self.valid, self.test = Batches(valid, 8192), Batches(test, 8192)

    def __call__(
        self, setting: Setting, examples: Examples, loss: Loss, *, batch: int = 1024
    ) -> tuple[nn.Module, float]:
        """The trained model and its validation AUC."""
        model = setting.build(self.data.spec, self.seed)
        result = fit(
            model,
            Batches(examples, batch, shuffle=True, seed=self.seed),
            loss,
            epochs=40,
            lr=setting.lr,
            validate=lambda: {"auc": evaluate_ranker(model, self.valid).means["auc"]},
            metric="auc",
            patience=setting.patience,
            seed=self.seed,
            progress=False,
        )
        assert result.best_metric is not None
        return model, result.best_metric

    def score(self, model: nn.Module) -> tuple[float, float]:
        """Test AUC, and microseconds a row."""
        began = time.perf_counter()
        result = evaluate_ranker(model, self.test)
        return result.means["auc"], 1e6 * (time.perf_counter() - began) / len(result.labels)


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def run(seed: int, *, labels: float = 1.0, users: int = 800, items: int = 500) -> Outcome:
    """Teacher, student alone and taught student on the world of `seed`."""
    world = World.build(seed=seed, users=users, items=items)
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(world.tables, Path(folder) / "world")
        trainer = Trainer(data, seed)
        chosen = torch.rand(len(trainer.train), generator=torch.Generator().manual_seed(seed)) < labels
        batch = 1024 if labels == 1 else 128  # few labels: as many steps an epoch as they allow
        teacher, _ = trainer(TEACHER, trainer.train, BCE())
        lonely = Rows(trainer.train, chosen, only_labelled=True)
        alone, _ = max((trainer(s, lonely, BCE(), batch=batch) for s in ALONE), key=lambda found: found[1])
        pupil = Rows(trainer.train, chosen, only_labelled=False)
        taught, _ = trainer(STUDENT, pupil, Distillation(teacher, soft=SOFT))
        of_teacher, teacher_cost = trainer.score(teacher)
        of_taught, student_cost = trainer.score(taught)
        rows = data.rows("test")
        return Outcome(
            oracle=auc(data.events.label[rows].astype(np.float64), world.click_probability[rows]),
            teacher=of_teacher,
            alone=trainer.score(alone)[0],
            taught=of_taught,
            size=parameters(taught) / parameters(teacher),
            cost=(teacher_cost, student_cost),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="worlds 0, 1, …")
    parser.add_argument("--labels", type=float, default=1.0, help="share of the labels that students see")
    parser.add_argument("--users", type=int, default=800)
    parser.add_argument("--items", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    say = sys.stdout.write
    say("| seed | oracle | teacher | student alone | student taught | gap closed | parameters | µs a row |\n")
    say("|---|---|---|---|---|---|---|---|\n")
    outcomes = []
    for seed in range(options.seeds):
        o = run(seed, labels=options.labels, users=options.users, items=options.items)
        outcomes.append(o)
        say(f"| {seed} | {o.oracle:.4f} | {o.teacher:.4f} | {o.alone:.4f} | {o.taught:.4f} | {o.kept:.2f} ")
        say(f"| {o.size:.3f} | {o.cost[0]:.1f} → {o.cost[1]:.1f} |\n")
        sys.stdout.flush()
    spread = 1 if len(outcomes) > 1 else 0
    cells = [
        f"{np.mean(v):.{d}f} ± {np.std(v, ddof=spread):.{d}f}"
        for v, d in (([getattr(o, n) for o in outcomes], 4) for n in ("oracle", "teacher", "alone", "taught"))
    ]
    kept = [o.kept for o in outcomes]
    say(f"| all | {' | '.join(cells)} | {np.mean(kept):.2f} ± {np.std(kept, ddof=spread):.2f} | | |\n")


if __name__ == "__main__":
    main()
