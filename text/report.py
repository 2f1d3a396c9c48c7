"""What a careful user wants to know of a data set: sizes, lengths, labels, coverage, repeats. Memory stays flat."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from sentence_classifier.tokenizers import normalize
from text.labels import NAMED


@dataclass
class SplitReport:
    """Figures of one file.

    Attributes:
        lengths: number of sentences by number of tokens, before truncation.
        labels: number of sentences by label id (empty for logits).
        unknown_labels: number of sentences whose label train.txt lacks.
        unknown_names: the first NAMED of these labels.
        without_label: number of sentences without any label, where they may have several.
        quoted: number of sentences in double quotes.
        first_line: sentence and label of line 1; empty where it is no example, or holds logits.
    """

    name: str
    lengths: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    truncated: int = 0
    unknown_words: int = 0
    skipped: int = 0
    unknown_labels: int = 0
    unknown_names: list[str] = field(default_factory=list)
    without_label: int = 0
    quoted: int = 0
    first_line: tuple[str, str] = ("", "")

    def add(self, other: SplitReport) -> None:
        """Take in the figures of another part of the file."""
        for counted in ("lengths", "labels", "truncated", "unknown_words", "skipped", "unknown_labels", "without_label",
                        "quoted"):
            setattr(self, counted, getattr(self, counted) + getattr(other, counted))
        self.unknown_names = list(dict.fromkeys(self.unknown_names + other.unknown_names))[:NAMED]

    @property
    def sentences(self) -> int:
        """How many sentences there are."""
        return sum(self.lengths.values())

    @property
    def words(self) -> int:
        """How many running words there are."""
        return sum(length * count for length, count in self.lengths.items())

    def median_length(self) -> int:
        """The (lower) median of the sentences' lengths."""
        lengths = sorted(self.lengths)
        return lengths[np.searchsorted(np.cumsum([self.lengths[n] for n in lengths]), (self.sentences + 1) // 2)]

    def size_line(self) -> str:
        """How many sentences there are, and of how many words."""
        return (f"{self.sentences} sentences, {self.words} words; words a sentence: mean "
                f"{self.words / self.sentences:.2f}, median {self.median_length()}, min {min(self.lengths)}, max "
                f"{max(self.lengths)}")

    def labels_line(self, names: tuple[str, ...]) -> str:
        """How many sentences each label has."""
        counts = ", ".join(f"{name} {self.labels[number]}" for number, name in enumerate(names[:30]))
        return f"labels: {counts}" + (f" and {len(names) - 30} more labels" if len(names) > 30 else "")

    def lines(self, label_names: tuple[str, ...], n_ctx: int) -> list[str]:
        """The report, a line each."""
        said = [self.size_line(),
                f"words that the vocabulary lacks: {self.unknown_words} ({self.unknown_words / self.words:.2%})"]
        if self.labels:
            said.append(self.labels_line(label_names))
        if self.without_label:
            said.append(f"{self.without_label} sentences have no label")
        if self.truncated:
            said.append(f"{self.truncated} sentences are longer than n_ctx={n_ctx} and were truncated")
        if self.skipped:
            said.append(f"{self.skipped} bad lines were skipped")
        return [f"[{self.name}] {line}" for line in said]


RECORD = np.dtype([("hash", "<u8"), ("line", "<u8"), ("label", "<i4"), ("split", "<i4")])
_PARTITIONS = 64


def hash_sentence(sentence: str, key: bytes = b"") -> int:
    """What DuplicateFinder knows a sentence by: 64 bits, to which case, blanks and the Unicode form do not matter."""
    words = " ".join(normalize(sentence).lower().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8, key=key).digest(), "little")


class DuplicateFinder:
    """Finds sentences that stand in two splits, twice in one, or with two labels, in memory that stays flat.

    Each sentence leaves a 64-bit hash on disk, in one of 64 files chosen by the hash; `report` sorts one file at a
    time. (Two different sentences share a hash with a probability of about N^2 / 4e19.)
    """

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._files: list[IO[bytes]] = [self._stack.enter_context(tempfile.TemporaryFile(dir=folder))
                                        for _ in range(_PARTITIONS)]
        self.names: list[str] = []

    def add_split(self, name: str) -> None:
        """Begin with the next file."""
        self.names.append(name)

    def add(self, hashes: np.ndarray, lines: np.ndarray, class_ids: np.ndarray | int) -> None:
        """Take in sentences of the current file.

        Args:
            hashes: [N], see hash_sentence.
            lines: [N], their numbers.
            class_ids: [N], below 0 where there is none.
        """
        records = np.empty(len(hashes), dtype=RECORD)
        records["hash"], records["line"], records["label"] = hashes, lines, class_ids
        records["split"] = len(self.names) - 1
        partition = records["hash"] % _PARTITIONS
        for number in np.unique(partition):
            self._files[number].write(records[partition == number].tobytes())

    def report(self) -> list[str]:
        """The findings, a line each. Ends the object's use."""
        shared: Counter[tuple[int, int]] = Counter()  # pairs of splits; a split with itself: repeats
        conflicts: Counter[int] = Counter()
        examples: dict[Any, str] = {}  # the first of each
        with self._stack:
            for group in self._groups():
                splits = group["split"]
                for first in np.unique(splits).tolist():
                    mine = group[splits == first]
                    for second in range(first, len(self.names)):
                        others = mine[1:] if first == second else group[splits == second]
                        if len(others):
                            shared[first, second] += len(others)
                            examples.setdefault((first, second), self._places(others[0], mine[0]))
                    known = mine[mine["label"] >= 0]
                    differing = known[known["label"] != known["label"][:1]]
                    if len(differing):
                        conflicts[first] += 1
                        examples.setdefault(first, self._places(known[0], differing[0]))
        said = []
        for (first, second), count in sorted(shared.items()):
            what = "repeat an earlier one" if first == second else f"stand in {self.names[first]} too"
            said.append(f"[{self.names[second]}] {count} sentences {what} (such as {examples[first, second]})")
        for split, count in sorted(conflicts.items()):
            said.append(f"[{self.names[split]}] {count} sentences stand with two labels (such as {examples[split]})")
        return said

    def _groups(self) -> Iterator[np.ndarray]:
        """The records of each sentence that stands in several places."""
        for file in self._files:
            file.seek(0)
            records = np.frombuffer(file.read(), dtype=RECORD)
            records = records[np.lexsort((records["line"], records["split"], records["hash"]))]
            borders = np.flatnonzero(np.diff(records["hash"])) + 1
            starts, ends = np.append(0, borders), np.append(borders, len(records))
            for number in np.flatnonzero(ends - starts > 1):
                yield records[starts[number] : ends[number]]

    def _places(self, *records: np.void) -> str:
        return ", ".join(f"{self.names[record['split']]}:{record['line']}" for record in records)
