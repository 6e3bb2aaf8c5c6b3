"""The embedded default data set: a small world whose truth is known.

People with one to four interests browse a catalogue of ten topics with four sub-topics each. Interests wax and wane,
and some give way to new ones. In sessions of a few impressions a simple logging policy (interest, popularity,
exploration) shows items; a click happens with a probability that this file states:

    logit P(click) = BASE + AFFINITY · match + quality − POSITION_COST · (position − 1) + length + price

| term      | meaning                                                                                             |
|-----------|-----------------------------------------------------------------------------------------------------|
| `match`   | best over the user's interests now: strength · (1 in its sub-topic, `SIBLING` elsewhere in its topic) |
| strength  | min(1, √(weight / `FULL`)): an interest with a share of `FULL` or more of the user counts in full;    |
|           | times 1 − `session_intent` where the session is about another one                                    |
| `quality` | of the item's brand, plus a little of the item's own                                                |
| `length`  | long items do worse on phones and better on television                                              |
| `price`   | members with a free plan avoid dear items, those with a premium plan like them                      |

With `session_intent` (0 by default) every session is about one of the user's interests: that of the session before with
chance `STAYS`, else one drawn by the weights. Nobody is told which; the clicks of a session, and of the ones before it,
tell.

A click is watched for a share of the item's length, σ(WATCH · match + WATCH_BASE + WATCH_SPREAD · a normal number).

`World.click_probability` gives that probability for every impression, so any ranker can be held against the best
that is possible (the oracle), `World.expected_watch` the seconds to be expected of it, and `World.interest_agreement`
holds the interests that a matcher found against the true ones. Everything is drawn from `seed` alone: the same
arguments give the same tables, row for row.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl
from jaxtyping import Bool, Float64, Int64, UInt8

from funnelrec.core.schema import Category, Field, Image, Number, Schema, Text
from funnelrec.data.sources import _simulate_pictures, _simulate_titles
from funnelrec.data.sources._simulate_titles import SUBTOPICS, TOPICS
from funnelrec.data.tables import Tables

__all__ = ["SUBTOPICS", "TOPICS", "Interests", "World", "load"]

DAY = 86_400
EPOCH = 1_767_225_600  #: 1 January 2026, 00:00 UTC: the first day of the world
NEVER = np.iinfo(np.int64).max
SLOTS = 4  #: interests that a user can have at one time
PER_TOPIC = len(SUBTOPICS) // len(TOPICS)  #: sub-topic s belongs to topic s // PER_TOPIC
BRANDS = 30
DEVICES = ("desktop", "phone", "tablet", "television")
PLANS = ("free", "basic", "premium")
REGIONS = ("north", "south", "east", "west", "islands")
LAST_POSITION = 10

BASE, AFFINITY, SIBLING, FULL = -3.4, 4.0, 0.9, 0.08  #: the click model, see the table above
BRAND_SPREAD, OWN_SPREAD = 0.4, 0.05  #: standard deviations of quality
POSITION_COST = 0.09
LENGTH_ON_DEVICE = (0.0, -0.35, -0.1, 0.35)  #: logit a standard deviation of log minutes, by device
PRICE_FOR_PLAN = (-0.3, -0.05, 0.15)  #: logit a standard deviation of log price, by plan
WATCH, WATCH_BASE, WATCH_SPREAD = 2.5, -1.5, 0.8
POLICY = (0.5, 0.2, 0.3)  #: chance that an impression comes from interest, popularity, exploration
STRAY = 0.3  #: share of the interest's impressions that come from any sub-topic of its topic
NUMBER_OF_INTERESTS = (0.4, 0.38, 0.18, 0.04)  #: chance of 1, 2, 3, 4 interests
CHANGES = 0.15  #: share of the interests that give way to another ...
CHANGE_BETWEEN = (0.05, 0.3)  #: ... at a moment between these shares of the user's days
JOINED_BY = 0.3  #: everybody has joined by this share of the days, a third on the first
LATE_ITEMS = 0.06  #: share of the items that come out during the days
SESSION = (4, 11)  #: impressions of a session
STAYS = 0.8  #: chance that a session is about what the one before was about

_STREAMS = {
    name: number
    for number, name in enumerate(
        ("items", "titles", "pictures", "users", "sessions", "policy", "clicks", "watch", "intents"), start=1
    )
}

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


def load(**options: int | float | bool) -> World:
    """`World.build(**options)`; the tables for a Dataset are `load().tables`."""
    return World.build(**options)  # type: ignore[arg-type]  # build names and checks its options


@dataclass(frozen=True)
class Interests:
    """What U users truly want at any moment; user u here is user id u + 1. An unused slot has weight 0.

    A slot follows one sub-topic until `change` and another, of another topic, from then on. Its weight waxes and
    wanes as base · exp(swing · sin) with the period. No two of a user's interests, old or new, share a topic.
    """

    subtopic: Int64[np.ndarray, "U 4 2"]  #: before and after the change
    change: Int64[np.ndarray, "U 4"]  #: seconds; `NEVER` where there is no change
    base: Float64[np.ndarray, "U 4"]
    phase: Float64[np.ndarray, "U 4"]  #: in [0, 1)
    swing: float = 0.6
    period: int = 45 * DAY

    def at(
        self, user: Int64[np.ndarray, "n"], time: Int64[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n 4"], Float64[np.ndarray, "n 4"]]:
        """Sub-topics and weights (each row sums to 1) of users at moments in seconds."""
        after = (time[:, None] >= self.change[user]).astype(np.int64)
        subtopic = np.take_along_axis(self.subtopic[user], after[..., None], axis=2)[..., 0]
        turn = (time[:, None] - EPOCH) / self.period + self.phase[user]
        weight = self.base[user] * np.exp(self.swing * np.sin(2.0 * np.pi * turn))
        return subtopic, weight / weight.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class World:
    """The tables and the truth behind them.

    `tables.events` is sorted by time, and row i of every array of n events describes row i of it. A Dataset keeps the
    order (its sort by time is stable), so row i of its facts is the same event. Ids count from 1: item id i is row
    i - 1 of `tables.items` and of the arrays of N items.
    """

    tables: Tables = field(repr=False)
    click_probability: Float64[np.ndarray, "n"] = field(repr=False)  #: the truth behind column `click`
    interests: Interests = field(repr=False)
    item_subtopic: Int64[np.ndarray, "N"] = field(repr=False)
    seed: int
    session_intent: float
    _match: Float64[np.ndarray, "n"] = field(repr=False)
    _users: _Users = field(repr=False)
    _items: _Items = field(repr=False)

    @classmethod
    def build(
        cls,
        *,
        seed: int = 0,
        users: int = 3000,
        items: int = 2000,
        days: int = 60,
        events: int | None = None,
        noise: float = 0.01,
        interests: int | None = None,
        session_intent: float = 0.0,
        pictures: bool = False,
    ) -> World:
        """Draw a world.

        events: impressions to aim at, 165 a user by default; about a fifth fewer remain, for nothing is shown twice to
        anyone, nor before it is out. noise: share of the items whose `category` or `style` is not what they
        are about. interests: how many everybody has at a time, 1 to 4; by default some have 1, some 4.
        session_intent: how much of an interest's strength is gone while a session is about another one, 0 (nothing)
        to 1. pictures: add the column `picture`, PNG bytes, to the items.
        """
        _check(users, items, days, events, noise, interests, session_intent)
        people, catalogue = _Users(users, days, interests, seed), _Items(items, days, noise, seed)
        shown = _sessions(people, days, events or 165 * users, seed)
        item = _policy(shown, catalogue, people.interests, seed)
        keep = shown["time"] >= catalogue.released[item]
        keep[keep] = _first_of_pair(shown["user"][keep] * items + item[keep])
        shown, item = {name: column[keep] for name, column in shown.items()}, item[keep]

        subtopic, weight = people.interests.at(shown["user"], shown["time"])
        other = _other(_intents(shown, people.interests, seed), session_intent) if session_intent else None
        match = _match(catalogue.subtopic[item], subtopic, weight, other)
        probability = 1.0 / (1.0 + np.exp(-_logit(match, shown, item, catalogue, people)))
        click = (_rng(seed, "clicks").random(len(item)) < probability).astype(np.int64)
        table = pl.DataFrame(
            {
                "user": shown["user"] + 1,
                "item": item + 1,
                "time": shown["time"],
                "click": click,
                "watch_seconds": _watch(click, match, catalogue.minutes[item], seed),
                "position": shown["position"],
                "device": np.array(DEVICES)[shown["device"]],
            }
        )
        described, about = catalogue.table, _schema(pictures)
        if pictures:
            drawn = _draw_pictures(np.arange(items, dtype=np.int64), catalogue.subtopic, seed)
            described = described.with_columns(pl.Series("picture", [_png(p) for p in drawn], dtype=pl.Binary))
        tables = Tables(table, about, users=people.table, items=described, name="simulate")
        return cls(
            tables, probability, people.interests, catalogue.subtopic, seed, session_intent, match, people, catalogue
        )

    @cached_property
    def item_topic(self) -> Int64[np.ndarray, "N"]:
        """Row of `TOPICS` that each item is about."""
        return self.item_subtopic // PER_TOPIC

    @cached_property
    def expected_watch(self) -> Float64[np.ndarray, "n"]:
        """The seconds that each impression is watched on average, no click being no seconds.

        But for the rounding to whole seconds; the mean over the normal number is Gauss-Hermite quadrature.
        """
        points, weights = np.polynomial.hermite_e.hermegauss(24)
        share = np.zeros_like(self._match)
        for point, weight in zip(points, weights / weights.sum(), strict=True):
            share += weight / (1.0 + np.exp(-(WATCH * self._match + WATCH_BASE + WATCH_SPREAD * point)))
        minutes = self._items.minutes[self.tables.events["item"].to_numpy() - 1]
        seconds: _Floats = self.click_probability * 60.0 * minutes * share
        return seconds

    def pictures(self, items: Int64[np.ndarray, "n"]) -> UInt8[np.ndarray, "n 32 32 3"]:
        """The pictures of items, by id; always the same for the same world."""
        self._require_items(items)
        return _draw_pictures(items - 1, self.item_subtopic, self.seed)

    def true_interests(self, user: int, time: int | None = None) -> dict[str, float]:
        """Sub-topic -> weight of one user (id) at a moment (the end of the log by default), largest first."""
        self._require_users(np.array([user]))
        moment = int(self.tables.events["time"][-1]) if time is None else time
        subtopic, weight = self.interests.at(np.array([user - 1]), np.array([moment]))
        order = [slot for slot in np.argsort(-weight[0], kind="stable") if weight[0, slot] > 0.0]
        return {SUBTOPICS[subtopic[0, slot]]: float(weight[0, slot]) for slot in order}

    def expected_clicks(self, user: Int64[np.ndarray, "n"], time: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n N"]:
        """Chance that one impression of a user (id) at a moment shows an item and is clicked, for every item.

        Column j is item id j + 1. No order of the catalogue, made before the sessions that follow, brings more clicks
        on average, but for what earlier sessions tell of the intent of the next: that stands at the interests' weights.
        Position and device, not known beforehand, stand at their mean effect.
        """
        self._require_users(user)
        subtopic, weight = self.interests.at(user - 1, time)
        likely = _shown(self._items, subtopic, weight)
        likely[time[:, None] < self._items.released] = 0.0
        rest = self._items.quality + np.array(PRICE_FOR_PLAN)[self._users.plan[user - 1]][:, None] * self._items.dear
        device = 0.75 * np.array(LENGTH_ON_DEVICE)[self._users.device[user - 1]] + 0.25 * np.mean(LENGTH_ON_DEVICE)
        rest = rest + device[:, None] * self._items.length - POSITION_COST * np.mean(SESSION) / 2.0
        chance = np.zeros_like(likely)
        for intent in range(SLOTS if self.session_intent else 1):
            match = np.zeros_like(likely)
            for slot in range(SLOTS):  # one interest at a time: [n, N] stays the largest array
                one = _match(self.item_subtopic[None], subtopic[:, slot, None, None], weight[:, slot, None, None])
                np.maximum(match, one * (1.0 - self.session_intent * (slot != intent)), out=match)
            share = weight[:, intent, None] if self.session_intent else 1.0
            chance += share / (1.0 + np.exp(-(BASE + AFFINITY * match + rest)))
        clicks: _Floats = likely * chance
        return clicks

    def interest_agreement(
        self,
        user: Int64[np.ndarray, "m"],
        item: Int64[np.ndarray, "m"],
        time: Int64[np.ndarray, "m"],
        found: Int64[np.ndarray, "m"],
    ) -> Float64[np.ndarray, "q"]:
        """How well found interests agree with the true ones, for each user that has two or more among these clicks.

        Click j was of `user` on `item` (ids) at `time`, and a model says that it belongs to the user's interest
        `found` (any number, compared within a user only). The truth is the interest whose topic the item has; clicks
        outside the user's interests are left out. The value is 2 I(found, true) / (H(found) + H(true)) in [0, 1]:
        1 when the groups are the same, 0 when they tell nothing of each other (or one group was found).
        """
        self._require_items(item)
        subtopic, weight = self.interests.at(user - 1, time)
        topic = self.item_topic[item - 1]
        ours = ((subtopic // PER_TOPIC == topic[:, None]) & (weight > 0.0)).any(axis=1)
        return _mutual_information(user[ours], topic[ours], found[ours])

    def _require_items(self, items: _Ints) -> None:
        _require_ids("items", items, len(self.item_subtopic))

    def _require_users(self, users: _Ints) -> None:
        _require_ids("users", users, len(self.interests.base))


# -------------------------------------------------------------------------------------------------------- users, items
class _Users:
    """User u is row u. `device` is the one used most; `activity` is relative."""

    def __init__(self, users: int, days: int, interests: int | None, seed: int) -> None:
        rng = _rng(seed, "users")
        self.plan = _choice((0.5, 0.3, 0.2), rng.random(users))
        self.device = _choice((0.25, 0.5, 0.1, 0.15), rng.random(users))
        self.joined = EPOCH + (np.maximum(0.0, 1.5 * rng.random(users) - 0.5) * JOINED_BY * days * DAY).astype(np.int64)
        self.activity = np.exp(rng.normal(0.0, 0.4, users))
        self.interests = self._interests(EPOCH + days * DAY, interests, rng)
        self.table = pl.DataFrame(
            {
                "user": np.arange(1, users + 1, dtype=np.int64),
                "plan": np.array(PLANS)[self.plan],
                "region": np.array(REGIONS)[rng.integers(0, len(REGIONS), users)],
            }
        )

    def _interests(self, end: int, number: int | None, rng: np.random.Generator) -> Interests:
        shape = (len(self.plan), SLOTS)
        # Eight different topics a user: four to begin with, four to change to.
        topics = np.argsort(rng.random((shape[0], len(TOPICS))), axis=1)[:, : 2 * SLOTS].reshape(*shape, 2)
        subtopic = topics * PER_TOPIC + rng.integers(0, PER_TOPIC, topics.shape)
        drawn = _choice(NUMBER_OF_INTERESTS, rng.random(shape[0]))[:, None]
        used = np.arange(SLOTS) <= (drawn if number is None else number - 1)
        stay = end - self.joined[:, None]
        moment = self.joined[:, None] + (rng.uniform(*CHANGE_BETWEEN, shape) * stay).astype(np.int64)
        return Interests(
            subtopic=subtopic,
            change=np.where(rng.random(shape) < CHANGES, moment, NEVER),
            base=np.where(used, rng.uniform(0.5, 1.0, shape), 0.0),
            phase=rng.random(shape),
        )


class _Items:
    """Item i is row i. `popularity` is how often the policy takes it, up to a factor."""

    def __init__(self, items: int, days: int, noise: float, seed: int) -> None:
        rng = _rng(seed, "items")
        self.subtopic = rng.permutation(np.arange(items, dtype=np.int64) % len(SUBTOPICS))
        topic = self.subtopic // PER_TOPIC
        # A brand is at home in two topics (every topic has some) and has a standing that all its items share.
        home = np.stack([np.arange(BRANDS) % len(TOPICS), rng.integers(0, len(TOPICS), BRANDS)], axis=1)
        fits = (home[None] == topic[:, None, None]).any(axis=2)
        brand = np.argmax(rng.random((items, BRANDS)) * np.where(fits, 1.0, 0.6), axis=1)
        standing = rng.normal(0.0, BRAND_SPREAD, BRANDS)
        self.quality = standing[brand] + rng.normal(0.0, OWN_SPREAD, items)
        self.price = np.round(np.exp(rng.normal(2.3, 0.6, items) + 0.3 * standing[brand]), 2)
        self.minutes = np.clip(np.rint(np.exp(rng.normal(3.0, 0.7, items))), 2, 180).astype(np.int64)
        self.length = np.clip((np.log(self.minutes) - 3.0) / 0.7, -2.0, 2.0)  # standardised logarithms
        self.dear = np.clip((np.log(self.price) - 2.3) / 0.6, -2.0, 2.0)
        self.popularity = (1.0 + rng.permutation(items)) ** -0.6 * np.exp(0.8 * self.quality)
        late = rng.random(items) < LATE_ITEMS
        self.released = EPOCH + np.where(late, rng.random(items) * days * DAY, 0.0).astype(np.int64)
        category = np.where(rng.random(items) < noise, rng.integers(0, len(TOPICS), items), topic)
        style = np.where(rng.random(items) < noise, rng.integers(0, len(SUBTOPICS), items), self.subtopic)
        self.table = pl.DataFrame(
            {
                "item": np.arange(1, items + 1, dtype=np.int64),
                "title": _simulate_titles.titles(self.subtopic, _rng(seed, "titles")),
                "category": np.array(TOPICS)[category],
                "style": np.array(SUBTOPICS)[style],
                "brand": np.array([f"brand-{b:02d}" for b in range(BRANDS)])[brand],
                "price": self.price,
                "minutes": self.minutes,
            }
        )


# ---------------------------------------------------------------------------------------------------------- the log
def _sessions(users: _Users, days: int, events: int, seed: int) -> dict[str, _Ints]:
    """Impressions in the order of time: user, time, position in the session (from 1), device."""
    rng = _rng(seed, "sessions")
    end = EPOCH + days * DAY
    stay = end - users.joined
    visits = users.activity * stay
    visits = rng.poisson(visits / visits.sum() * events / np.mean(SESSION))
    user = np.repeat(np.arange(len(stay)), visits)
    day = (users.joined[user] + rng.random(len(user)) * stay[user]).astype(np.int64) // DAY
    clock = (19 * 3600 + rng.normal(0.0, 3.5 * 3600, len(user))).astype(np.int64) % DAY  # most come in the evening
    device = np.where(rng.random(len(user)) < 0.75, users.device[user], rng.integers(0, len(DEVICES), len(user)))
    length = rng.integers(SESSION[0], SESSION[1] + 1, len(user))
    session = np.repeat(np.arange(len(user)), length)
    first = (np.cumsum(length) - length)[session]
    waited = np.cumsum(rng.integers(8, 90, len(session)))  # seconds between impressions
    time = (day * DAY + clock)[session] + waited - waited[first]
    position = np.minimum(np.arange(len(session)) - first + 1, LAST_POSITION)
    order = np.lexsort((session, time))
    order = order[time[order] < end]
    return {
        "user": user[session][order],
        "time": time[order],
        "position": position[order],
        "device": device[session][order],
        "session": session[order],
    }


def _intents(shown: dict[str, _Ints], interests: Interests, seed: int) -> _Ints:
    """The interest (its slot) that each impression's session is about."""
    rng = _rng(seed, "intents")
    _, first, row = np.unique(shown["session"], return_index=True, return_inverse=True)  # impressions lie in time order
    user, start = shown["user"][first], shown["time"][first]
    fresh, stays = rng.random(len(first)), rng.random(len(first)) < STAYS
    weight = interests.at(user, start)[1]
    drawn = (np.cumsum(weight, axis=1) < fresh[:, None]).sum(axis=1).clip(0, SLOTS - 1)
    order = np.lexsort((start, user))
    begins = np.ones(len(order), dtype=bool)  # of a row of sessions with one intent
    begins[1:] = ~stays[order][1:] | (user[order][1:] != user[order][:-1])
    since = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    intent = np.empty(len(order), dtype=np.int64)
    intent[order] = drawn[order][since]
    return intent[row]


def _other(intent: _Ints, session_intent: float) -> _Floats:
    """What is left [n, 4] of the strength of each interest in a session about the one `intent` [n]."""
    left: _Floats = 1.0 - session_intent * (np.arange(SLOTS) != intent[:, None])
    return left


def _policy(shown: dict[str, _Ints], items: _Items, interests: Interests, seed: int) -> _Ints:
    """The item of every impression: what the user likes now, what is popular, or anything."""
    rng = _rng(seed, "policy")
    n = len(shown["user"])
    source = _choice(POLICY, rng.random(n))
    subtopic, weight = interests.at(shown["user"], shown["time"])
    slot = (np.cumsum(weight, axis=1) < rng.random(n)[:, None]).sum(axis=1).clip(0, SLOTS - 1)
    wanted = np.take_along_axis(subtopic, slot[:, None], axis=1)[:, 0]
    sibling = wanted // PER_TOPIC * PER_TOPIC + rng.integers(0, PER_TOPIC, n)
    wanted = np.where(rng.random(n) < STRAY, sibling, wanted)
    # Items sorted by sub-topic: to draw one of a sub-topic is to pick a place between two edges of the running sum.
    by_subtopic = np.argsort(items.subtopic, kind="stable")
    running = np.cumsum(np.sqrt(items.popularity[by_subtopic]))
    ends = np.cumsum(np.bincount(items.subtopic, minlength=len(SUBTOPICS))) - 1
    starts = np.concatenate([[0.0], running[ends[:-1]]])
    place = starts[wanted] + rng.random(n) * (running[ends] - starts)[wanted]
    liked = by_subtopic[np.minimum(np.searchsorted(running, place, side="right"), ends[wanted])]
    popular = _choice(items.popularity / items.popularity.sum(), rng.random(n))
    anything = rng.integers(0, len(items.subtopic), n)
    chosen: _Ints = np.choose(source, [liked, popular, anything])
    return chosen


def _shown(items: _Items, subtopic: _Ints, weight: _Floats) -> _Floats:
    """Chance [n, N] that the policy shows an item, from the user's interests [n, 4]."""
    wanted = np.zeros((len(subtopic), len(SUBTOPICS)))
    np.put_along_axis(wanted, subtopic, weight, axis=1)  # a user's interests never share a sub-topic
    by_topic = wanted.reshape(len(subtopic), len(TOPICS), PER_TOPIC).sum(axis=2)
    wanted = (1.0 - STRAY) * wanted + STRAY / PER_TOPIC * np.repeat(by_topic, PER_TOPIC, axis=1)
    taken = np.sqrt(items.popularity)
    share = taken / np.bincount(items.subtopic, weights=taken, minlength=len(SUBTOPICS))[items.subtopic]
    popular = items.popularity / items.popularity.sum()
    chance: _Floats = POLICY[0] * wanted[:, items.subtopic] * share + POLICY[1] * popular
    return chance + POLICY[2] / len(items.subtopic)


def _match(item_subtopic: _Ints, subtopic: _Ints, weight: _Floats, left: _Floats | None = None) -> _Floats:
    """[n] in [0, 1] from the item's sub-topic [n] and the user's interests [n, 4], of which `left` is left."""
    same = subtopic == item_subtopic[..., None]
    related = subtopic // PER_TOPIC == (item_subtopic // PER_TOPIC)[..., None]
    strength = np.minimum(1.0, np.sqrt(weight / FULL))
    if left is not None:
        strength = strength * left
    best: _Floats = (strength * np.where(same, 1.0, np.where(related, SIBLING, 0.0))).max(axis=-1)
    return best


def _logit(match: _Floats, shown: dict[str, _Ints], item: _Ints, items: _Items, users: _Users) -> _Floats:
    """The formula at the top of this file."""
    length = np.array(LENGTH_ON_DEVICE)[shown["device"]] * items.length[item]
    price = np.array(PRICE_FOR_PLAN)[users.plan[shown["user"]]] * items.dear[item]
    place = POSITION_COST * (shown["position"] - 1)
    logit: _Floats = BASE + AFFINITY * match + items.quality[item] - place + length + price
    return logit


def _watch(click: _Ints, match: _Floats, minutes: _Ints, seed: int) -> _Ints:
    """Seconds watched: 0 without a click, else a share of the length that grows with the match; at least one."""
    rng = _rng(seed, "watch")
    share = 1.0 / (1.0 + np.exp(-(WATCH * match + WATCH_BASE + rng.normal(0.0, WATCH_SPREAD, len(click)))))
    return np.where(click == 1, np.maximum(1, np.rint(60.0 * minutes * share)), 0).astype(np.int64)


# ------------------------------------------------------------------------------------------------------------ helpers
def _check(
    users: int, items: int, days: int, events: int | None, noise: float, interests: int | None, session_intent: float
) -> None:
    for name, value, least in (("users", users, 1), ("items", items, len(SUBTOPICS)), ("days", days, 1)):
        if value < least:
            raise ValueError(f"a world needs at least {least} {name}, received {name}={value}")
    if events is not None and events < users:
        raise ValueError(f"a world needs at least one event a user, received events={events} for {users} users")
    if interests is not None and not 1 <= interests <= SLOTS:
        raise ValueError(f"everybody has 1 to {SLOTS} interests, received interests={interests}")
    for name, share in (("noise", noise), ("session_intent", session_intent)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is a share between 0 and 1, received {name}={share}")


def _require_ids(what: str, ids: _Ints, most: int) -> None:
    if len(ids) and (ids.min() < 1 or ids.max() > most):
        wrong = ids.min() if ids.min() < 1 else ids.max()
        raise ValueError(f"this world has {what} 1 to {most}, received {wrong}")


def _schema(pictures: bool) -> Schema:
    items: tuple[Field, ...] = (
        Category("category"),
        Category("style"),
        Category("brand"),
        Number("price"),
        Number("minutes"),
        Text("title"),
    )
    return Schema(
        user="user",
        item="item",
        time="time",
        label="click",
        context=(Category("position"), Category("device")),
        users=(Category("plan"), Category("region")),
        items=(*items, Image("picture")) if pictures else items,
    )


def _rng(seed: int, stream: str) -> np.random.Generator:
    """Randomness of its own for each part of the world, so that a change to one leaves the others alone."""
    return np.random.default_rng([seed, _STREAMS[stream]])


def _choice(chances: tuple[float, ...] | _Floats, uniform: _Floats) -> _Ints:
    """Places drawn with the given chances (they sum to 1), one for each uniform number."""
    edges = np.cumsum(chances)[:-1]
    return np.searchsorted(edges, uniform, side="right").astype(np.int64)


def _first_of_pair(pair: _Ints) -> Bool[np.ndarray, "n"]:
    """True where a value occurs for the first time."""
    first = np.zeros(len(pair), dtype=bool)
    first[np.unique(pair, return_index=True)[1]] = True
    return first


def _mutual_information(user: _Ints, true: _Ints, found: _Ints) -> _Floats:
    """Normalised mutual information of two groupings, within each user that has two or more true groups."""
    row = np.unique(user, return_inverse=True)[1]

    def entropy(*groups: _Ints) -> npt.NDArray[np.float64]:
        """Of each user's rows over the joint groups, in nats: log n - Σ c log c / n."""
        cells, count = np.unique(np.stack([row, *groups]), axis=1, return_counts=True)
        total = np.bincount(row).astype(np.float64)
        return np.asarray(np.log(total) - np.bincount(cells[0], weights=count * np.log(count)) / total)

    if len(row) == 0:
        return np.zeros(0)
    h_true, h_found, h_both = entropy(true), entropy(found), entropy(true, found)
    several = h_true > 1e-9
    shared = np.clip(h_true + h_found - h_both, 0.0, None)
    agreement: _Floats = np.minimum(2.0 * shared[several] / (h_true + h_found)[several], 1.0)
    return agreement


def _draw_pictures(rows: _Ints, subtopic: _Ints, seed: int) -> UInt8[np.ndarray, "n 32 32 3"]:
    seeds = _rng(seed, "pictures").random((len(subtopic), 8))[rows]
    return _simulate_pictures.draw(subtopic[rows] // PER_TOPIC, subtopic[rows] % PER_TOPIC, seeds)


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    """An RGB picture [h, w, 3] as a PNG file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = picture.shape
    lines = b"".join(b"\0" + line.tobytes() for line in picture)  # filter 0 before each line
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
