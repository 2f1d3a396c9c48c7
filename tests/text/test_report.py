"""Figures of a data set against a naive count."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text import report as corpus
from text.report import DuplicateFinder, SplitReport, hash_sentence

labelled = st.tuples(st.sampled_from(["a", "b", "a b", "ab", "c d e"]), st.integers(-1, 2))
splits = st.lists(st.lists(labelled, max_size=12), min_size=1, max_size=3)


def naive(data: list[list[tuple[str, int]]]) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """How many sentences of the second split stand in the first (or earlier in it), and how many have two labels."""
    shared: Counter[tuple[int, int]] = Counter()
    conflicts: Counter[int] = Counter()
    for first, second in combinations_with_replacement(range(len(data)), 2):
        for place, (sentence, _) in enumerate(data[second]):
            earlier = data[first][:place] if first == second else data[first]
            shared[first, second] += any(sentence == other for other, _ in earlier)
    for split, lines in enumerate(data):
        labels: dict[str, set[int]] = {}
        for sentence, label in lines:
            labels.setdefault(sentence, set()).update({label} - {-1})
        conflicts[split] = sum(len(found) > 1 for found in labels.values())
    return {k: v for k, v in shared.items() if v}, {k: v for k, v in conflicts.items() if v}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repeats")


@settings(max_examples=50)
@given(data=splits)
def test_repeats_against_a_naive_count(folder: Path, data: list[list[tuple[str, int]]]) -> None:
    repeats = DuplicateFinder(folder)
    names = [f"split{number}" for number in range(len(data))]
    for name, lines in zip(names, data, strict=True):
        repeats.add_split(name)
        for start in range(0, len(lines), 5):
            some = lines[start : start + 5]
            repeats.add(np.array([hash_sentence(sentence) for sentence, _ in some], np.uint64),
                        np.arange(start + 1, start + 1 + len(some)), np.array([label for _, label in some]))
    shared: dict[tuple[int, int], int] = {}
    conflicts: dict[int, int] = {}
    for line in repeats.report():
        name, count, rest = re.fullmatch(r"\[(\w+)] (\d+) sentences (.*)", line).groups()
        split = names.index(name)
        places = [(names.index(n), int(place) - 1) for n, place in re.findall(r"(split\d):(\d+)", rest)]
        (one, label), (other, other_label) = (data[where][place] for where, place in places)
        assert one == other, line  # the example that is named is one
        if "two labels" in rest:
            conflicts[split] = int(count)
            assert label != other_label and places[0][0] == places[1][0] == split
        elif "repeat" in rest:
            shared[split, split] = int(count)
        else:
            shared[names.index(re.search("in (split.) too", rest)[1]), split] = int(count)
    assert (shared, conflicts) == naive(data)


def test_repeats_write_to_disk_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_PARTITIONS", 2)
    repeats = DuplicateFinder(tmp_path)
    repeats.add_split("one")
    numbers = np.arange(70_000)
    hashes = np.array([hash_sentence(str(number % 69_000)) for number in numbers], np.uint64)
    for part in np.array_split(numbers, 3):
        repeats.add(hashes[part], part + 1, 0)
    (line,) = repeats.report()
    assert line.startswith("[one] 1000 sentences repeat an earlier one (such as one:")
    assert not list(tmp_path.iterdir())


@settings(max_examples=50)
@given(sentence=st.text(st.sampled_from("Aé가각 각\u1100\u1161\u11a8\u0301e\u0327")))
def test_case_blanks_and_unicode_form_do_not_matter(sentence: str) -> None:
    other = unicodedata.normalize("NFD", f" {sentence.upper().lower()}  ".replace(" ", "\u00a0"))
    assert hash_sentence(other) == hash_sentence(sentence)


def test_split_report() -> None:
    report = SplitReport("train.txt", Counter({3: 2, 10: 1, 1: 1}), Counter({0: 3, 1: 1}), truncated=1,
                         unknown_words=2, skipped=4)
    assert (report.sentences, report.words, report.median_length()) == (4, 17, 3)
    said = "\n".join(report.lines(("yes", "no"), 5))
    assert "4 sentences, 17 words" in said and "mean 4.25, median 3, min 1, max 10" in said
    assert "2 (11.76%)" in said and "yes 3, no 1" in said and "n_ctx=5" in said and "4 bad lines" in said
