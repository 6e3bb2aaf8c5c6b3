"""From columns of a table to the columns of `Batch.ids` and `Batch.numbers`, for users, items and contexts alike.

The Dataset encodes its tables with these functions when it is built and the server encodes the context of a request
with them, so training and serving cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from funnelrec.core.schema import Category, CategorySpec, Field, Number, NumberSpec, Schema, Side, Spec
from funnelrec.data.numeric import NumericTransform, fit_transform_for
from funnelrec.data.vocabulary import HashVocabulary, Vocabulary

__all__ = ["compile_spec", "encode_fields", "fit_fields", "fuse", "unfuse"]

Vocabularies = Mapping[str, Vocabulary | HashVocabulary]
Transforms = Mapping[str, NumericTransform]
Int32Array = npt.NDArray[np.int32]


def fuse(codes: Int32Array, field: CategorySpec) -> Int32Array:
    """Vocabulary rows of a field to rows of the fused table; padding stays 0."""
    return np.where(codes == 0, 0, codes + (field.offset - 1)).astype(np.int32)


def unfuse(ids: Int32Array, field: CategorySpec) -> Int32Array:
    """Rows of the fused table back to vocabulary rows of their field; the inverse of `fuse`."""
    return np.where(ids == 0, 0, ids - (field.offset - 1)).astype(np.int32)


def _floats(values: pl.Series) -> npt.NDArray[np.float64]:
    """A numeric column as float64, NaN where it is null."""
    try:
        return values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    except (pl.exceptions.InvalidOperationError, pl.exceptions.ComputeError):
        raise ValueError(
            f"column '{values.name}' of type {values.dtype} holds values that are no numbers; declare it as Category "
            "or mend the column"
        ) from None


def fit_fields(
    table: pl.DataFrame, fields: Sequence[Field]
) -> tuple[dict[str, Vocabulary | HashVocabulary], dict[str, NumericTransform]]:
    """Vocabularies and transforms of the fields, fitted on `table`: give it the training rows alone."""
    vocabularies: dict[str, Vocabulary | HashVocabulary] = {}
    transforms: dict[str, NumericTransform] = {}
    for field in fields:
        if isinstance(field, Category):
            column = table[field.name]
            if not field.many and isinstance(column.dtype, pl.List | pl.Array):
                raise ValueError(f"column '{field.name}' holds lists; declare Category('{field.name}', many=True)")
            vocabularies[field.name] = (
                Vocabulary.fit(column, min_count=field.min_count)
                if field.hash_buckets is None
                else HashVocabulary(field.hash_buckets)
            )
        elif isinstance(field, Number):
            transforms[field.name] = fit_transform_for(field, _floats(table[field.name]))
    return vocabularies, transforms


def encode_fields(
    table: pl.DataFrame, fields: Sequence[Field], spec: Spec, vocabularies: Vocabularies, transforms: Transforms
) -> tuple[Int32Array, npt.NDArray[np.float32]]:
    """The fields of each row: ids int32 [n, columns], offset into the fused table, and numbers float32 [n, columns]."""
    categories = {c.name: c for c in spec.categories}
    ids, numbers = [np.empty((table.height, 0), np.int32)], [np.empty((table.height, 0), np.float32)]
    for field in fields:
        if isinstance(field, Category):
            vocabulary, column = vocabularies[field.name], table[field.name]
            if field.many:
                codes = vocabulary.encode_lists(column, field.max_values)
            else:
                codes = vocabulary.encode(column)[:, None]  # (n, 1)
            ids.append(fuse(codes, categories[field.name]))
        elif isinstance(field, Number):
            numbers.append(transforms[field.name].apply(_floats(table[field.name])))
    return np.concatenate(ids, axis=1), np.concatenate(numbers, axis=1)


def compile_spec(schema: Schema, vocabularies: Vocabularies, transforms: Transforms) -> Spec:
    """Sizes and column positions: user columns, item columns, context columns; ids of users and items first."""
    sides: tuple[tuple[Side, str | None, tuple[Field, ...]], ...] = (
        ("user", schema.user, schema.users),
        ("item", schema.item, schema.items),
        ("context", None, schema.context),
    )
    categories: list[CategorySpec] = []
    numbers: list[NumberSpec] = []
    offset, id_column, number_column = 1, 0, 0
    for side, key, fields in sides:
        for field in (*((Category(key),) if key else ()), *fields):
            if isinstance(field, Category):
                rows, width = vocabularies[field.name].size, field.max_values if field.many else 1
                categories.append(CategorySpec(field.name, side, rows, offset, id_column, id_column + width))
                offset, id_column = offset + rows - 1, id_column + width
            elif isinstance(field, Number):
                width = transforms[field.name].width
                numbers.append(NumberSpec(field.name, side, number_column, number_column + width))
                number_column += width
    for past in schema.past:  # the last columns of the context, computed when a batch is made
        width = transforms[past.name].width
        numbers.append(NumberSpec(past.name, "context", number_column, number_column + width))
        number_column += width
    if offset > np.iinfo(np.int32).max:
        raise ValueError(f"the fused table would need {offset} rows, more than int32 holds; use hash_buckets")
    return Spec(
        categories=tuple(categories),
        numbers=tuple(numbers),
        num_users=vocabularies[schema.user].size if schema.user else 0,
        num_items=vocabularies[schema.item].size if schema.item else 0,
    )
