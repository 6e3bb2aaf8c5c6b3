"""The packed matrix: what goes in comes out, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funnelrec.core.schema import Category, CategorySpec, NumberSpec, Schema, Spec
from funnelrec.data.facts import Facts, Layout

SPEC = Spec(
    categories=(CategorySpec("device", "context", 3, 1, 0, 2),),
    numbers=(NumberSpec("hour", "context", 0, 1),),
    num_users=4,
)


def test_a_layout_holds_only_what_the_schema_names_and_stays_even() -> None:
    full = Layout.of(Schema(user="u", item="i", time="t", weight="w", context=(Category("device"),)), SPEC)
    assert (full.moment, full.user, full.item, full.label, full.weight) == (0, 2, 3, 4, 5)
    assert full.ids == (6, 8) and full.numbers == (8, 9) and full.width == 10
    rows = Layout.of(Schema(), SPEC)
    assert rows == Layout(width=4, label=0, ids=(1, 3), numbers=(3, 4))
    assert Layout.from_dict(full.to_dict()) == full


def test_times_floats_and_people_survive() -> None:
    layout = Layout.of(Schema(user="u", item="i", time="t"), SPEC)
    packed = np.zeros((2, layout.width), np.int32)
    moments = np.array([-(2**62) - 1, 2**62 + 1])
    packed[:, 0:2] = moments.view(np.int32).reshape(-1, 2)
    packed[:, layout.user], packed[:, layout.item] = [3, 5], [2, 2**24 + 1]
    packed[:, layout.label] = np.array([0.1, -np.inf], np.float32).view(np.int32)
    facts = Facts(torch.from_numpy(packed), np.array([0, 2], np.uint8), layout, num_users=4)
    assert facts.moment.tolist() == facts.time.tolist() == moments.tolist()
    assert facts.person.tolist() == [3, 5] and facts.user.tolist() == [3, 1]  # 5 is someone training never saw
    assert facts.item.tolist() == [2, 2**24 + 1]
    assert facts.label.tolist() == [np.float32(0.1), -np.inf] and facts.weight.tolist() == [1.0, 1.0]


def test_what_is_not_there_is_named() -> None:
    facts = Facts(torch.zeros((2, 4), dtype=torch.int32), np.zeros(2, np.uint8), Layout.of(Schema(), SPEC))
    assert facts.moment.tolist() == [0, 1]
    with pytest.raises(ValueError, match="these events have no item"):
        facts.item  # noqa: B018
    with pytest.raises(ValueError, match="no moment"):
        facts.layout.moment_of(facts.packed)
