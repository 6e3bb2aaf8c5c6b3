"""How many interests? A simulated world in which everybody has four, and matchers that look for 1, 2, 4 and 8.

Run:      python recipes/match/interests.py OUT [--models comirec_sa …] [--interests 1 2 4 8] [--seeds 0 1 2] [--curve]
          [--loss best papers] [--horizon 30]
Hardware: 1 CPU core; 5 to 25 seconds of processor time a model, number of interests and seed
Expected: recall@50 and agreement (NMI) for 1, 2, 4, 8 interests, three seeds, each ± .014 over the people: comirec_sa
          .286 0, .314 .55, .327 .84, .355 .97; mind .264 0, .257 .31, .278 .57, .297 .69; comirec_dr .284 0, .284 .44,
          .294 .63, .288 .69; comirec_sa with `--loss papers` .286 0, .279 .17, .296 .67, .315 .75; `--models comirec_sa
          --interests 8 --curve`: .355, .349, .334, .301, .290, .283, diversity .686, .781, .815, .854, .864, .867

The world has 40 sub-topics and vectors of 8 numbers, too few for one vector to point at four of 40 and at nothing else:
the first table says what is possible with the true directions, as K vectors and as their sum, by their width.
`--loss papers` trains an interest against what its targets are not, as in the papers; `best` (learn/interests.py) all
interests of a user at once, by the score that serves them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec import Dataset
from funnelrec.cli.demo import interest_agreement
from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.data.batches import Batches
from funnelrec.data.examples import NextItem, Queries
from funnelrec.data.sources import simulate
from funnelrec.evaluate import plots
from funnelrec.evaluate.protocol import evaluate_matcher
from funnelrec.evaluate.significance import bootstrap_interval, paired_test
from funnelrec.learn.fit import fit
from funnelrec.learn.interests import BestInterestSoftmax
from funnelrec.learn.losses import FullSoftmax
from funnelrec.learn.schedules import Cosine
from funnelrec.match.index.topk import top_rows
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.funnel import retriever_of
from funnelrec.workflow import Choice

TRUE = 4
WORLD: dict[str, Any] = {"users": 2000, "items": 500, "interests": TRUE, "seed": 0}
LENGTH, WIDTH, EPOCHS, BATCH, RATE, TEMPERATURE = 50, 8, 150, 256, 1e-2, 0.1
HORIZON = 30  #: clicks ahead of which one is the target: people have some 30, so any later one
MODELS: dict[str, dict[str, Any]] = {"comirec_sa": {}, "comirec_dr": {}, "mind": {"adaptive": False}}
LOSSES = {"best": BestInterestSoftmax(temperature=TEMPERATURE), "papers": FullSoftmax(temperature=TEMPERATURE)}
WIDTHS = (4, 8, 16, 32, 64)  #: of the vectors in the table of what is possible
POPULAR = 0.02  #: weight of the log of an item's count there, which orders the items of a sub-topic
KNOB = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)
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


class Known:
    """Scores by the true sub-topics of each person: K directions, the best counts, or one, their sum."""

    def __init__(self, interests: Tensor, vectors: Tensor, counts: Tensor) -> None:
        self.interests, self.vectors, self.counts = interests, vectors, counts

    def recommend(
        self, batch: Batch, k: int, exclude: Tensor | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`batch.user` holds rows of `interests`."""
        scores = (self.interests[batch.user] @ self.vectors.T).amax(1) + self.counts  # (B, N)
        scores[:, :FIRST_KNOWN] = -torch.inf
        if exclude is not None:
            scores.scatter_(1, exclude, -torch.inf)
        return top_rows(scores, k)


def directions(count: int, width: int) -> Tensor:
    """Unit vectors [count, width] that keep away from one another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vectors = torch.randn(count, width, requires_grad=True)
    optimiser = torch.optim.Adam([vectors], 0.05)
    for _ in range(400):
        unit = F.normalize(vectors, dim=1)
        optimiser.zero_grad()
        (10 * (unit @ unit.T - 2 * torch.eye(count))).exp().mean().backward()
        optimiser.step()
    return F.normalize(vectors.detach(), dim=1)


def possible(world: simulate.World, data: Dataset) -> None:
    """A table: the recall of the true interests, as many vectors and as one, by the width of the vectors."""
    sys.stdout.write("| width | K true directions | their sum |\n|---|---|---|\n")
    queries = Queries(data, "test", max_len=LENGTH)
    person = data.people.decode(queries.persons.numpy()).to_numpy() - 1
    subtopic, _ = world.interests.at(person, queries.times.numpy())
    item = data.item_vocabulary.decode(np.arange(FIRST_KNOWN, data.spec.num_items)).to_numpy() - 1
    counts = POPULAR * torch.from_numpy(data.train_item_counts).float().clamp(min=0.5).log()
    for width in WIDTHS:
        each = directions(len(simulate.SUBTOPICS), width)
        vectors = torch.zeros(data.spec.num_items, width)
        vectors[FIRST_KNOWN:] = each[torch.from_numpy(world.item_subtopic[item])]
        true = torch.zeros(data.spec.num_users, TRUE, width)
        true[queries.gather(torch.arange(len(queries))).user] = each[torch.from_numpy(subtopic)]
        found = [
            evaluate_matcher(Known(vector, vectors, counts), queries, ks=(50,)).means["recall@50"]
            for vector in (true, true.sum(1, keepdim=True))
        ]
        sys.stdout.write(f"| {width} | {found[0]:.3f} | {found[1]:.3f} |\n")


def run(
    name: str, count: int, seed: int, loss: str, horizon: int, world: simulate.World, data: Dataset
) -> tuple[dict[str, Any], Any]:
    """One model trained and measured on the test part."""
    config = {"embedding_dim": WIDTH, "num_interests": count, "max_len": LENGTH, **MODELS[name]}
    model = Choice(f"match/{name}", config).build(data.spec, seed=seed)
    model.items.dense = True
    examples = NextItem(data, "train", max_len=LENGTH, mode="cut", horizon=horizon)
    batches = Batches(examples, BATCH, shuffle=True, seed=seed)
    steps = len(batches) * EPOCHS
    start = time.process_time()
    schedule = Cosine(steps, warmup=steps // 20, floor=0.02)
    fit(
        model,
        batches,
        LOSSES[loss],
        epochs=EPOCHS,
        lr=RATE,
        clip_norm=5.0,
        schedule=schedule,
        seed=seed,
        progress=False,
    )
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


def lines(results: Mapping[str, Mapping[str, float]]) -> str:
    """The table: mean and standard deviation over the seeds, the mean half width of the 95 % intervals, agreement."""
    rows = [
        "| loss | model | interests | horizon | recall@50 | ± of one | agreement (NMI) | seeds | s |",
        "|---" * 9 + "|",
    ]
    for label in dict.fromkeys(key.rpartition(" ")[0] for key in results):
        loss, name, count, horizon = label.split()
        own = [found for key, found in results.items() if key.rpartition(" ")[0] == label]
        mean = {figure: statistics.mean(found[figure] for found in own) for figure in own[0]}
        spread = f" ± {statistics.stdev(found['recall@50'] for found in own):.4f}" if len(own) > 1 else ""
        rows.append(
            f"| {loss} | {name} | {count} | {horizon} | {mean['recall@50']:.4f}{spread} | {mean['half']:.4f} | "
            f"{mean['agreement']:.2f} | {len(own)} | {mean['seconds']:.0f} |"
        )
    return "\n".join(rows) + "\n"


def curve(matchers: Sequence[Matcher], data: Dataset, out: Path) -> None:
    """Recall and diversity of the list at each value of the knob, means over the seeds; a table, and a picture."""
    topics = torch.from_numpy(data.item_attribute("category")).long()
    queries = Queries(data, "test", max_len=LENGTH)
    sys.stdout.write("\n| knob | recall@50 | against the knob before | diversity@50 |\n|---|---|---|---|\n")
    points, before = [], None
    for knob in KNOB:
        results = [
            evaluate_matcher(
                Reranked(matcher, topics, knob),
                queries,
                ks=(10, 50),
                ties="as_ranked",
                item_attribute=data.item_attribute("category"),
            )
            for matcher in matchers
        ]
        recall = np.mean([result.metrics["recall@50"] for result in results], 0)
        diversity = statistics.mean(result.means["diversity@50"] for result in results)
        change = (
            ""
            if before is None
            else "{0.mean:+.4f} [{0.low:+.4f}, {0.high:+.4f}]".format(paired_test(recall, before).interval)
        )
        before = recall
        points.append(plots.CurvePoint(f"{knob:g}", diversity, float(recall.mean()), bootstrap_interval(recall)))
        sys.stdout.write(f"| {knob:g} | {recall.mean():.4f} | {change} | {diversity:.4f} |\n")
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
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["best"])
    parser.add_argument("--horizon", type=int, default=HORIZON, help="1: train on the very next click")
    parser.add_argument(
        "--curve", action="store_true", help="also sweep the diversity of the last model, all its seeds"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    world = simulate.load(**WORLD)
    matchers: dict[str, Matcher] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(world.tables, Path(folder) / "data")
        possible(world, data)
        for loss, name, count, seed in product(options.loss, options.models, options.interests, options.seeds):
            key = f"{loss} {name} {count} {options.horizon} {seed}"
            if key not in results or options.curve:
                results[key], matchers[key] = run(name, count, seed, loss, options.horizon, world, data)
                file.write_text(json.dumps(results, indent=1))
        sys.stdout.write("\n" + lines(results))
        if options.curve:
            curve([m for k, m in matchers.items() if k.rpartition(" ")[0] == key.rpartition(" ")[0]], data, options.out)


if __name__ == "__main__":
    main()
