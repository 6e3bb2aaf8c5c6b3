"""MM-Rec: titles and pictures against either alone, where both are needed, and on news.

Run:      python recipes/rank/mm_rec.py digits FOLDER_OF_MNIST [--seed 0]
          python recipes/rank/mm_rec.py mind FOLDER_OF_MIND [--seed 0]
          python recipes/rank/mm_rec.py posters FOLDER_OF_POSTERS --films FOLDER_OF_ML_1M [--seed 0]
Hardware: 1 CPU core, 2 GB; mind 1 minute of processor time, posters of that size 1.5, digits 40
Expected: mind, seed 0: AUC .512 ± .030, MRR .244, nDCG@5 .252, @10 .304 by MM-Rec; .510, .239, .253, .311 by the mean
          of words; .525, .201, .199, .244 by clicks so far. Three thousand clicks teach no words: neither network is
          better than chance in AUC, and their difference is +.0014 [−.0279, +.0298]
          digits, seed 0: AUC .9599 by titles and pictures, .5110 by titles alone, .5046 by pictures alone
          posters, seed 0, --lists 15000 --epochs 2: AUC T+V .7126 ± .0093, T .7090 ± .0096, V .5324 ± .0088; T+V
          above T +.0036 [−.0010, +.0082], above V +.1802 [+.1688, +.1916]

digits: an item has a title, a digit's word among others, and a picture, a handwritten digit; the two have nothing to do
        with one another. Everybody likes one digit. What they took says it in its title, what they are shown says it in
        its picture. Pictures of the test lists were never seen in training; regions are the 16 squares of a picture.
mind:   4,032 impressions of MSN news with titles (data/sources/mind.py), the newest tenth is the test part. MM-Rec
        without pictures beside the same with the mean of the words' vectors, and beside how often a piece of news was
        clicked in training. Means over impressions of AUC, MRR, nDCG@5 and @10, 95 % intervals over impressions.
posters: 836 films of MovieLens-1M with the poster (FILM.jpg), title and plot (omdb_metadata.jsonl.gz). A list is a film
        that somebody rated 4 or 5 and four that they never rated, drawn as often as others took them in that part of
        the log; the history is the 20 such films of theirs before that moment. The newest fifth of the log is the test
        part. Regions are the 16 squares of the poster, 64 numbers each. Mean over users of their lists' AUC.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.core.schema import CategorySpec, Spec
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.histories import Histories
from funnelrec.data.images import actions, decode
from funnelrec.data.lists import ImpressionLists, impressions_of
from funnelrec.data.sources import mind, movielens
from funnelrec.data.sources.images import mnist
from funnelrec.encode.text.tokens import Tokens
from funnelrec.evaluate.impressions import impression_metrics
from funnelrec.evaluate.metrics import auc
from funnelrec.evaluate.significance import bootstrap_interval, paired_test
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import ListSoftmax
from funnelrec.learn.schedules import Cosine
from funnelrec.rank.mm_rec import MMRec

NEGATIVES, HISTORY = 4, 5
EPOCHS = 6
WORDS, TITLE = 40, 4  # words of the made-up titles: rows 1..10 are digits, the others say nothing


@dataclass(frozen=True)
class Digits:
    """Lists drawn from items first..last: one that shows the liked digit, four that show others."""

    told: Tensor  #: digit of each item's title
    shown: Tensor  #: digit of each item's picture
    first: int
    last: int
    size: int

    def __len__(self) -> int:
        return self.size

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        count = len(index)
        taste = torch.randint(10, (count,), generator=generator)
        other = (taste[:, None] + torch.randint(1, 10, (count, NEGATIVES), generator=generator)) % 10
        wanted = torch.cat([taste[:, None], other], 1)  # (B, 5) what each candidate's picture shows
        item = self._one(self.shown, wanted, generator).flatten()
        history = self._one(self.told, taste[:, None].expand(-1, HISTORY), generator)
        history = history.repeat_interleave(1 + NEGATIVES, 0)
        label = (torch.arange(len(item)) % (1 + NEGATIVES) == 0).float()
        return Batch(item=item, history=history, mask=history > 0, label=label)

    def _one(self, kind: Tensor, wanted: Tensor, generator: torch.Generator | None) -> Tensor:
        """An item for each wanted digit."""
        own = kind[self.first : self.last]
        order = own.argsort(stable=True)
        many = torch.bincount(own, minlength=10)
        start = many.cumsum(0) - many
        u = torch.rand(wanted.shape, generator=generator)
        return self.first + order[start[wanted] + (u * many[wanted]).long()]


def digits(folder: Path, seed: int) -> None:
    """The crossed task, with both, with titles alone, with pictures alone."""
    images = mnist(folder)
    images = images.select(images.rows(2))  # the 10,000 test pictures of MNIST are enough
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    pixels, shown = images.pixels[order, 0].float() / 255, images.labels[order].long()
    told = torch.randint(10, (len(pixels),), generator=generator)
    words = torch.randint(11, WORDS, (len(pixels), TITLE), generator=generator)
    words.scatter_(1, torch.randint(TITLE, (len(pixels), 1), generator=generator), 1 + told[:, None])
    squares = pixels.view(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(len(pixels), 16, 49)  # (N, 16, 49)
    corner = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(16, 2) / 4
    places = torch.cat([corner, corner + 0.25, torch.full((16, 1), 1 / 16)], 1).expand(len(pixels), -1, -1)
    item = CategorySpec("item", "item", len(pixels), 1, 0, 1)
    spec = Spec(categories=(item,), num_items=len(pixels))
    train, test = Digits(told, shown, 2, 7000, 40_000), Digits(told, shown, 7000, len(pixels), 4000)
    sys.stdout.write("| model | AUC of lists with new pictures | minutes |\n|---|---:|---:|\n")
    for name, title, picture in (("titles and pictures", 1, 1), ("titles alone", 1, 0), ("pictures alone", 0, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MMRec(
                spec, num_tokens=WORDS, title_len=TITLE, num_regions=16, region_dim=49, num_layers=2, dropout=0.0
            )
        real = torch.ones(squares.shape[:2], dtype=torch.bool)
        model.set_content((words * title + 1 - title).int(), squares * picture, places, real)
        batches = Batches(train, 64, shuffle=True, seed=seed)
        schedule = Cosine(len(batches) * EPOCHS, warmup=300)
        result = fit(model, batches, ListSoftmax(NEGATIVES), epochs=EPOCHS, lr=1e-3, schedule=schedule, progress=False)
        model.eval()
        model.prepare()
        batch = test.gather(torch.arange(len(test)), torch.Generator().manual_seed(1))
        with torch.no_grad():
            area = auc(batch.label.double().numpy(), model(batch).double().numpy())
        sys.stdout.write(f"| {name} | {area:.4f} | {result.seconds / 60:.1f} |\n")
        sys.stdout.flush()


@dataclass(frozen=True)
class Tastes:
    """Lists of a liked film and four that others liked at that time and this user never rated."""

    users: Tensor  #: of each example
    items: Tensor
    times: Tensor
    histories: Histories
    rated: Tensor  #: (users, items)

    def __len__(self) -> int:
        return len(self.users)

    def newest(self, count: int) -> Tastes:
        """The last lists alone."""
        return replace(self, users=self.users[-count:], items=self.items[-count:], times=self.times[-count:])

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        user, time = self.users[index], self.times[index]
        drawn = self.items[torch.randint(len(self.items), (len(index), 6 * NEGATIVES), generator=generator)]
        free = self.rated[user[:, None], drawn].int().argsort(dim=1, stable=True)[:, :NEGATIVES]
        item = torch.cat([self.items[index][:, None], drawn.gather(1, free)], 1).flatten()
        history, _, mask = self.histories.before(user, time, 20)
        history, mask = (x.repeat_interleave(1 + NEGATIVES, 0) for x in (history, mask))
        label = (torch.arange(len(item)) % (1 + NEGATIVES) == 0).float()
        return Batch(item=item, history=history, mask=mask, label=label)


def posters(folder: Path, films: Path, seed: int, epochs: int, lists: int | None) -> None:
    """Films by title and plot, by poster, by both."""
    titles, squares, places, (train, test) = _films(folder, films)
    train = train.newest(lists or len(train))
    spec = Spec(categories=(CategorySpec("item", "item", len(titles), 1, 0, 1),), num_items=len(titles))
    nothing = torch.ones(len(titles), 1, dtype=torch.int32)
    found: dict[str, np.ndarray] = {}
    sys.stdout.write(f"{len(titles) - 2} films, {len(train)} lists of training, {len(test)} of the test part\n")
    sys.stdout.write("| model | AUC, mean over users | minutes |\n|---|---:|---:|\n")
    for name, words, looks in (("T+V", titles, True), ("T", titles, False), ("V", nothing, True)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            seen = {"num_regions": 16, "region_dim": squares.shape[2]} if looks else {}
            model = MMRec(spec, num_tokens=int(words.max()) + 1, title_len=words.shape[1], dropout=0.2, **seen)
        model.set_content(words, squares if looks else None, places if looks else None)
        if name == "T+V":
            start_quietly(model)
        batches = Batches(train, 256, shuffle=True, seed=seed)
        schedule = Cosine(len(batches) * epochs, warmup=len(batches) * epochs // 10)
        result = fit(
            model,
            batches,
            ListSoftmax(NEGATIVES),
            epochs=epochs,
            lr=2e-3,
            schedule=schedule,
            seed=seed,
            progress=False,
        )
        model.prepare()
        generator = torch.Generator().manual_seed(1)  # every model sees the same lists
        parts = [test.gather(part, generator) for part in torch.split(torch.arange(len(test)), 2000)]
        with torch.no_grad():
            scores = torch.cat([model(part) for part in parts]).view(-1, 1 + NEGATIVES)
        right = (scores[:, :1] > scores[:, 1:]).double() + 0.5 * (scores[:, :1] == scores[:, 1:]).double()
        user, whose = test.users.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        mean = torch.zeros(len(user), dtype=torch.float64).index_add_(0, whose, right.mean(1)) / torch.bincount(whose)
        found[name] = mean.numpy()
        half = bootstrap_interval(found[name]).half
        sys.stdout.write(f"| {name} | {mean.mean():.4f} ± {half:.4f} | {result.seconds / 60:.1f} |\n")
        sys.stdout.flush()
    for alone in ("T", "V"):
        apart = paired_test(found["T+V"], found[alone])
        low, high = apart.interval.low, apart.interval.high
        sys.stdout.write(f"T+V above {alone}: {apart.difference:+.4f} [{low:+.4f}, {high:+.4f}]\n")


@torch.no_grad()
def start_quietly(model: MMRec) -> None:
    """What pictures add to words and to the user begins at a tenth: words are learnt first, which takes far fewer steps
    than to learn them beneath sixteen squares of noise."""
    quiet = [model.region_pool.project, *(layer.words.attention.out for layer in model.co_layers)]  # type: ignore[union-attr]
    for part in quiet:
        for weight in part.parameters():
            weight.mul_(0.1)


def _films(folder: Path, films: Path) -> tuple[Tensor, Tensor, Tensor, tuple[Tastes, Tastes]]:
    """Words [N, 24], regions [N, 16, 64] and where they are [N, 16, 5] of item rows from 2, and the lists."""
    events = movielens.load(films).events.filter(pl.col("rating") >= 1).sort("time")
    with gzip.open(films / "omdb_metadata.jsonl.gz", "rt", encoding="utf-8") as lines:
        told = {row["movieId"]: f"{row['title'][:-7]} {row.get('Plot', '')}" for row in map(json.loads, lines)}
    files = {int(file.stem): file for file in sorted(folder.glob("*.jpg"))}
    known = sorted(set(files) & set(told) & set(events["item"].unique().to_list()))
    drawn = [decode(files[k].read_bytes(), str(k), size=64, channels=3, told=actions("use"))[0] for k in known]
    pixels = torch.from_numpy(np.stack([np.zeros((3, 64, 64)) if p is None else p for p in drawn])).float() / 255
    squares = pixels.view(-1, 3, 4, 16, 4, 16).permute(0, 2, 4, 1, 3, 5).reshape(len(known), 16, 768)
    flat = squares.flatten(0, 1) - squares.flatten(0, 1).mean(0)
    numbers = flat @ torch.linalg.eigh(flat.T @ flat)[1][:, -64:]  # the directions in which squares differ most
    numbers = (numbers / numbers.std()).view(len(known), 16, 64)
    corner = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(16, 2) / 4
    places = torch.cat([corner, corner + 0.25, torch.full((16, 1), 1 / 16)], 1)
    texts = [told[k] for k in known]
    words = Tokens.learn(texts, kind="words", size=4000, min_count=3).rows(texts, 24)

    above = (2, 0)  # rows 0 and 1 are padding and the unknown
    events = events.with_columns(pl.col("item").replace_strict(known, range(2, len(known) + 2), default=0).alias("row"))
    events = events.filter(pl.col("row") > 0)
    user, row, time = (torch.from_numpy(events[c].cast(pl.Int64).to_numpy().copy()) for c in ("user", "row", "time"))
    rated = torch.zeros(int(user.max()) + 1, len(known) + 2, dtype=torch.bool)
    rated[user, row] = True
    liked = torch.from_numpy((events["rating"] >= 4).to_numpy())
    user, row, time = user[liked], row[liked], time[liked]
    histories = Histories.build(user.numpy(), row.numpy(), time.numpy(), len(rated))
    some = histories.before(user, time, 1)[2][:, 0]  # something was liked before
    place = torch.arange(len(user))
    early = place < int(0.8 * len(user))
    every = [(some & early).nonzero().squeeze(1), (some & ~early).nonzero().squeeze(1)]
    lists = tuple(Tastes(user[own], row[own], time[own], histories, rated) for own in every)
    pad = torch.nn.functional.pad
    return (
        pad(words, (0, 24 - words.shape[1], *above)).int(),
        pad(numbers, (0, 0, 0, 0, *above)),
        pad(places.expand(len(known), -1, -1), (0, 0, 0, 0, *above)),
        (lists[0], lists[1]),
    )


class MeanOfWords(nn.Module):
    """In the place of the pooling: every word of a title counts the same."""

    def forward(self, x: Float[Tensor, "N T D"], mask: Tensor) -> Float[Tensor, "N D"]:
        return (x * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def news(folder: Path, seed: int) -> None:
    """Titles of news: MM-Rec without pictures, the mean of words, popularity."""
    tables = mind.load(
        folder, behaviours=("behaviors.tsv", "behaviors_dev_to_1113.tsv"), news=("news.tsv", "news_titles.tsv")
    )
    with tempfile.TemporaryDirectory() as home:
        data = Dataset.build(tables, Path(home) / "mind")
        titles = [str(t or "") for t in data.catalogue["title"]]
        known = torch.from_numpy(data.train_item_counts > 0).nonzero().squeeze(1)
        tokens = Tokens.learn([titles[i] for i in known.tolist()], kind="words", size=20_000, min_count=2)
        rows = tokens.rows(titles)[:, :16]
        rows = torch.nn.functional.pad(rows, (0, 16 - rows.shape[1])).int()
        test = Impressions(data, "test", max_len=30)
        lists = impressions_of(data, "test").numpy()
        label = np.concatenate([b.label.numpy() for b in Batches(test, 4096).epoch(0)]).astype(np.float64)
        popularity = data.train_item_counts[np.concatenate([b.item.numpy() for b in Batches(test, 4096).epoch(0)])]
        scores = {"clicks so far": popularity.astype(np.float64)}
        for name in ("mean of the words", "MM-Rec, titles"):
            scores[name] = _learn(data, rows, len(tokens), name, seed, test)
    measured = {name: impression_metrics(label, s, lists) for name, s in scores.items()}
    columns = list(next(iter(measured.values())))
    sys.stdout.write(f"| model | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n")
    for name, found in measured.items():
        cells = [f"{v.mean():.4f} ± {bootstrap_interval(v).half:.4f}" for v in found.values()]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    apart = measured["MM-Rec, titles"]["auc"] - measured["mean of the words"]["auc"]
    interval = bootstrap_interval(apart)
    sys.stdout.write(
        f"\nAUC above the mean of the words: {apart.mean():+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]\n"
    )


def _learn(data: Dataset, titles: Tensor, num_tokens: int, name: str, seed: int, test: Impressions) -> np.ndarray:
    """Scores of the test rows."""
    plain = name == "mean of the words"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MMRec(
            data.spec, num_tokens=num_tokens, title_len=16, num_layers=0 if plain else 1, embedding_dim=64, dropout=0.2
        )
        if plain:
            model.word_pool = MeanOfWords()
    model.set_content(titles)
    train = Batches(ImpressionLists(data, "train", negatives=NEGATIVES, max_len=30), 64, shuffle=True, seed=seed)
    valid, group = Impressions(data, "valid", max_len=30), impressions_of(data, "valid").numpy()

    def scored(rows: Impressions) -> tuple[np.ndarray, np.ndarray]:
        model.eval()
        model.prepare()
        with torch.no_grad():
            parts = [(b.label, model(b)) for b in Batches(rows, 2048).epoch(0)]
        model.train()
        return tuple(torch.cat(p).double().numpy() for p in zip(*parts, strict=True))  # type: ignore[return-value]

    def validate() -> dict[str, float]:
        label, logits = scored(valid)
        return {n: float(v.mean()) for n, v in impression_metrics(label, logits, group).items()}

    fit(
        model, train, ListSoftmax(NEGATIVES), epochs=8, lr=1e-3, validate=validate, metric="auc", patience=2, seed=seed,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    return scored(test)[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=("digits", "mind", "posters"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--films", type=Path, help="of posters: ratings, movies.dat and omdb_metadata.jsonl.gz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5, help="of posters")
    parser.add_argument("--lists", type=int, help="of posters: how many to train on, the newest; all by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.task == "posters":
        if options.films is None:
            parser.error("posters needs --films, the folder of MovieLens-1M")
        posters(options.folder, options.films, options.seed, options.epochs, options.lists)
    else:
        (digits if options.task == "digits" else news)(options.folder, options.seed)


if __name__ == "__main__":
    main()
