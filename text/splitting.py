"""Splitting off: shuffled by a seed, each label in proportion, the rows of one sentence on one side. Memory stays flat.

Rows go to disk by a hash of their sentence that the seed decides about. In the order of the hashes they are shuffled,
and those of one sentence stand together.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, NamedTuple

from sentence_classifier.errors import InputError
from text.report import hash_sentence

logger = logging.getLogger(__name__)

BUCKETS = 256  # files of sentences by their hash; one at a time is in memory
HASH_DIGITS = 16


class Sentence(NamedTuple):
    """A row to be dealt out, or one that is `given`: it has its place in another file."""

    given: bool
    sentence: str
    label: str


def deal_out(rows: Iterable[Sentence], shares: Mapping[str, float], rest: str, seed: int, drop_duplicates: bool,
             folder: Path, stratum: Callable[[str], str] = str) -> Iterator[tuple[str, str, str]]:
    """Deal rows out to splits: split, sentence, label. A sentence goes with all its rows to one of them.

    Args:
        shares: of each label's sentences, by split.
        rest: the split that gets what is left.
        drop_duplicates: leave out a row that stood there before, and one whose sentence is also given.
        folder: for temporary files.
        stratum: from a row's label to the one that is split in proportion.

    Raises:
        InputError: too few rows.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(BUCKETS)]
        key = str(seed).encode()
        for row in rows:
            digest = hash_sentence(row.sentence, key)
            line = f"{digest:0{HASH_DIGITS}x}{row.given:d}{row.sentence}\t{row.label}\n"
            files[digest % BUCKETS].write(line.encode())
        dropped = Counter[str]()
        sizes = Counter(stratum(group[0].label) for group in _to_deal(files, drop_duplicates, dropped))
        left = apportion(sizes, shares)
        for group in _to_deal(files, drop_duplicates, Counter()):
            label = stratum(group[0].label)
            split = next((name for name in shares if left[name][label]), rest)
            if split != rest:
                left[split][label] -= 1
            yield from ((split, row.sentence, row.label) for row in group)
        for what, count in dropped.items():
            if count:
                logger.info("[duplicates] %d sentences %s were left out", count, what)


def _to_deal(files: Iterable[IO[bytes]], drop_duplicates: bool, dropped: Counter[str]) -> Iterator[list[Sentence]]:
    """The rows of each sentence that are to be dealt out; what is dropped is counted."""
    for group in _groups(files):
        rows = [row for row in group if not row.given]
        if drop_duplicates and rows:
            if len(rows) < len(group):
                dropped["that --valid or --test has"] += len(rows)
                continue
            once = list({row.label: row for row in reversed(rows)}.values())[::-1]
            dropped["that stood there before with the same label"] += len(rows) - len(once)
            rows = once
        if rows:
            yield rows


def _groups(files: Iterable[IO[bytes]]) -> Iterator[list[Sentence]]:
    """The rows of each sentence, in the order in which they came."""
    hashed = itemgetter(slice(HASH_DIGITS))
    for file in files:
        file.seek(0)
        for _, group in groupby(sorted(file, key=hashed), hashed):
            rows = (line.decode().removesuffix("\n")[HASH_DIGITS:] for line in group)
            yield [Sentence(row[0] == "1", *row[1:].split("\t")) for row in rows]


def apportion(sizes: Counter[str], shares: Mapping[str, float], spare: int = 1) -> dict[str, Counter[str]]:
    """How many sentences of each label go to each split: its share, in whole numbers, by the largest remainders.

    Args:
        sizes: sentences of each label.
        shares: by split; a split with a share gets at least one sentence.
        spare: so many sentences of each label are left.

    Raises:
        InputError: too few sentences.
    """
    rest = Counter(sizes)
    dealt: dict[str, Counter[str]] = {}
    for name, share in shares.items():
        exact = {label: share * count for label, count in sizes.items()}
        quota = Counter({label: min(math.floor(part), rest[label] - spare) for label, part in exact.items()})
        missing = (max(1, round(share * sizes.total())) if share else 0) - quota.total()
        for label in sorted(exact, key=lambda label: (quota[label] - exact[label], -sizes[label], label)):
            if missing > 0 and quota[label] < rest[label] - spare:
                quota[label] += 1
                missing -= 1
        if share and not quota.total():
            raise InputError(f"{sizes.total()} different sentences with {len(sizes)} labels are too few to split off "
                             f"{name}.")
        rest.subtract(quota)
        dealt[name] = quota
    return dealt
