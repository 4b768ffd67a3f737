from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hooks.columns import CODED, NONE, each_distinct, in_pieces, ints, is_text, plain, take_rows

TEXTS = ["a", None, "b"]


@pytest.mark.parametrize(
    "texts",
    [pa.array(TEXTS, CODED), pa.chunked_array([pa.array(TEXTS[:1], CODED), pa.array(TEXTS[1:], CODED)])],
    ids=["one array", "chunks"],
)
def test_texts_are_taken_and_each_is_held_once(texts):
    taken = take_rows(texts, np.tile([0, 2, NONE, 1, 2], 100_000))
    assert taken.type == CODED
    assert taken.to_pylist() == ["a", "b", None, None, "b"] * 100_000
    assert taken.nbytes < 3_000_000


def test_no_texts_are_no_rows():
    assert take_rows(pa.array([], CODED), np.array([], np.int64)).to_pylist() == []
    assert take_rows(pa.chunked_array([], CODED), np.array([NONE])).to_pylist() == [None]


def test_a_value_of_minus_one_is_no_null():
    assert take_rows(pa.array([-1, 7]), np.array([1, NONE, 0])).to_pylist() == [7, None, -1]


def test_integers_of_a_column():
    assert ints(pa.chunked_array([[3, None], [5]])).tolist() == [3, NONE, 5]
    assert ints(pa.chunked_array([[3], [None]]), 0).tolist() == [3, 0]


@pytest.mark.parametrize("kind", [pa.string(), CODED])
def test_each_distinct_value_is_looked_up_once(kind):
    asked = []

    def look_up(texts):
        asked.extend(texts)
        return [{"b": "two", "a": "one", "c": "one"}[text] for text in texts]

    column = pa.chunked_array([pa.array(["b", "a", "b"], kind), pa.array(["c", "a", None], kind)])
    found = each_distinct(look_up, column)
    assert found.to_pylist() == ["two", "one", "two", "one", "one", None]
    assert found.unique().to_pylist() == ["two", "one", None]
    assert sorted(asked) == ["a", "b", "c"]
    assert each_distinct(look_up, pa.chunked_array([], kind)).to_pylist() == []


def test_where_a_text_stands():
    column = pa.chunked_array([pa.array(["a", None], CODED), pa.array(["b", "a"], CODED)])
    assert is_text(column, "a").to_pylist() == [True, None, False, True]
    assert is_text(column, "z").to_pylist() == [False, None, False, False]


def test_plain_texts_make_no_categories():
    table = pa.table({"name": pa.array(TEXTS, CODED), "count": [1, 2, 3]})
    assert plain(table).schema.types == [pa.string(), pa.int64()]
    assert plain(table).to_pylist() == table.to_pylist()


@pytest.mark.parametrize("rows", [0, 1, 65_536, 200_001])
def test_what_is_computed_in_pieces_is_what_is_computed_at_once(rows):
    one, other = np.arange(rows), np.arange(rows)[::-1]
    assert (in_pieces(lambda a, b: a * 3 - b, one, other) == one * 3 - other).all()
