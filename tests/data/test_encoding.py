"""Encoding of fields: positions in the spec, and ids that are offset into one table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from funnelrec.core.schema import Category, CategorySpec, Number, Schema
from funnelrec.data.encoding import compile_spec, encode_fields, fit_fields, fuse, unfuse
from funnelrec.data.numeric import NumericTransform
from funnelrec.data.vocabulary import Vocabulary


def test_fuse_gives_each_field_its_own_rows_and_padding_to_all() -> None:
    field = CategorySpec("x", "item", rows=4, offset=7, start=0, stop=1)
    codes = np.array([0, 1, 2, 3], np.int32)
    assert fuse(codes, field).tolist() == [0, 7, 8, 9]
    assert unfuse(fuse(codes, field), field).tolist() == codes.tolist()


def test_the_spec_puts_users_then_items_then_context() -> None:
    schema = Schema(
        user="u",
        item="i",
        context=(Number("hour", "powers"), Category("device")),
        users=(Number("age"),),
        items=(Category("tags", many=True, max_values=3),),
    )
    words = Vocabulary.fit(pl.Series(["a", "b", "c"]))  # 5 rows
    number = {"age": NumericTransform("quantile"), "hour": NumericTransform("powers")}
    spec = compile_spec(schema, dict.fromkeys(("u", "i", "tags", "device"), words), number)
    assert [(c.name, c.side, c.offset, c.start, c.stop) for c in spec.categories] == [
        ("u", "user", 1, 0, 1),
        ("i", "item", 5, 1, 2),
        ("tags", "item", 9, 2, 5),
        ("device", "context", 13, 5, 6),
    ]
    assert [(n.name, n.side, n.start, n.stop) for n in spec.numbers] == [
        ("age", "user", 0, 1),
        ("hour", "context", 1, 4),
    ]
    assert (spec.num_users, spec.num_items, spec.table_rows) == (5, 5, 17)


def test_unseen_values_are_unknown_and_missing_ones_padding() -> None:
    schema = Schema(context=(Category("a"), Category("b", hash_buckets=4), Number("x", "standard")))
    train = pl.DataFrame({"a": ["p", "p", "q"], "b": [1, 2, 3], "x": [1.0, 2.0, 3.0]})
    vocabularies, transforms = fit_fields(train, schema.context)
    spec = compile_spec(schema, vocabularies, transforms)
    later = pl.DataFrame({"a": ["q", "new", None], "b": [9, None, 1], "x": [2.0, None, 3.0]})
    ids, numbers = encode_fields(later, schema.context, spec, vocabularies, transforms)
    assert ids[:, 0].tolist() == [3, 1, 0]
    assert ids[1, 1] == 0 and (ids[[0, 2], 1] >= spec.categories[1].offset + 1).all()
    assert numbers[:2].tolist() == [[0.0], [0.0]] and numbers[2, 0] > 0
    assert ids.dtype == np.int32 and numbers.dtype == np.float32


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"'x' holds lists; declare Category\('x', many=True\)"):
        fit_fields(pl.DataFrame({"x": [[1], [2]]}), (Category("x"),))
    with pytest.raises(ValueError, match=r"'x' of type String holds values that are no numbers"):
        fit_fields(pl.DataFrame({"x": ["1", "two"]}), (Number("x"),))
