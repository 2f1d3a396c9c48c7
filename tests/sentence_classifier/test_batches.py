"""Batches of like lengths, and padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sentence_classifier.batches import by_length, pad


@given(lengths=st.lists(st.integers(1, 9), max_size=40), batch_size=st.integers(1, 12))
def test_by_length(lengths: list[int], batch_size: int) -> None:
    batches = list(by_length(lengths, batch_size))
    order = [place for batch in batches for place in batch.tolist()]
    assert order == sorted(range(len(lengths)), key=lambda place: -lengths[place])  # sorted() is stable
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert not batches or 1 <= len(batches[-1]) <= batch_size


@given(rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=7), min_size=1, max_size=9))
def test_pad(rows: list[list[int]]) -> None:
    ids, mask = pad(rows)
    assert ids.dtype == np.int64 and mask.dtype == bool and ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == rows
    assert mask.sum() == sum(map(len, rows)) and not ids[~mask].any() and (np.diff(mask.astype(int), axis=1) <= 0).all()
