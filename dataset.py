"""Encoded data on disk, and length-bucketed batches of it.

An encoded file (`train.txt.ids`) holds flat memory-mapped arrays: the token ids of all sentences one after another,
the offsets at which each begins, and the labels (class ids, or a teacher's logits). Nothing is padded on disk; a
batch is padded to its own longest sentence. The file's metadata says what made it, so that a stale or foreign
file is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentence_classifier import batches
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from text.arrays import ENCODED_FORMAT, has_fingerprint, open_arrays
from text.labels import NO_LABEL, NO_LABELS, UNKNOWN_LABEL
from util import EncodingInfo, RunInfo, sha256


@dataclass
class Batch:
    """Sentences that are computed together.

    Where several processes share a batch that has too few sentences for all, a process without one gets a sentence
    without a target: it takes part and counts for nothing.

    Attributes:
        input_ids: [B, T] int64, 0 at pad positions.
        attention_mask: [B, T] bool, True at real tokens.
        targets: class ids [B] int64, label sets [B, C] bool, or logits [B, C] float32; None for unlabelled text; of no
            sentence to count for nothing.
        teacher: with a teacher, its logits [B, C], or the Batch of the same sentences as it reads them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor | None = None
    teacher: Any = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies while it computes."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        return replace(self, **{name: function(part) for name, part in vars(self).items() if part is not None})

    def __len__(self) -> int:
        return len(self.input_ids if self.targets is None else self.targets)


def pad(rows: Sequence[np.ndarray], targets: np.ndarray | None = None, multiple: int = 1) -> Batch:
    """A batch of token id rows, padded to the longest, whose length is rounded up to a multiple."""
    ids, mask = batches.pad(rows, multiple)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask),
                 None if targets is None else torch.from_numpy(targets))


class EncodedData:
    """One encoded file, memory-mapped.

    Attributes:
        encoding: what made it.
        lengths: [N] tokens in each sentence.
        targets: [N] int32 class ids, [N, C] uint8 label sets or [N, C] float32 logits.
        unknown: [N] with several labels a sentence, how many of its labels train.txt lacks; NO_LABELS: it has none.
        has_logits: whether the targets are a teacher's logits.
        multi_label: whether a sentence may have several labels.
        length_multiple: batches are padded to a multiple of it: a GPU chooses kernels anew for each length.

    Raises:
        InputError: no such file, a damaged one, or one whose source text has changed since.
    """

    length_multiple = 1

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            more = f" --augmented --augmented_filename={path.stem}" if path.stem.startswith("augmented") else ""
            raise InputError(f"{path}: no such file; run preprocess.py{more} with the same --config and --data_dir "
                             "first.")
        arrays, metadata = open_arrays(path)
        try:
            if metadata["format"] != ENCODED_FORMAT or not {"token_ids", "offsets"} < set(arrays):
                raise ValueError
            self.encoding = EncodingInfo.from_json(json.loads(metadata["encoding"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: not encoded by this version of preprocess.py; run it again.") from None
        self.path = path
        self.token_ids = arrays["token_ids"]
        self.offsets = arrays["offsets"]
        self.has_logits, self.multi_label = "logits" in arrays, self.encoding.multi_label
        sets = arrays.get("label_sets")
        self.unknown = None if sets is None else sets[:, -1]
        self.targets = arrays["logits"] if self.has_logits else arrays["labels"] if sets is None else sets[:, :-1]
        self.lengths = np.diff(self.offsets)
        self.source = path.with_suffix("")
        if self.source.exists() and sha256(self.source) != self.encoding.source_sha256:
            raise InputError(f"{path}: {self.source} has changed since it was encoded; run preprocess.py again.")

    @property
    def labels(self) -> Labels:
        """The label map that the file was encoded with."""
        return Labels(self.encoding.labels)

    @property
    def unknown_labels(self) -> int:
        """How many sentences have a label that train.txt lacks."""
        if self.unknown is not None:
            return int(np.isin(self.unknown, (0, NO_LABELS), invert=True).sum())
        return 0 if self.has_logits else int((self.targets == UNKNOWN_LABEL).sum())

    @property
    def lacks_labels(self) -> bool:
        """Whether it is text without labels."""
        if self.has_logits:
            return False
        return bool((self.targets == NO_LABEL).any() if self.unknown is None else (self.unknown == NO_LABELS).any())

    def __len__(self) -> int:
        return len(self.lengths)

    def class_ids(self) -> np.ndarray:
        """The class of each example [N], its label or the largest logit; with several, which it has [N, C] bool."""
        if self.multi_label:
            return np.asarray(self.targets) > 0
        return self.targets.argmax(1) if self.has_logits else np.asarray(self.targets)

    def word_counts(self) -> Tensor:
        """How often each word of the training data occurs here: [rows of words seen in training]."""
        counts = np.zeros(self.encoding.seen_rows, dtype=np.int64)
        for start in range(0, len(self.token_ids), 1 << 24):
            part = self.token_ids[start : start + (1 << 24)]
            counts += np.bincount(part[part < len(counts)], minlength=len(counts))
        return torch.from_numpy(counts)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The token ids of the examples at `indices`."""
        return [self.token_ids[self.offsets[i] : self.offsets[i + 1]] for i in indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of the examples at `indices`; of none, a sentence without a target, see Batch."""
        rows = self.rows(indices or [0])
        targets = self.targets[np.asarray(indices, dtype=np.int64)]
        kind = np.float32 if self.has_logits else np.bool_ if self.multi_label else np.int64
        return pad(rows, targets.astype(kind), self.length_multiple)


def check_same_data(data: EncodedData, run: RunInfo, path: str) -> None:
    """Refuse data that were encoded for another model."""
    if data.labels != run.labels:
        raise InputError(f"{data.path}: its labels ({', '.join(data.labels.names)}) are not those of "
                         f"{path} ({', '.join(run.labels.names)}).")
    for fact, what in (("vocab_sha256", "vocabulary"), ("tokenizer", "tokenizer"), ("lowercase", "lowercase setting"),
                       ("n_ctx", "n_ctx"), ("multi_label", "number of labels a sentence")):
        if getattr(data.encoding, fact) != getattr(run.encoding, fact):
            raise InputError(f"{data.path}: encoded with another {what} than {path} was trained with; run "
                             "preprocess.py as for that model (evaluate.py --enable_inference reads raw text).")


class BucketSampler:
    """Batches of sentences of like length, so that little of a batch is padding.

    Each epoch shuffles all examples, sorts them by length within pools of `pool` batches, cuts the pools into
    batches and shuffles these. The order is a function of (seed, epoch) alone, so that a resumed run finds its place,
    and so that runs whose optimizer steps take equally many sentences take the same ones, see `shard`.

    Args:
        lengths: [N] tokens in each sentence.
        shuffle: False sorts everything by length, longest first (so that memory runs out at once or never).
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0, shuffle: bool = True,
                 pool: int = 100) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.pool = pool
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def batches(self) -> list[np.ndarray]:
        """The epoch's batches, each an array of example indices."""
        if not self.shuffle:
            return list(batches.by_length(self.lengths, self.batch_size))
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        size = self.batch_size * self.pool
        pools = [order[i : i + size] for i in range(0, len(order), size)]
        order = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in pools])
        found = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [found[i] for i in random.permutation(len(found))]

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches())


def shard(batch: np.ndarray, size: int, processes: int = 1, process: int = 0) -> list[list[int]]:
    """One process's part of a batch, in parts of at most `size` sentences that are computed one after another.

    Every sentence is in exactly one part of one process. All processes get equally many parts, for they compute in
    step; parts differ by at most one sentence in size, and may be empty.
    """
    parts = -(-len(batch) // (size * processes))
    return [part.tolist() for part in np.array_split(batch[process::processes], parts)]


def prefetch(read: Callable[[Sequence[int]], Batch], batches: Iterable[Sequence[int]],
             pin_memory: bool = False) -> Iterator[Batch]:
    """The batches of the examples at these indices, each assembled while the one before it is computed.

    Pinned memory is for asynchronous copies to a GPU.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting = None
        for indices in chain(batches, [None]):
            ready, waiting = waiting, None if indices is None else worker.submit(read, indices)
            if ready:
                yield ready.result().pin_memory() if pin_memory else ready.result()


def load_table(path: str | Path, expected: str) -> Tensor:
    """Map a table of word vectors, embedding.npy, into memory: [V, D] float32; preprocess.py recorded its fingerprint.

    Raises:
        InputError: no such table, or another one.
    """
    try:
        table = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run preprocess.py first.") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a whole table of vectors ({error}); run preprocess.py again.") from None
    if (not isinstance(table, np.ndarray) or table.dtype != np.float32 or table.ndim != 2
            or not has_fingerprint(table, expected)):
        raise InputError(f"{path}: not the vectors that the data were encoded with; run preprocess.py again.")
    return torch.from_numpy(table)


def find_table(paths: Sequence[Path], expected: str) -> Tensor:
    """The first of these files that is the table of word vectors with this fingerprint; see load_table."""
    for path in paths[:-1]:
        with contextlib.suppress(InputError):
            return load_table(path, expected)
    return load_table(paths[-1], expected)
