"""The sample data set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import make_sample_data
import pytest
from helpers import ROOT, snapshot

from text.lines import TsvReader

SPLITS = ("train", "valid", "test")
SAMPLE = {split: list(TsvReader(ROOT / "data" / "sample" / f"{split}.txt")) for split in SPLITS}


def test_sample_is_what_the_script_writes_from_any_folder(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "make_sample_data.py", f"--output_dir={tmp_path / 'it'}"], check=True,
                   cwd=ROOT / "etc", env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True)
    written = {f"{split}.txt": (ROOT / "data" / "sample" / f"{split}.txt").read_bytes() for split in SPLITS}
    assert snapshot(tmp_path / "it") == written
    make_sample_data.main(["--output_dir=it", "--seed=43"])
    assert Path("it", "train.txt").read_bytes() != written["train.txt"]


def test_sample_sentences_and_intents() -> None:
    sentences = [example.sentence for split in SPLITS for example in SAMPLE[split]]
    assert len(set(sentences)) == len(sentences)
    assert [sentence for sentence in sentences if not re.fullmatch(r"[a-z0-9']+( [a-z0-9']+)+", sentence)] == []
    for split, size in (("train", 3000), ("valid", 400), ("test", 400)):
        count = Counter(example.label for example in SAMPLE[split])
        assert count.total() == size and set(count) == set(make_sample_data.INTENTS)
        assert min(count.values()) > size / len(count) / 2


def test_sample_test_split_has_words_and_templates_of_its_own() -> None:
    words = {split: {word for example in SAMPLE[split] for word in example.sentence.split()} for split in SPLITS}
    assert len(words["test"] - words["train"]) > 50
    for name, pool in {**make_sample_data.SLOTS, **make_sample_data.INTENTS}.items():
        train, valid, test = (set(pool.get(split, ())) for split in SPLITS)
        assert train and not (train & valid or train & test or valid & test), name


def test_sample_is_not_free_for_a_linear_model() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    svm = pytest.importorskip("sklearn.svm")
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    (train, labels), (test, truth) = (
        zip(*[example[1:] for example in SAMPLE[split]], strict=True) for split in ("train", "test"))
    model = svm.LinearSVC().fit(vectorizer.fit_transform(train), labels)
    assert 0.80 < model.score(vectorizer.transform(test), truth) < 0.97
