"""New items of the simulated world: found by their titles, by their pictures, by both, beside the truth and chance.

Run:      python recipes/match/cold_world.py [--users 2000] [--items 1500] [--seeds 0]
Hardware: 1 CPU core, 1 GB; 35 seconds of processor time
Expected: seed 0: Recall@20 by titles .4480 ± .0222, by pictures .4438 ± .0227, by both .4634 ± .0229; the oracle .7410
          ± .0196, chance .0640 ± .0111; both above titles +.0154 [−.0097, +.0404], above pictures +.0195
          [−.0057, +.0447]. seed 1: .4353, .4602, .4477; .7526 and .0701

A fifth of the items is held out: no event of theirs is in training. The questions are their clicks in the last fifth of
the days, each user's history is what they clicked before; Recall@20 among the held-out items, below the line
min(clicks, 20), mean over users with a 95 % interval. What somebody was shown before the last fifth is left out for
all. Titles are words weighed by rarity (encode/item/content.py); pictures are what a LeNet says that was taught the
style of the items of training; the oracle knows what everybody wants (World.expected_clicks).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.core.nn.content import content_tables
from funnelrec.core.schema import Schema, Text
from funnelrec.data.batches import Batches
from funnelrec.data.examples import NextItem
from funnelrec.data.images import ImageExamples, Images
from funnelrec.data.sources.simulate import World
from funnelrec.data.split import Given
from funnelrec.data.tables import Tables
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.encode.image.lenet import LeNet
from funnelrec.encode.item.content import ContentEncoder
from funnelrec.evaluate.significance import bootstrap_interval, paired_test
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy, FullSoftmax
from funnelrec.learn.schedules import Cosine
from funnelrec.match.comirec_sa import ComiRecSA

K = 20
HISTORY = 50


def titles(items: pl.DataFrame, warm: np.ndarray) -> Tensor:
    """Content [items, 64] of the titles."""
    return ContentEncoder.learn(items.filter(pl.Series(warm)), (Text("title"),), dim=64).encode(items)


def pictures(world: World, warm: np.ndarray, seed: int, epochs: int) -> Tensor:
    """What a network sees [items, 84] that was taught to tell the styles of the items of training apart."""
    items = world.tables.items
    assert items is not None
    pixels = torch.from_numpy(world.pictures(items["item"].to_numpy())).permute(0, 3, 1, 2).contiguous()
    styles = items["style"].cast(pl.Categorical).to_physical().to_numpy().astype(np.int64)
    images = Images(pixels, torch.from_numpy(styles), tuple(str(n) for n in range(int(styles.max()) + 1)))
    rows = torch.from_numpy(np.flatnonzero(warm))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LeNet(in_channels=3, num_classes=len(images.classes), width=2)
        model = Classifier(network, *pixel_statistics(pixels[rows]))
    batches = Batches(ImageExamples(images, rows), 64, shuffle=True, seed=seed)
    schedule = Cosine(len(batches) * epochs, warmup=len(batches))
    fit(model, batches, CrossEntropy(), epochs=epochs, lr=2e-3, schedule=schedule, seed=seed, progress=False)
    with torch.no_grad():
        return model.eval().encode(pixels)


def recommender(data: Dataset, content: Tensor, seed: int, epochs: int) -> ComiRecSA:
    """Two interests a user, over items that are their own vector and what their content says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ComiRecSA(replace(data.spec, content_dim=content.shape[1]), num_interests=2, max_len=HISTORY)
    warm = torch.from_numpy(data.train_item_counts > 0)
    for table in content_tables(model):
        table.set_content(content, warm)
    model.items.dense = True
    batches = Batches(NextItem(data, "train", max_len=HISTORY, mode="cut"), 128, shuffle=True, seed=seed)
    schedule = Cosine(len(batches) * epochs, warmup=len(batches))
    loss = FullSoftmax(classes=warm.nonzero().squeeze(1))
    fit(model, batches, loss, epochs=epochs, lr=3e-3, schedule=schedule, seed=seed, progress=False)
    return model.eval()


@torch.no_grad()
def scores_of(model: ComiRecSA, data: Dataset, users: Tensor) -> Tensor:
    """Of every item for user rows, the better of both interests."""
    now = torch.full_like(users, torch.iinfo(torch.int64).max)
    history, _, mask = data.histories.before(users, now, HISTORY)
    interests, valid = model.encode_users(Batch(user=users, history=history, mask=mask))
    each = interests @ model.encode_items(torch.arange(data.spec.num_items)).T
    return each.masked_fill(~valid.unsqueeze(2), -torch.inf).amax(1)


def recall(scores: np.ndarray, truth: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Recall@20 of each user; all three are [users, held-out items], `free` where an item may be recommended."""
    top = np.argsort(-np.where(free, scores, -np.inf), axis=1, kind="stable")[:, :K]
    return np.take_along_axis(truth & free, top, 1).sum(1) / np.minimum((truth & free).sum(1), K)


def measure(users: int, items: int, seed: int, epochs: int, picture_epochs: int) -> dict[str, np.ndarray]:
    """Recall@20 of new items by kind of content, with the oracle's and that of chance."""
    world = World.build(seed=seed, users=users, items=items)
    catalogue = world.tables.items
    assert catalogue is not None
    rng = np.random.default_rng(seed)
    cold = np.sort(rng.permutation(items)[: items // 5]) + 1
    warm = ~np.isin(catalogue["item"].to_numpy(), cold)
    events = world.tables.events
    start, end = int(events["time"].min()), int(events["time"].max())  # type: ignore[arg-type]
    cut = start + (end - start) * 4 // 5
    new = pl.col("item").is_in(cold.tolist())
    train = events.filter((pl.col("click") == 1) & ~new & (pl.col("time") < cut)).select("user", "item", "time")
    schema = Schema(user="user", item="item", time="time", items=(Text("title"),))
    tables = Tables(train, schema, items=catalogue.select("item", "title"), part=np.zeros(len(train), dtype=np.uint8))

    known = np.sort(train["user"].unique().to_numpy())
    shape = (int(known.max()) + 1, items + 1)
    truth, free = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    asked = events.filter(new & (pl.col("click") == 1) & (pl.col("time") >= cut) & pl.col("user").is_in(known.tolist()))
    shown = events.filter(new & (pl.col("time") < cut) & pl.col("user").is_in(known.tolist()))
    truth[asked["user"].to_numpy(), asked["item"].to_numpy()] = True
    free[shown["user"].to_numpy(), shown["item"].to_numpy()] = False
    who = known[(truth & free)[known].any(1)]
    truth, free = truth[np.ix_(who, cold)], free[np.ix_(who, cold)]

    chance = rng.random(truth.shape)
    oracle = world.expected_clicks(who, np.full(len(who), (cut + end) // 2))[:, cold - 1]
    found = {"chance": recall(chance, truth, free)}
    by_title, by_picture = titles(catalogue, warm), pictures(world, warm, seed, picture_epochs)
    kinds = {
        "titles": by_title,
        "pictures": by_picture,
        "both": torch.cat([normalize(by_title, dim=1), normalize(by_picture, dim=1)], 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(tables, Path(folder) / "data", split=Given(tables.part))
        rows = torch.tensor(data.item_vocabulary.encode(catalogue["item"]), dtype=torch.int64)
        asking = torch.tensor(data.user_vocabulary.encode(pl.Series(who)), dtype=torch.int64)
        for name, vectors in kinds.items():
            content = torch.zeros(data.spec.num_items, vectors.shape[1])
            content[rows] = vectors
            content[:2] = 0.0
            scores = scores_of(recommender(data, content, seed, epochs), data, asking)
            found[name] = recall(scores[:, rows[cold - 1]].numpy(), truth, free)
    return {**found, "oracle": recall(oracle, truth, free)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture-epochs", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.stdout.write("| seed | content | Recall@20 of new items | share of the oracle's |\n|---:|---|---:|---:|\n")
    for seed in options.seeds:
        found = measure(options.users, options.items, seed, options.epochs, options.picture_epochs)
        best = float(found["oracle"].mean())
        for name, values in found.items():
            mean, half = values.mean(), bootstrap_interval(values).half
            sys.stdout.write(f"| {seed} | {name} | {mean:.4f} ± {half:.4f} | {mean / best:.2f} |\n")
        for alone in ("titles", "pictures"):
            apart = paired_test(found["both"], found[alone])
            low, high = apart.interval.low, apart.interval.high
            sys.stdout.write(f"both above {alone}: {apart.difference:+.4f} [{low:+.4f}, {high:+.4f}]\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
