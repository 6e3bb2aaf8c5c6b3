"""Vocabularies: rows, order, exactness of ids, both types meeting, saving."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data.vocabulary import HashVocabulary, Vocabulary, canonical_ids, vocabulary_from_arrow

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_most_frequent_value_is_row_2_and_ties_go_by_value() -> None:
    vocabulary = Vocabulary.fit(pl.Series(["b", "a", "", "a", None, "c", "b", "a", "d", "c"]))
    assert vocabulary.values.to_list() == ["a", "b", "c", "d"]
    assert vocabulary.counts.tolist() == [3, 2, 2, 1]
    assert vocabulary.size == 6


def test_integer_ties_go_by_number_not_by_text() -> None:
    assert Vocabulary.fit(pl.Series([10, 9, 100])).values.to_list() == [9, 10, 100]


def test_null_and_empty_are_padding_and_unseen_is_unknown() -> None:
    vocabulary = Vocabulary.fit(pl.Series(["a", "b", "b"]))
    rows = vocabulary.encode(pl.Series(["a", None, "", "z", "b"]))
    assert rows.tolist() == [3, 0, 0, 1, 2]
    assert rows.dtype == np.int32


def test_min_count_makes_rare_values_unknown_but_not_those_of_also() -> None:
    vocabulary = Vocabulary.fit(pl.Series([7, 7, 8, 9]), min_count=2, also=pl.Series([9, 11]))
    assert vocabulary.values.to_list() == [7, 9, 11]
    assert vocabulary.counts.tolist() == [2, 0, 0]
    assert vocabulary.encode(pl.Series([8])).tolist() == [1]


@pytest.mark.parametrize(
    ("values", "also", "expected"),
    [
        (pl.Series([7, 7]), pl.Series(["x"]), ["7", "x"]),
        (pl.Series(["x", "x"]), pl.Series([7]), ["x", "7"]),
        (pl.Series([None, None]), pl.Series([7]), [7]),
        (pl.Series([7]), pl.Series([None], dtype=pl.String), [7]),
    ],
)
def test_also_of_another_type(values: pl.Series, also: pl.Series, expected: list[object]) -> None:
    assert Vocabulary.fit(values, also=also).values.to_list() == expected


def test_ids_are_exact_where_float_is_not() -> None:
    ids = [2**63 - 1, 2**63 - 2, 2**53, 2**53 + 1, 2**24 + 1]
    assert len({float(i) for i in ids}) < len(ids)  # float would merge them
    vocabulary = Vocabulary.fit(pl.Series(ids))
    rows = vocabulary.encode(pl.Series(ids))
    assert len(set(rows.tolist())) == len(ids)
    assert vocabulary.decode(rows).to_list() == ids


def test_007_is_not_7() -> None:
    text = Vocabulary.fit(pl.Series(["007", "7"]))
    assert text.encode(pl.Series(["007", "7", "07"])).tolist() == [2, 3, 1]
    assert text.encode(pl.Series([7])).tolist() == [3]
    integers = Vocabulary.fit(pl.Series([7]))
    assert integers.encode(pl.Series(["7", "007", "+7", "7.0", " 7"])).tolist() == [2, 1, 1, 1, 1]
    assert integers.encode(pl.Series([str(2**64)])).tolist() == [1]


def test_whole_floats_are_ids_and_others_are_not() -> None:
    assert canonical_ids(pl.Series([1.0, None, float("nan")])).to_list() == [1, None, None]
    with pytest.raises(ValueError, match=r"'price' holds fractions.*declare it as Number"):
        canonical_ids(pl.Series("price", [1.5]))
    with pytest.raises(ValueError, match="beyond 2\\^53"):
        canonical_ids(pl.Series("id", [2.0**53]))
    with pytest.raises(ValueError, match="holds no ids"):
        canonical_ids(pl.Series("x", [[1]]))


def test_integers_beyond_int64_become_text() -> None:
    ids = canonical_ids(pl.Series([2**64 - 1, 1], dtype=pl.UInt64))
    assert ids.to_list() == ["18446744073709551615", "1"]


def test_lists_keep_the_first_real_values_left_aligned() -> None:
    vocabulary = Vocabulary.fit(pl.Series([["a", "b"], ["a"], [], None]))
    assert vocabulary.counts.tolist() == [2, 1]
    lists = pl.Series([["a", None, "b", "a"], [], None, ["", "z"], ["b"]])
    assert vocabulary.encode_lists(lists, 2).tolist() == [[2, 3], [0, 0], [0, 0], [1, 0], [3, 0]]
    assert vocabulary.encode_lists(pl.Series(["a", None]), 2).tolist() == [[2, 0], [0, 0]]


def test_decode_refuses_rows_that_do_not_exist() -> None:
    vocabulary = Vocabulary.fit(pl.Series(["a"]))
    assert vocabulary.decode(np.array([0, 1, 2])).to_list() == [None, None, "a"]
    with pytest.raises(ValueError, match=r"rows must be in 0\.\.2, received -1\.\.3"):
        vocabulary.decode(np.array([-1, 3]))


def test_constructor_refuses_nulls_doubles_and_other_types() -> None:
    one = np.ones(2, dtype=np.int64)
    with pytest.raises(ValueError, match="distinct and not null"):
        Vocabulary(pl.Series(["a", "a"]), one)
    with pytest.raises(ValueError, match="int64 or text, received Float64"):
        Vocabulary(pl.Series([1.0, 2.0]), one)
    with pytest.raises(ValueError, match="one count a value, received 2 for 1"):
        Vocabulary(pl.Series(["a"]), one)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.lists(INT64), st.lists(st.text(max_size=4))), st.integers(1, 3))
def test_round_trips(raw: list[object], min_count: int) -> None:
    dtype = pl.Int64 if raw and isinstance(raw[0], int) else pl.String
    values = pl.Series("v", raw, dtype=dtype)
    vocabulary = Vocabulary.fit(values, min_count=min_count)
    rows = vocabulary.encode(values)
    decoded = vocabulary.decode(rows).to_list()
    for value, row, back in zip(raw, rows.tolist(), decoded, strict=True):
        if value == "":
            assert row == 0
        elif raw.count(value) >= min_count:
            assert row >= 2
            assert back == value
        else:
            assert row == 1
    again = vocabulary_from_arrow(vocabulary.to_arrow())
    assert isinstance(again, Vocabulary)
    assert again.values.equals(vocabulary.values)
    assert again.values.dtype == vocabulary.values.dtype == dtype
    assert again.counts.tolist() == vocabulary.counts.tolist()


def test_order_of_the_rows_does_not_matter() -> None:
    values = pl.Series(np.random.default_rng(0).integers(0, 50, 500))
    assert Vocabulary.fit(values).values.equals(Vocabulary.fit(values.reverse()).values)


def test_hash_rows_are_fixed_for_all_time() -> None:
    vocabulary = HashVocabulary(1000)
    # SplitMix64 finaliser of 7 and of 0, worked out with Python integers below; BLAKE2b of "x" by hashlib.
    assert vocabulary.encode(pl.Series([7, 0, None])).tolist() == [2 + _splitmix(7) % 1000, 2 + _splitmix(0) % 1000, 0]
    assert vocabulary.encode(pl.Series(["x", "", None, "007"])).tolist() == [60, 0, 0, 819]


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@settings(deadline=None, max_examples=60)
@given(st.lists(INT64, min_size=1, max_size=20))
def test_hash_of_an_integer_is_that_of_its_text(ids: list[int]) -> None:
    vocabulary = HashVocabulary(97)
    rows = vocabulary.encode(pl.Series(ids, dtype=pl.Int64))
    assert rows.tolist() == vocabulary.encode(pl.Series([str(i) for i in ids])).tolist()
    assert rows.min() >= 2
    assert rows.max() < vocabulary.size


def test_hash_spreads_evenly() -> None:
    rows = HashVocabulary(16).encode(pl.Series(range(16_000)))
    counts = np.bincount(rows - 2, minlength=16)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_hash_saves_and_refuses() -> None:
    assert vocabulary_from_arrow(HashVocabulary(5).to_arrow()) == HashVocabulary(5)
    with pytest.raises(ValueError, match="at least 1 bucket, received 0"):
        HashVocabulary(0)
    with pytest.raises(ValueError, match="holds no hash vocabulary"):
        HashVocabulary.from_arrow(Vocabulary.fit(pl.Series([1])).to_arrow())
    with pytest.raises(ValueError, match="columns value and count, received x"):
        Vocabulary.from_arrow(pa.table({"x": [1]}))


@pytest.mark.parametrize(
    "values", [pl.Series([42, -7, 2**63 - 1, 0]), pl.Series(["42", "007", "x", "é"]), pl.Series([], dtype=pl.Int64)]
)
@given(
    asked=st.lists(st.sampled_from(["42", "042", "-7", "-0", "0", "9223372036854775807", "x", "é", "007", "", "1e3"]))
)
def test_a_few_texts_are_looked_up_as_a_column_of_them_is(values: pl.Series, asked: list[str]) -> None:
    """Also an integer beyond 64 bits."""
    vocabulary, asked = Vocabulary.fit(values), [*asked, "9223372036854775808"]
    expected = vocabulary.encode(pl.Series(asked, dtype=pl.String)).clip(min=1)
    assert vocabulary.rows_of(asked) == expected.tolist()
