"""Encoded files that are refused, and batches that visit everything once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Place
from helpers import write_lines
from hypothesis import given
from hypothesis import strategies as st

from dataset import BucketSampler, EncodedData, load_table, pad, prefetch, shard
from sentence_classifier.errors import InputError
from text.arrays import ArrayWriter, fingerprint

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=300).map(np.array)


@given(lengths=lengths, size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5), shuffle=st.booleans())
def test_each_example_once_an_epoch(lengths: np.ndarray, size: int, seed: int, epoch: int, shuffle: bool) -> None:
    sampler = BucketSampler(lengths, size, seed, shuffle, pool=3)
    sampler.epoch = epoch
    batches = list(sampler)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one may be smaller


@given(lengths=lengths, size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_order_is_a_function_of_seed_and_epoch(lengths: np.ndarray, size: int, seed: int, epoch: int) -> None:
    worn, fresh = BucketSampler(lengths, size, seed), BucketSampler(lengths, size, seed)
    list(worn)
    torch.manual_seed(seed)
    np.random.seed(seed)
    worn.epoch = fresh.epoch = epoch
    assert list(worn) == list(fresh)


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = BucketSampler(np.arange(1, 200) % 17 + 1, 8, seed)
            sampler.epoch = epoch
            orders.add(str(list(sampler)))
    assert len(orders) == 9


def test_little_of_a_batch_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 2000)
    padded = sum(len(batch) * lengths[batch].max() for batch in BucketSampler(lengths, 32))
    assert padded < 1.1 * lengths.sum()


def test_unshuffled_longest_first() -> None:
    lengths = np.array([3, 9, 1, 9, 4])
    assert [list(batch) for batch in BucketSampler(lengths, 2, shuffle=False)] == [[1, 3], [4, 0], [2]]


@given(count=st.integers(1, 200), size=st.integers(1, 9), processes=st.integers(1, 5))
def test_shares(count: int, size: int, processes: int) -> None:
    shares = [shard(np.arange(count), size, processes, process) for process in range(processes)]
    assert sorted(place for parts in shares for part in parts for place in part) == list(range(count))
    assert len({len(parts) for parts in shares}) == 1  # they compute in step
    assert max(len(part) for parts in shares for part in parts) <= size
    if processes == 1:
        assert all(part for part in shares[0])


def test_who_has_no_sentence_gets_one_that_counts_for_nothing(encoded: Place) -> None:
    data = EncodedData(encoded.data / "train.txt.ids")
    (idle,) = prefetch(data.batch, shard(np.array([7]), 4, processes=2, process=1))
    assert len(idle) == 0 and idle.input_ids.shape[0] == 1 and idle.attention_mask.any()


def test_pad() -> None:
    batch = pad([np.array([4, 5]), np.array([6]), np.array([7, 8, 9])], np.array([1, 0, 2]))
    assert batch.input_ids.tolist() == [[4, 5, 0], [6, 0, 0], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert batch.targets.tolist() == [1, 0, 2] and len(batch) == 3


def test_loader_leaves_torchs_random_state_alone(encoded: Place) -> None:
    data = EncodedData(encoded.data / "train.txt.ids")
    state = torch.get_rng_state()
    batches = list(prefetch(data.batch, BucketSampler(data.lengths, 7)))
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(map(len, batches)) == len(data)
    assert all(batch.input_ids.shape[1] == batch.attention_mask.sum(1).max() for batch in batches)


# ------------------------------------------------------------------------------------------------- what is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"token_ids": torch.zeros(3)}, path)


def foreign(path: Path) -> None:
    with ArrayWriter(path, {"table": ("f4", (2,))}) as writer:
        writer.append("table", np.zeros((4, 2), np.float32))


def stale(path: Path) -> None:
    write_lines(path.with_suffix(""), [("another sentence", "PlayMusic")])


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, pickled, foreign, stale, Path.unlink])
def test_damaged_encodings_are_refused(encoded: Place, damage: Callable[[Path], None]) -> None:
    path = encoded.data / "valid.txt.ids"
    damage(path)
    with pytest.raises(InputError, match=str(path)):
        EncodedData(path)


def other_rows(path: Path) -> None:
    table = np.load(path)
    np.save(path, np.random.default_rng(0).normal(size=table.shape).astype(np.float32))


def other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


def object_array(path: Path) -> None:
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)


@pytest.mark.parametrize("damage", [truncate, empty, pickled, other_rows, other_type, object_array, Path.unlink])
def test_other_tables_are_refused(encoded: Place, damage: Callable[[Path], None]) -> None:
    path = encoded.data / "embedding.npy"
    expected = fingerprint(np.load(path))
    assert load_table(path, expected).dtype == torch.float32
    damage(path)
    with pytest.raises(InputError, match=str(path)):
        load_table(path, expected)


def test_lengths_are_rounded_up_for_a_gpu(encoded: Place) -> None:
    data = EncodedData(encoded.data / "train.txt.ids")
    plain = data.batch(range(5))
    data.length_multiple = 8
    rounded = data.batch(range(5))
    length = plain.input_ids.shape[1]
    assert rounded.input_ids.shape[1] == -(-length // 8) * 8
    assert torch.equal(rounded.input_ids[:, :length], plain.input_ids) and not rounded.attention_mask[:, length:].any()
