from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hooks.columns import NONE, encode_texts, take_ints, take_texts


@pytest.mark.parametrize(
    "texts", [pa.array(["a", None, "b"]), pa.chunked_array([["a"], [None, "b"]])], ids=["one array", "chunks"]
)
def test_texts_are_taken_in_pieces(texts):
    rows = np.tile([0, 2, NONE, 1, 2], 100_000)
    taken = take_texts(texts, rows)
    assert taken.num_chunks > 1
    assert taken.to_pylist() == ["a", "b", None, None, "b"] * 100_000


def test_no_texts_are_no_rows():
    assert take_texts(pa.array([], pa.string()), np.array([], np.int64)).to_pylist() == []
    assert take_texts(pa.chunked_array([], pa.string()), np.array([NONE])).to_pylist() == [None]


def test_each_distinct_text_is_kept_once():
    distinct, rows = encode_texts(pa.chunked_array([["b", "a"], ["c", "a", None]]))
    assert distinct.to_pylist() == ["b", "a", "c"]
    assert rows.tolist() == [0, 1, 2, 1, NONE]


def test_a_value_of_minus_one_is_no_null():
    assert take_ints(np.array([-1, 7]), np.array([1, NONE, 0])).to_pylist() == [7, None, -1]
