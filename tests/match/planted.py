"""Users with known topics: do the interests of a model find them?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec


def planted(topics: int, per_topic: int, users: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Histories [U, L] and targets [U] of users with 2 to 4 topics; item rows of topic t start at 2 + t · per_topic."""
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(users, topics, generator=generator).argsort(1)[:, :4]
    count = torch.randint(2, 5, (users, 1), generator=generator)
    pick = (torch.rand(users, length + 1, generator=generator) * count).long()
    topic = own.gather(1, pick)
    rows = 2 + topic * per_topic + torch.randint(0, per_topic, topic.shape, generator=generator)
    return rows[:, :-1], rows[:, -1], topic[:, :-1]


def mutual_information(a: list[int], b: list[int]) -> float:
    """Normalised by the geometric mean of the two entropies."""
    n = len(a)

    def entropy(values: list[object]) -> float:
        return -sum(values.count(v) / n * math.log(values.count(v) / n) for v in set(values))

    own, other, both = entropy(list(a)), entropy(list(b)), entropy(list(zip(a, b, strict=True)))
    return 0.0 if own == 0 or other == 0 else (own + other - both) / math.sqrt(own * other)


def recovered(made: Any, history: Tensor, topic: Tensor) -> float:
    """Mean over users of the NMI between an item's topic and the interest that scores it best."""
    interests, _ = made.eval().encode_users(Batch(history=history, mask=history > 0))
    best = (made.encode_items(history.flatten()).view(*history.shape, -1) @ interests.transpose(1, 2)).argmax(2)
    values = [mutual_information(b, t) for b, t in zip(best.tolist(), topic.tolist(), strict=True)]
    return sum(values) / len(values)


def trained_on_topics(make: Callable[[Spec], Any], *, steps: int = 240, lr: float = 0.01) -> tuple[float, float]:
    """`recovered` before and after training on next items by the full softmax: eight topics of twelve items."""
    topics, per_topic = 8, 12
    history, target, topic = planted(topics, per_topic, users=2048, length=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make(Spec(num_items=2 + topics * per_topic))
        made.items.dense = True
        before = recovered(made, history[:128], topic[:128])
        optimiser = torch.optim.Adam(made.parameters(), lr=lr)
        for step in range(steps):
            rows = slice(step % 16 * 128, step % 16 * 128 + 128)
            interests, valid = made.train().encode_users(Batch(history=history[rows], mask=history[rows] > 0))
            user = made.user_for_target(interests, valid, made.encode_items(target[rows]))
            logits = user @ made.encode_items(torch.arange(2, 2 + topics * per_topic)).T
            loss = torch.nn.functional.cross_entropy(logits, target[rows] - 2)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return before, recovered(made, history[:128], topic[:128])
