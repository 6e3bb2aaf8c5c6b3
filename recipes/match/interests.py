"""How many interests? A simulated world in which everybody has four, and matchers that look for 1, 2, 4 and 8.

Run:      python recipes/match/interests.py OUT [--models comirec_sa …] [--interests 1 2 4 8] [--seeds 0] [--curve]
Hardware: 1 CPU core; 5 to 15 seconds of processor time a model and number of interests
Expected: recall@50 and agreement (NMI) for 1, 2, 4, 8 interests, seed 0, ± .014:
          comirec_sa .264 0, .258 .44, .278 .52, .288 .64; comirec_dr .290 0, .254 .18, .291 .57; mind .305 0, .301 .55,
          .264 .55. What is not listed has not been measured. Why one vector does so well: docs/matching.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funnelrec import Dataset
from funnelrec.cli.demo import interest_agreement
from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher
from funnelrec.data.examples import Queries
from funnelrec.data.sources import simulate
from funnelrec.evaluate import plots
from funnelrec.evaluate.protocol import evaluate_matcher
from funnelrec.evaluate.significance import bootstrap_interval
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.funnel import retriever_of
from funnelrec.workflow import Choice, Training, train_matcher

TRUE = 4
WORLD: dict[str, Any] = {"users": 2000, "items": 500, "interests": TRUE, "seed": 0}
LENGTH, EPOCHS = 50, 60
# learning rate: MIND and ComiRec-DR, whose interests are shorter than 1, need larger items and so larger steps
MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "comirec_sa": (5e-3, {}),
    "comirec_dr": (1.5e-2, {}),
    "mind": (2e-2, {"adaptive": False}),
}
KNOB = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
CANDIDATES = 200


class Reranked:
    """The best of CANDIDATES items, chosen as a list by controllable diversity over the topics.

    What rerank/diversity.py does for one user, for a batch at once, as each item has one topic here; the first user of
    every batch is answered by both.
    """

    def __init__(self, matcher: Matcher, categories: Tensor, diversity: float) -> None:
        self.matcher, self.categories, self.diversity = matcher, categories, diversity

    def recommend(
        self, batch: Batch, k: int, exclude: Tensor | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows in the order chosen; scores only say that order."""
        rows, scores = self.matcher.recommend(batch, CANDIDATES, exclude, allowed)  # (B, C)
        topics, gain = self.categories[rows, 0], scores.double()  # (B, C)
        chosen = torch.empty(len(rows), k, dtype=torch.int64)
        for place in range(k):
            best = gain.argmax(1, keepdim=True)
            chosen[:, place : place + 1] = best
            gain = gain - self.diversity * (topics == topics.gather(1, best))
            gain.scatter_(1, best, -torch.inf)
        reranker = ControllableDiversity(diversity=self.diversity)
        own = self.categories[rows[0]]
        first = reranker.rerank(scores[0], k, categories=own, vectors=torch.zeros(CANDIDATES, 0))
        if not torch.equal(first, chosen[0]):
            raise ValueError("the batch and rerank/diversity.py choose different items")
        return rows.gather(1, chosen), -torch.arange(k).float().expand(len(rows), -1)


def run(name: str, count: int, seed: int, world: simulate.World, data: Dataset) -> tuple[dict[str, Any], Any]:
    """One model trained and measured on the test part."""
    lr, more = MODELS[name]
    choice = Choice(f"match/{name}", {"embedding_dim": 32, "num_interests": count, **more})
    training = Training(
        epochs=EPOCHS, lr=lr, batch_size=128, max_len=LENGTH, patience=EPOCHS, progress=False, seed=seed
    )
    start = time.process_time()
    model, _ = train_matcher(data, choice, training)
    seconds = time.process_time() - start
    matcher = retriever_of(model, None, data.spec.num_items)[0]
    result = evaluate_matcher(matcher, Queries(data, "test", max_len=LENGTH), ks=(10, 50))
    interval = bootstrap_interval(result.metrics["recall@50"])
    return {
        "recall@50": result.means["recall@50"],
        "half": interval.half,
        "recall@10": result.means["recall@10"],
        "agreement": float(interest_agreement(world, data, model).mean()),
        "seconds": seconds,
    }, matcher


def line(name: str, count: int, seed: int, found: Mapping[str, float]) -> str:
    """A row of the table."""
    recall = f"{found['recall@50']:.4f} ± {found['half']:.4f}"
    return f"| {name} | {count} | {seed} | {recall} | {found['agreement']:.2f} | {found['seconds']:.0f} |\n"


def curve(matcher: Matcher, data: Dataset, out: Path) -> None:
    """Recall and diversity of the list at each value of the knob; a table, and a picture in `out`."""
    topics = torch.from_numpy(data.item_attribute("category")).long()
    queries = Queries(data, "test", max_len=LENGTH)
    sys.stdout.write("\n| knob | recall@50 | diversity@50 |\n|---|---|---|\n")
    points = []
    for knob in KNOB:
        result = evaluate_matcher(
            Reranked(matcher, topics, knob),
            queries,
            ks=(10, 50),
            ties="as_ranked",
            item_attribute=data.item_attribute("category"),
        )
        recall, diversity = result.means["recall@50"], result.means["diversity@50"]
        interval = bootstrap_interval(result.metrics["recall@50"])
        points.append(plots.CurvePoint(f"{knob:g}", diversity, recall, interval))
        sys.stdout.write(f"| {knob:g} | {recall:.4f} | {diversity:.4f} |\n")
        sys.stdout.flush()
    figure = plots.curve(
        "Accuracy against diversity",
        "Labels: the knob λ, what another topic is worth in units of the score",
        points,
        diversity="diversity@50: share of pairs of two topics",
        accuracy="recall@50",
    )
    plots.save(figure, out, "diversity")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the tables to standard output and the pictures to OUT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--interests", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--curve", action="store_true", help="also sweep the diversity of the last matcher")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    world = simulate.load(**WORLD)
    matcher = None
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(world.tables, Path(folder) / "data")
        sys.stdout.write("| model | interests | seed | recall@50 | agreement (NMI) | s |\n|---|---|---|---|---|---|\n")
        for name in options.models:
            for count in options.interests:
                for seed in options.seeds:
                    key = f"{name} {count} {seed}"
                    if key not in results or options.curve:
                        results[key], matcher = run(name, count, seed, world, data)
                        file.write_text(json.dumps(results, indent=1))
                    sys.stdout.write(line(name, count, seed, results[key]))
                    sys.stdout.flush()
        if options.curve and matcher is not None:
            curve(matcher, data, options.out)


if __name__ == "__main__":
    main()
