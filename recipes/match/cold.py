"""Items that nobody has taken yet: MovieLens-1M with 905 films held out of training, found by their content.

Run:      python recipes/match/cold.py FOLDER_OF_ML_1M_COLD MOVIES_DAT [--vectors both pmgt both+pmgt] [--bf16]
          python recipes/match/cold.py FOLDER_OF_ML_1M_COLD MOVIES_DAT --links
Hardware: 1 CPU core, 2 GB; a minute of processor time for each kind of vectors, two to learn PMGT
Expected: --bf16 --vectors both words words+both both+pmgt words+both+pmgt, seed 0, Recall@20. Chosen by both halves of
          the people: words+both at .97, cold among cold .2975 ± .0052, NDCG@20 .3117, cold among all .1257 ± .0033,
          warm among all .2531 ± .0049; 28 % of the lists are films that nobody took yet. Seed 1:
          words+both+pmgt at .97, .3007, .1263 and .2544
          both: cold among cold .2725 ± .0052; PMGT's vectors beside it (both+pmgt) .2881 ± .0051, which is +.0156
          [+.0136, +.0176]; in its place (pmgt) .2514 ± .0051, −.0211 [−.0233, −.0190]
          words, float32, scale 1: .2725 ± .0051; .1191 ± .0033 and .2440 ± .0045
          --links: 803 films with 8,282 links; link AUC of held-out films .8165, by their words alone .7515

The split is strict: the held-out films are in no training pair, count or vocabulary. Another fifth of each user's
training pairs is held out to measure films that training did see. Content: genres, director, cast, year and rating.
Three questions, all with the films of a user's training left out: cold targets among cold films; cold and warm targets
among all films; Recall@20 with min(targets, 20) below the line, NDCG@20; means over users with a 95 % interval. `scale`
makes vectors of new films longer or shorter; the longest that leaves films known to training a Recall@20 of .25 is
found without a look at who took the new ones. So the row "chosen" has the vectors that are best on 302 other new films,
each at its longest scale there, and the longest scale here; what suits one half of the people is measured on the other.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.core.nn.content import content_tables
from funnelrec.core.schema import Category, Field, Schema, Text
from funnelrec.data.batches import Batches
from funnelrec.data.examples import NextItem
from funnelrec.data.split import Given
from funnelrec.data.tables import Tables
from funnelrec.encode.item.content import ContentEncoder
from funnelrec.encode.item.graph import ItemGraph
from funnelrec.encode.item.neighbourhoods import Neighbourhoods
from funnelrec.encode.item.pmgt import PMGT
from funnelrec.evaluate.metrics import auc
from funnelrec.evaluate.significance import bootstrap_interval, paired_test
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import FullSoftmax, Terms
from funnelrec.learn.schedules import Cosine
from funnelrec.match.comirec_sa import ComiRecSA

K = 20
SCALES = (0.94, 0.95, 0.96, 0.97, 0.98, 1.0, 1.05, 1.1, 1.15, 1.2)
FLOOR = 0.25  #: Recall@20 that films known to training have to keep


def films(folder: Path, movies: Path) -> pl.DataFrame:
    """item, genres, director, cast, year and rating as lists of words, and the plot."""
    known = pl.read_csv(folder / "item_df.csv.gz")
    lines = movies.read_text(encoding="latin-1").splitlines()
    number = {title: id for id, title, _ in (line.split("::") for line in lines)}
    with gzip.open(folder / "movies_extrainfos.dat.gz", "rt", encoding="latin-1") as file:
        told = {parts[0]: parts for line in file if len(parts := line.rstrip("\n").split("::")) >= 10}
    rows = []
    for iid, title, genres in known.iter_rows():
        parts = told.get(number.get(title, ""), [""] * 10)
        rows.append(
            {
                "item": iid,
                "genres": genres.split("|"),
                "director": _names(parts[6]),
                "cast": _names(parts[8]),
                "year": [title[-5:-1], f"{title[-5:-2]}x"],
                "rating": _names(parts[3]),
                "plot": parts[9],
            }
        )
    return pl.DataFrame(rows)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


FIELDS = tuple(Category(name, many=True) for name in ("genres", "director", "cast", "year", "rating"))


def pairs(folder: Path, name: str) -> pl.DataFrame:
    """user, item."""
    return pl.read_csv(folder / f"{name}_df.csv.gz").rename({"uid": "user", "iid": "item"})


def dataset(folder: Path, catalogue: pl.DataFrame, seed: int, to: Path) -> tuple[Dataset, pl.DataFrame]:
    """Four fifths of the training pairs in a drawn order, and the pairs held out."""
    train = pairs(folder, "train").sample(fraction=1.0, shuffle=True, seed=seed)
    held = (pl.int_range(pl.len()).over("user") % 5) == 0
    kept, warm = train.filter(~held), train.filter(held)
    schema = Schema(user="user", item="item", items=(*FIELDS, Text("plot")))
    tables = Tables(kept, schema, items=catalogue, part=np.zeros(len(kept), dtype=np.uint8))
    return Dataset.build(tables, to, split=Given(tables.part)), warm


def targets(data: Dataset, events: pl.DataFrame) -> tuple[Tensor, Tensor]:
    """Rows of users and items of the pairs of known users."""
    users = torch.tensor(data.user_vocabulary.encode(events["user"]), dtype=torch.int64)
    items = torch.tensor(data.item_vocabulary.encode(events["item"]), dtype=torch.int64)
    return users, items


def rank(scores: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Recall@20 and NDCG@20 of each user, NaN for one without a target; scores and truth [U, N]."""
    found = truth.gather(1, scores.topk(K, dim=1).indices).double()  # (U, K)
    wanted = truth.sum(1).clamp(max=K)
    gain = 1 / torch.log2(torch.arange(2, K + 2, dtype=torch.float64))
    ideal = gain.cumsum(0)[(wanted - 1).clamp(min=0)]
    figures = found.sum(1) / wanted, (found * gain).sum(1) / ideal
    recall, ndcg = (x.masked_fill(wanted == 0, torch.nan).numpy() for x in figures)
    return recall, ndcg


def learn(data: Dataset, vectors: Tensor, seed: int, epochs: int, *, bf16: bool = False) -> ComiRecSA:
    """One vector a user: attention over a bag of films, whose table is also that of the films that are scored."""
    spec = replace(data.spec, content_dim=vectors.shape[1])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ComiRecSA(spec, embedding_dim=64, num_interests=1, max_len=100)
    warm = torch.from_numpy(data.train_item_counts > 0)
    for table in content_tables(model):
        table.set_content(vectors, warm)
    model.items.dense = True
    batches = Batches(NextItem(data, "train", max_len=100, mode="cut"), 256, shuffle=True, seed=seed)
    loss = FullSoftmax(classes=warm.nonzero().squeeze(1))
    schedule = Cosine(len(batches) * epochs, warmup=len(batches) * 2)
    progress = sys.stderr.isatty()
    fit(model, batches, loss, epochs=epochs, lr=3e-3, schedule=schedule, seed=seed, bf16=bf16, progress=progress)
    return model.eval()


@torch.no_grad()
def users_of(model: ComiRecSA, data: Dataset) -> Tensor:
    """The vector of each user row, from 100 of the training films."""
    rows = torch.arange(data.spec.num_users)
    now = torch.full_like(rows, torch.iinfo(torch.int64).max)
    history, _, mask = data.histories.before(rows, now, model.max_len)
    return model.encode_users(Batch(user=rows, history=history, mask=mask))[0][:, 0]


Figures = dict[str, tuple[np.ndarray, np.ndarray]]  #: recall and NDCG of each user, NaN without a target
QUESTIONS = (("cold among cold", "cold"), ("cold among all", "cold"), ("warm among all", "warm"))


def table(model: ComiRecSA, data: Dataset, parts: dict[str, pl.DataFrame], scale: float) -> tuple[Figures, float]:
    """The figures of each question, and the share of the lists that is films nobody took yet."""
    shape = (data.spec.num_users, data.spec.num_items)
    warm = torch.from_numpy(data.train_item_counts > 0)
    for own in content_tables(model):
        own.scale.fill_(scale)
    users, items = users_of(model, data), model.encode_items(torch.arange(shape[1])).detach()
    scores = users @ items.T
    seen_users, seen_items, _ = data.taken("train")
    scores[seen_users, seen_items] = -torch.inf
    scores[:, :2] = -torch.inf
    truth = {name: torch.zeros(shape, dtype=torch.bool) for name in parts}
    for name, events in parts.items():
        truth[name][targets(data, events)] = True
    cold_items = torch.zeros(shape[1], dtype=torch.bool)
    cold_items[truth["cold"].any(0)] = True
    everything = scores.masked_fill(~(warm | cold_items), -torch.inf)
    given = {"cold among cold": scores.masked_fill(~cold_items, -torch.inf)}
    result = {name: rank(given.get(name, everything), truth[which]) for name, which in QUESTIONS}
    return result, float(cold_items[everything.topk(K, dim=1).indices].double().mean())


def words(data: Dataset, seed: int) -> Tensor:
    """Content [N, 256] from genres, director, cast, year and rating."""
    return _encoder(data, FIELDS, 256).encode(data.catalogue)


def _encoder(data: Dataset, fields: Sequence[Field], dim: int) -> ContentEncoder:
    known = torch.from_numpy(data.train_item_counts > 0).nonzero().squeeze(1)
    return ContentEncoder.learn(data.catalogue[known.numpy()], fields, dim=dim)


def both(data: Dataset, seed: int) -> Tensor:
    """64 numbers of the words and 64 of the plot side by side: what PMGT is given."""
    parts = [_encoder(data, fields, 64).encode(data.catalogue) for fields in (FIELDS, (Text("plot"),))]
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Setting:
    """How PMGT is trained; the defaults are for `links`, FOR_NEW_FILMS was better on the validation films."""

    min_cosine: float = 0.3
    alone: float = 0.3
    temperature: float = 0.2
    dropout: float = 0.1
    weight_decay: float = 0.0
    steps: int = 1500
    warmup: int = 100


FOR_NEW_FILMS = Setting(0.2, alone=0.6, temperature=0.1, dropout=0.2, weight_decay=0.1, steps=800, warmup=80)


def item_graph(data: Dataset, min_cosine: float) -> ItemGraph:
    """Training films that the same people took."""
    users, items = (torch.tensor(x, dtype=torch.int64) for x in data.taken("train")[:2])
    return ItemGraph.from_interactions(users, items, data.spec.num_items, min_count=3, min_cosine=min_cosine)


def pmgt(data: Dataset, seed: int) -> Tensor:
    """Vectors [N, 64] that PMGT makes of `both` when no film has a neighbour: a new film has none, and a recommender
    that has only met films amid their neighbours does not know what to make of it."""
    graph = item_graph(data, FOR_NEW_FILMS.min_cosine)
    model, items = learn_graph(graph, both(data, seed), seed, FOR_NEW_FILMS)
    films = torch.arange(graph.num_items)
    return model.item_vectors(replace(items, graph=graph.without(films)), films, draws=1)


def learn_graph(graph: ItemGraph, features: Tensor, seed: int, how: Setting) -> tuple[PMGT, Neighbourhoods]:
    """PMGT trained on the films of a graph, of two modalities of 64 numbers."""
    present = torch.stack([part.any(1) for part in torch.split(features, 64, dim=1)], 1)
    known = (graph.degree > 0).nonzero().squeeze(1)
    items = Neighbourhoods(graph, features, present, known, alone=how.alone)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PMGT(feature_dims=(64, 64), embedding_dim=64, temperature=how.temperature, dropout=how.dropout)
    batches = Batches(items, 256, shuffle=True, seed=seed)
    epochs = how.steps // len(batches)
    schedule, decay = Cosine(len(batches) * epochs, warmup=how.warmup), how.weight_decay
    fit(
        model, batches, Terms(), epochs=epochs, lr=2e-3, weight_decay=decay, schedule=schedule, seed=seed,
        progress=False,
    )  # fmt: skip
    return model, items


def links(data: Dataset, seed: int) -> None:
    """How well PMGT finds links of a tenth of the films, whose links it was not shown."""
    how = Setting()
    graph, features = item_graph(data, how.min_cosine), both(data, seed)
    nodes = (graph.degree > 0).nonzero().squeeze(1)
    held = nodes[torch.randperm(len(nodes), generator=torch.Generator().manual_seed(seed))[: len(nodes) // 10]]
    model, items = learn_graph(graph.without(held), features, seed, how)
    shown = model.item_vectors(items, torch.arange(graph.num_items))
    area, plain = (link_auc(x, graph, held, seed) for x in (shown, normalize(features, dim=1)))
    count = len(graph.neighbours) // 2
    write(f"{len(nodes)} films, {count} links; link AUC of held films {area:.4f}, by words {plain:.4f}")


def link_auc(vectors: Tensor, graph: ItemGraph, held: Tensor, seed: int) -> float:
    """Of the links of `held` items against pairs of the same item with a stranger of the same degree."""
    generator = torch.Generator().manual_seed(seed)
    mine = torch.isin(graph.rows, held) & ~torch.isin(graph.neighbours, held)
    item, other = graph.rows[mine], graph.neighbours[mine]
    by_degree = graph.degree.argsort(stable=True)
    by_degree = by_degree[(graph.degree[by_degree] > 0) & ~torch.isin(by_degree, held)]
    place = torch.empty(graph.num_items, dtype=torch.int64)
    place[by_degree] = torch.arange(len(by_degree))
    linked = torch.zeros(graph.num_items, graph.num_items, dtype=torch.bool)
    linked[graph.rows, graph.neighbours] = True
    offset = torch.randint(1, 16, (len(item),), generator=generator) * (
        torch.randint(2, (len(item),), generator=generator) * 2 - 1
    )
    stranger = by_degree[(place[other] + offset).clamp(0, len(by_degree) - 1)]
    fair = ~linked[item, stranger] & (stranger != item)
    scores = torch.cat([(vectors[item[fair]] * vectors[x[fair]]).sum(1) for x in (other, stranger)])
    labels = np.repeat([1.0, 0.0], int(fair.sum()))
    return auc(labels, scores.double().numpy())


def cell(recall: np.ndarray, ndcg: np.ndarray) -> str:
    """Means over the users who have a target, recall with its interval."""
    recall = recall[~np.isnan(recall)]
    return f"{recall.mean():.4f} ± {bootstrap_interval(recall).half:.4f}, {np.nanmean(ndcg):.4f}"


Results = dict[tuple[str, float], Figures]  #: by kind of vectors and scale


def choice(valid: Results, test: Results, people: np.ndarray) -> tuple[str, float]:
    """The vectors and the scale for a shop whose new films are those of the test part, by what it knows of `people`.

    The scale is the longest at which known films keep FLOOR amid the new ones. The vectors are those that find most new
    films of the validation part, each at the scale that is the longest there.
    """

    def recall(of: Figures, question: str) -> float:
        return float(np.nanmean(of[question][0][people]))

    def longest(results: Results) -> dict[str, float]:
        return {
            kind: scale for kind, scale in sorted(results) if recall(results[kind, scale], "warm among all") >= FLOOR
        }

    scales, at = longest(valid), longest(test)
    fair = [kind for kind in at if kind in scales]
    if not fair:
        raise ValueError(f"no vectors at any scale leave {FLOOR} of the known films; begin with a smaller scale")
    kind = max(fair, key=lambda kind: recall(valid[kind, scales[kind]], "cold among all"))
    return kind, at[kind]


def chosen(valid: Results, test: Results) -> None:
    """The figures of the test part, each half of the people with the vectors and the scale that suit the other half.

    Nothing is chosen by what is measured: not by who took the new films, and not by the known films of the same people.
    """
    users = len(next(iter(test.values()))["warm among all"][0])
    even = np.arange(users) % 2 == 0
    keys = choice(valid, test, even), choice(valid, test, ~even)
    cells = []
    for question, _ in QUESTIONS:
        of_odd, of_even = (test[key][question] for key in keys)
        cells.append(cell(*(np.where(even, b, a) for a, b in zip(of_odd, of_even, strict=True))))
    names = " and ".join(f"{kind} at {scale:g}" for kind, scale in keys)
    write(f"| chosen: {names} | test | | {' | '.join(cells)} |")


VECTORS = {"words": words, "both": both, "pmgt": pmgt}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="train_df.csv.gz, cold_vali_df.csv.gz, cold_test_df.csv.gz, …")
    parser.add_argument("movies", type=Path, help="movies.dat of MovieLens-1M")
    parser.add_argument("--vectors", nargs="+", default=["both"], help="words, both, pmgt; both+pmgt: side by side")
    parser.add_argument("--links", action="store_true", help="only what PMGT finds of links it was not shown")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster where the processor has it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    catalogue = films(options.folder, options.movies)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            data, warm = dataset(options.folder, catalogue, seed, Path(folder) / "data")
            if options.links:
                links(data, seed)
                continue
            made = {
                name: VECTORS[name](data, seed) for name in {n for kind in options.vectors for n in kind.split("+")}
            }
            valid = {"cold": pairs(options.folder, "cold_vali"), "warm": warm}
            test = {"cold": pairs(options.folder, "cold_test"), "warm": warm}
            results: dict[str, Results] = {"validation": {}, "test": {}}
            for kind in options.vectors:
                parts = [made[name] for name in kind.split("+")]
                content = torch.cat([normalize(x, dim=1) for x in parts], 1) if len(parts) > 1 else parts[0]
                model = learn(data, content, seed, options.epochs, bf16=options.bf16)
                for name, events in (("validation", valid), ("test", test)):
                    for scale in SCALES:
                        figures, share = table(model, data, events, scale)
                        results[name][kind, scale] = figures
                        cells = " | ".join(cell(*found) for found in figures.values())
                        write(f"| {kind} | {seed} | {name} | {scale:g} | {cells} | {share:.3f} |")
            chosen(results["validation"], results["test"])
            for kind in options.vectors[1:]:
                mine, other = (results["test"][k, 1.0]["cold among cold"][0] for k in (kind, options.vectors[0]))
                real = ~np.isnan(mine)
                test_of = paired_test(mine[real], other[real])
                low, high = test_of.interval.low, test_of.interval.high
                write(
                    f"cold among cold, Recall@{K} of {kind} above {options.vectors[0]}: {test_of.difference:+.4f} "
                    f"[{low:+.4f}, {high:+.4f}], p = {test_of.p_randomisation:.4f}"
                )


def write(line: str) -> None:
    """One line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
