"""Batches of token id rows: sentences of like length together, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The places of sentences of these lengths [N] in batches, the longest first, so that little of one is padding.

    `answers[places] = ...` brings the answers back to their places. The last batch may be smaller.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Sequence[int] | np.ndarray], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] int64, 0 at pad positions, and the mask [B, T], True at real tokens.

    T is the longest row's length, rounded up to a multiple of `multiple`.
    """
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask
