"""Batches of token id rows: sentences of like length together, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The places of sentences in batches of like length, the longest first, so that little of a batch is padding.

    `answers[places] = ...` brings the answers back to their places.

    Args:
        lengths: [N] tokens in each sentence.
        batch_size: sentences a batch; the last one may be smaller.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Sequence[int] | np.ndarray], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] int64, 0 at pad positions, and the mask [B, T], True at real tokens.

    Args:
        multiple: T is the longest row's length, rounded up to a multiple of it.
    """
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask
