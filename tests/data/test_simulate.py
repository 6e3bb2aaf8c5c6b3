"""The simulated world: the same every time, true to what it says of itself, and learnable from histories alone."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import polars as pl
import pytest

from funnelrec.data.sources import simulate
from funnelrec.data.sources.simulate import SUBTOPICS, TOPICS, World


@pytest.fixture(scope="module")
def world() -> World:
    return simulate.load(users=600, items=1000, seed=3)


def columns(world: World) -> dict[str, np.ndarray]:
    return {name: world.tables.events[name].to_numpy() for name in world.tables.events.columns}


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """The chance that a positive scores above a negative (no ties here)."""
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = int(label.sum())
    return float((rank[label == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))


def digest(world: World) -> str:
    parts = [world.click_probability.tobytes(), world.pictures(np.arange(1, 51)).tobytes()]
    for table in (world.tables.events, world.tables.users, world.tables.items):
        assert table is not None
        parts.append(table.write_csv().encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    small = {"users": 100, "items": 80}
    state = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    first = digest(simulate.load(seed=1, **small))
    np.random.default_rng().random()
    assert digest(simulate.load(seed=1, **small)) == first
    assert digest(simulate.load(seed=2, **small)) != first
    assert np.random.get_state()[1].tobytes() == state  # type: ignore[union-attr]  # numpy's global stream is left alone


def test_the_tables_fit_the_schema(world: World) -> None:
    events, users, items = world.tables.events, world.tables.users, world.tables.items
    assert users is not None and items is not None
    assert (users.height, items.height) == (600, 1000)
    assert 60_000 < events.height < 90_000
    assert events["time"].is_sorted()
    assert events["user"].is_in(users["user"].to_list()).all()
    assert events["item"].is_in(items["item"].to_list()).all()
    assert events.null_count().sum_horizontal().item() == 0
    assert events.select("user", "item").is_unique().all()  # nothing is shown twice
    days = (events["time"] - simulate.EPOCH) / simulate.DAY
    assert days.min() >= 0.0
    assert 59.0 < days.max() < 60.0
    assert set(events["position"]) == set(range(1, 11))
    assert set(events["device"]) == set(simulate.DEVICES)
    assert set(items["category"]) == set(TOPICS)
    assert items["title"].n_unique() == 1000


def test_watch_time_belongs_to_clicks(world: World) -> None:
    events = world.tables.events.join(world.tables.items.select("item", "minutes"), on="item")  # type: ignore[union-attr]
    clicked = events.filter(pl.col("click") == 1)
    assert (events.filter(pl.col("click") == 0)["watch_seconds"] == 0).all()
    assert (clicked["watch_seconds"] >= 1).all()
    assert (clicked["watch_seconds"] <= 60 * clicked["minutes"]).all()


def test_watch_time_is_drawn_around_its_expectation(world: World) -> None:
    """Sums over tenths of the impressions, by what is expected of them, in standard errors of the sum."""
    watched, expected = columns(world)["watch_seconds"].astype(np.float64), world.expected_watch

    def worst(truth: np.ndarray) -> float:
        tenths = np.array_split(np.argsort(truth), 10)
        z = [(watched[t] - truth[t]).sum() / np.sqrt(((watched[t] - truth[t]) ** 2).sum()) for t in tenths]
        return float(np.abs(z).max())

    assert worst(expected) < 4.0
    assert worst(1.1 * expected) > 5.0  # the planted faults
    assert worst(np.roll(expected, 1)) > 10.0


def test_clicks_are_drawn_with_the_probability_that_the_world_states(world: World) -> None:
    click, p = columns(world)["click"], world.click_probability
    assert len(p) == len(click)

    def worst(probability: np.ndarray) -> float:
        """Largest deviation of the clicks of a tenth of the impressions from their sum, in standard errors."""
        tenths = np.array_split(np.argsort(p), 10)
        z = [(click[t].sum() - probability[t].sum()) / np.sqrt((p[t] * (1 - p[t])).sum()) for t in tenths]
        return float(np.abs(z).max())

    assert worst(p) < 4.0
    assert worst(np.roll(p, 1)) > 10.0  # the planted fault: probabilities of the neighbouring rows
    assert 0.8 < auc(click, p) < 0.9


def test_the_formula_holds_on_every_row(world: World) -> None:
    data = columns(world)
    items, users = world.tables.items, world.tables.users
    assert items is not None and users is not None
    user, item = data["user"] - 1, data["item"] - 1
    subtopic, weight = world.interests.at(user, data["time"])
    match = np.zeros(len(user))
    for slot in range(4):  # spelt out, one interest at a time
        near = np.where(subtopic[:, slot] // 4 == world.item_topic[item], simulate.SIBLING, 0.0)
        near[subtopic[:, slot] == world.item_subtopic[item]] = 1.0
        match = np.maximum(match, near * np.minimum(1.0, (weight[:, slot] / simulate.FULL) ** 0.5))
    minutes = ((np.log(items["minutes"].to_numpy()) - 3.0) / 0.7).clip(-2, 2)[item]
    price = ((np.log(items["price"].to_numpy()) - 2.3) / 0.6).clip(-2, 2)[item]
    device = np.array([simulate.LENGTH_ON_DEVICE[simulate.DEVICES.index(d)] for d in data["device"]])
    plan = np.array([simulate.PRICE_FOR_PLAN[simulate.PLANS.index(p)] for p in users["plan"]])[user]
    known = simulate.BASE + simulate.AFFINITY * match - simulate.POSITION_COST * (data["position"] - 1)
    known = known + device * minutes + plan * price
    quality = np.log(world.click_probability / (1 - world.click_probability)) - known
    first = np.full(1000, np.nan)
    first[item] = quality
    np.testing.assert_allclose(quality, first[item], atol=1e-9)  # what is left is the item's alone
    assert 0.2 < np.nanstd(first) < 0.6


def test_interests_are_distinct_drift_and_sum_to_one(world: World) -> None:
    user = np.arange(600)
    start = world.interests.at(user, np.full(600, simulate.EPOCH))
    end = world.interests.at(user, np.full(600, simulate.EPOCH + 60 * simulate.DAY))
    for subtopic, weight in (start, end):
        np.testing.assert_allclose(weight.sum(axis=1), 1.0)
        topics = np.sort(subtopic // simulate.PER_TOPIC, axis=1)
        assert (np.diff(topics, axis=1) > 0).all()  # never two of one topic
    number = (start[1] > 0).sum(axis=1)
    assert set(number) == {1, 2, 3, 4}
    used = start[1] > 0
    assert 0.1 < (start[0] != end[0])[used].mean() < 0.4
    several = number > 1
    assert np.abs(start[1] - end[1])[several].max(axis=1).mean() > 0.05


def test_expected_clicks_are_those_of_the_policy_and_the_formula(world: World) -> None:
    """The policy and the clicks drawn 300,000 times for one user at one moment, against the closed form."""
    user, moment, n = 17, simulate.EPOCH + 30 * simulate.DAY, 300_000
    shown = {"user": np.full(n, user - 1), "time": np.full(n, moment)}
    shown["position"] = np.random.default_rng(0).integers(1, 9, n)
    device = world._users.device[user - 1]
    others = np.random.default_rng(1).integers(0, 4, n)
    shown["device"] = np.where(np.random.default_rng(2).random(n) < 0.75, device, others)
    item = simulate._policy(shown, world._items, world.interests, seed=9)
    match = simulate._match(world.item_subtopic[item], *world.interests.at(shown["user"], shown["time"]))
    p = 1 / (1 + np.exp(-simulate._logit(match, shown, item, world._items, world._users)))
    p[world._items.released[item] > moment] = 0.0
    drawn = np.bincount(item, weights=p, minlength=1000) / n
    expected = world.expected_clicks(np.array([user]), np.array([moment]))[0]
    assert expected.shape == (1000,)
    assert expected.sum() == pytest.approx(drawn.sum(), rel=0.04)
    assert np.corrcoef(expected, drawn)[0, 1] > 0.99
    other = world.expected_clicks(np.array([user + 1]), np.array([moment]))[0]  # the planted fault: another's interests
    assert np.corrcoef(other, drawn)[0, 1] < 0.8
    with pytest.raises(ValueError, match="this world has users 1 to 600, received 0"):
        world.expected_clicks(np.array([0]), np.array([moment]))


def test_a_session_is_about_one_interest() -> None:
    """The same impressions with and without intent; within a session clicks agree on a topic, as neighbours do."""
    plain, world = simulate.load(users=400, seed=3), simulate.load(users=400, seed=3, session_intent=1.0)
    assert world.tables.events.drop("click", "watch_seconds").equals(plain.tables.events.drop("click", "watch_seconds"))
    assert (world.click_probability <= plain.click_probability + 1e-12).all()
    one = (world.interests.base > 0).sum(axis=1)[columns(world)["user"] - 1] == 1
    np.testing.assert_array_equal(world.click_probability[one], plain.click_probability[one])

    def agreement(some: World) -> tuple[float, float]:
        """How often two clicks of a user in a row share their topic: within an hour, and across sessions."""
        frame = some.tables.events.with_columns(topic=pl.Series(some.item_topic[columns(some)["item"] - 1]))
        frame = frame.filter(pl.Series(~one) & (pl.col("click") == 1)).sort("user", "time", maintain_order=True)
        pair = frame.with_columns(pl.col("topic", "time", "user").shift().name.suffix("_before")).filter(
            pl.col("user") == pl.col("user_before")
        )
        same, near = pair["topic"] == pair["topic_before"], pair["time"] - pair["time_before"] < 3600
        return float(same.filter(near).mean()), float(same.filter(~near).mean())  # type: ignore[arg-type]

    (within, across), (plain_within, plain_across) = agreement(world), agreement(plain)
    assert abs(plain_within - plain_across) < 0.03
    assert within > plain_within + 0.15
    assert plain_across + 0.05 < across < within - 0.05  # the intent stays, but not always


def test_expected_clicks_with_intents_are_their_mean_over_intents() -> None:
    """Sessions of one user drawn again and again: the intent follows the weights, the clicks the intent."""
    world = simulate.load(users=300, items=200, seed=3, session_intent=0.7)
    user = int(np.flatnonzero((world.interests.base > 0).sum(axis=1) == 3)[0]) + 1
    moment = np.array([simulate.EPOCH + 30 * simulate.DAY])
    subtopic, weight = world.interests.at(np.array([user - 1]), moment)
    certain = np.zeros((1, 200))
    for slot in range(3):
        weights = np.where(np.arange(4) == slot, 1.0, 0.3)
        match = np.zeros(200)
        for other in range(3):
            near = np.where(subtopic[0, other] // 4 == world.item_topic, simulate.SIBLING, 0.0)
            near[subtopic[0, other] == world.item_subtopic] = 1.0
            match = np.maximum(match, near * weights[other] * min(1.0, (weight[0, other] / simulate.FULL) ** 0.5))
        certain += weight[0, slot] / (1 + np.exp(-(simulate.BASE + simulate.AFFINITY * match)))
    expected = world.expected_clicks(np.array([user]), moment)[0]
    likely = simulate._shown(world._items, subtopic, weight)[0] * (world._items.released <= moment)
    assert np.corrcoef((expected / likely.clip(1e-12))[likely > 0], certain[0][likely > 0])[0, 1] > 0.9
    wrong = world.expected_clicks(np.array([user % 300 + 1]), moment)[0]
    assert np.corrcoef((wrong / likely.clip(1e-12))[likely > 0], certain[0][likely > 0])[0, 1] < 0.8


def test_everybody_has_as_many_interests_as_asked() -> None:
    world = simulate.load(users=50, items=80, interests=3)
    assert ((world.interests.base > 0).sum(axis=1) == 3).all()
    assert all(len(world.true_interests(u)) == 3 for u in range(1, 51))


def test_intents_stay_and_follow_the_weights() -> None:
    """40,000 sessions: a new intent is drawn by the weights, and that of the session before stays with `STAYS`."""
    interests = simulate.Interests(
        subtopic=np.zeros((1, 4, 2), dtype=np.int64),
        change=np.full((1, 4), simulate.NEVER),
        base=np.array([[0.75, 0.25, 0.0, 0.0]]),
        phase=np.zeros((1, 4)),
        swing=0.0,
    )
    n = 40_000
    shown = {"user": np.zeros(2 * n, np.int64), "time": np.arange(2 * n), "session": np.arange(2 * n) // 2}
    intent = simulate._intents(shown, interests, seed=1)
    assert (intent[0::2] == intent[1::2]).all()  # one a session
    first = intent[::2]
    assert (first == 1).mean() == pytest.approx(0.25, abs=0.03)
    assert (first > 1).sum() == 0
    assert (first[1:] == first[:-1]).mean() == pytest.approx(0.8 + 0.2 * (0.75**2 + 0.25**2), abs=0.01)


def test_true_interests_are_named(world: World) -> None:
    found = world.true_interests(1)
    assert sum(found.values()) == pytest.approx(1.0)
    assert set(found) <= set(SUBTOPICS)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    with pytest.raises(ValueError, match="this world has users 1 to 600, received 601"):
        world.true_interests(601)


def test_categories_and_titles_tell_the_topic_but_not_always(world: World) -> None:
    noisy = simulate.load(users=50, items=2000, noise=0.3, seed=1)
    assert noisy.tables.items is not None
    agree = (noisy.tables.items["category"].to_numpy() == np.array(TOPICS)[noisy.item_topic]).mean()
    assert agree == pytest.approx(0.73, abs=0.03)  # 1 - noise, and a tenth of the noise is right by chance
    assert world.tables.items is not None
    titles = world.tables.items["title"].to_list()
    words = [set(t.lower().replace(",", "").replace(":", "").split()) for t in titles]
    own = {t: set.union(*(w for w, i in zip(words, world.item_topic, strict=True) if TOPICS[i] == t)) for t in TOPICS}
    content = [{w for w in ws if sum(w in own[t] for t in TOPICS) == 1} for ws in words]
    assert all(content)  # every title has a word that no other topic uses


def test_history_knows_what_ids_do_not(world: World) -> None:
    """A count over the user's earlier clicks comes near the oracle; the item's and the user's own rates do not."""
    data = columns(world)
    item = data["item"] - 1
    topic, label = world.item_topic[item], data["click"]
    frame = world.tables.events.select("user", "click").with_columns(topic=topic).with_row_index("row")
    before = frame.with_columns(
        (pl.col("click").cum_sum() - pl.col("click")).over("user", "topic").alias("same"),
        (pl.col("click").cum_sum() - pl.col("click")).over("user").alias("all"),
    ).sort("row")
    same = ((before["same"] + 0.3) / (before["all"] + 3)).to_numpy()
    test = np.arange(len(label)) >= 0.8 * len(label)
    shown = np.bincount(item[~test], minlength=1000)
    rate = (np.bincount(item[~test], weights=label[~test], minlength=1000) + 2) / (shown + 10)
    history, ids, oracle = (auc(label[test], s[test]) for s in (same, rate[item], world.click_probability))
    assert oracle - history < 0.1
    assert ids < history - 0.1


def test_agreement_of_interests(world: World) -> None:
    clicks = world.tables.events.filter(pl.col("click") == 1)
    user, item, time = (clicks[c].to_numpy() for c in ("user", "item", "time"))
    topic = world.item_topic[item - 1]
    truth = world.interest_agreement(user, item, time, topic + 7)
    assert len(truth) > 300
    np.testing.assert_allclose(truth, 1.0)
    shuffled = np.random.default_rng(0).permutation(topic % 4)
    assert world.interest_agreement(user, item, time, shuffled).mean() < 0.25
    np.testing.assert_allclose(world.interest_agreement(user, item, time, np.zeros_like(topic)), 0.0, atol=1e-12)
    named = np.random.default_rng(1).permutation(10)[topic] + 100 * user  # names are the user's own
    np.testing.assert_allclose(world.interest_agreement(user, item, time, named), 1.0)


def test_agreement_by_hand() -> None:
    """Six items of one user: groups {a a a | b b b} and {x x y | y y y}: I = ln 2 - 4/6 H(1/4), H = ln 2 and H(1/3)."""
    true, found = np.array([0, 0, 0, 1, 1, 1]), np.array([5, 5, 9, 9, 9, 9])
    h = {p: -(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (1 / 4, 1 / 3)}
    expected = 2 * (np.log(2) - 4 / 6 * h[1 / 4]) / (np.log(2) + h[1 / 3])
    value = simulate._mutual_information(np.full(6, 3), true, found)
    np.testing.assert_allclose(value, [expected])
    assert simulate._mutual_information(np.full(6, 3), np.zeros(6, dtype=np.int64), found).shape == (0,)
    assert simulate._mutual_information(*(np.zeros(0, dtype=np.int64) for _ in range(3))).shape == (0,)


def test_pictures_show_their_topic(world: World) -> None:
    pictures = world.pictures(np.arange(1, 401))
    assert pictures.shape == (400, 32, 32, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(world.pictures(np.array([7, 3])), pictures[[6, 2]])
    flat = pictures.reshape(400, -1).astype(np.float64)
    train, test = np.arange(400) % 2 == 0, np.arange(400) % 2 == 1
    centre = np.stack([flat[train & (world.item_topic[:400] == t)].mean(axis=0) for t in range(10)])
    nearest = ((flat[test, None] - centre[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == world.item_topic[:400][test]).mean() > 0.9
    assert len({p.tobytes() for p in pictures}) == 400  # and yet no two are alike
    with pytest.raises(ValueError, match="this world has items 1 to 1000, received 0"):
        world.pictures(np.array([0, 1]))


def test_pictures_as_a_column() -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow to read the PNG files back")
    world = simulate.load(users=50, items=80, pictures=True)
    assert world.tables.items is not None
    drawn = [np.asarray(image.open(io.BytesIO(p)).convert("RGB")) for p in world.tables.items["picture"]]
    np.testing.assert_array_equal(np.stack(drawn), world.pictures(np.arange(1, 81)))
    assert [f.name for f in world.tables.schema.items][-1] == "picture"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "a world needs at least 1 users, received users=0"),
        ({"items": 39}, "a world needs at least 40 items, received items=39"),
        ({"days": 0}, "a world needs at least 1 days, received days=0"),
        ({"users": 100, "events": 99}, "at least one event a user, received events=99 for 100 users"),
        ({"noise": 1.5}, "noise is a share between 0 and 1, received noise=1.5"),
        ({"interests": 5}, "everybody has 1 to 4 interests, received interests=5"),
        ({"session_intent": -0.1}, "session_intent is a share between 0 and 1, received session_intent=-0.1"),
    ],
)
def test_impossible_worlds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate.load(**options)


def test_the_smallest_world_stands() -> None:
    world = simulate.load(users=1, items=40, days=1, events=30)
    assert len(world.click_probability) == world.tables.events.height > 0
