"""TF-IDF with a linear support vector machine, and fastText: what a neural model has to beat, tuned on valid."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import SPLITS
from sentence_classifier.errors import InputError
from text.lines import TsvReader

logger = logging.getLogger(__name__)

Examples = list[tuple[str, str]]
Fit = Callable[[dict[str, Any], Examples, Path], Callable[[str], str]]


def fit_svm(setting: dict[str, Any], train: Examples, folder: Path) -> Callable[[str], str]:
    """TF-IDF of words and pairs of words with a linear support vector machine."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), **{key: setting[key] for key in setting if key != "C"})
    features = vectorizer.fit_transform([sentence for sentence, _ in train])
    svm = LinearSVC(C=setting["C"], random_state=0).fit(features, [label for _, label in train])
    return lambda sentence: str(svm.predict(vectorizer.transform([sentence]))[0])


def fit_fasttext(setting: dict[str, Any], train: Examples, folder: Path) -> Callable[[str], str]:
    """fastText with pairs of words, on one thread: with more it is not repeatable.

    With one thread it leaves most of the buckets' vectors as the memory comes, so that these must be larger than what
    the C library hands out again: 500,000 buckets of 50 numbers are always fresh, and zero.
    """
    try:
        import fasttext
    except ImportError:
        raise InputError("the fastText baseline needs its package: pip install -r requirements-dev.txt") from None

    names = sorted({label for _, label in train})
    path = folder / "fasttext.txt"
    path.write_text("".join(f"__label__{names.index(label)} {sentence.lower()}\n" for sentence, label in train))
    model = fasttext.train_supervised(str(path), wordNgrams=2, minCount=1, bucket=500_000, thread=1, verbose=0,
                                      **setting)
    # The inner object: fastText's own predict() fails under numpy 2.
    return lambda sentence: names[int(model.f.predict(f"{sentence.lower()}\n", 1, 0.0, "strict")[0][1][9:])]


def grid(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """All combinations of some settings."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


BASELINES: dict[str, tuple[Fit, list[dict[str, Any]]]] = {
    "TF-IDF + linear SVM": (fit_svm, grid(C=(0.1, 0.3, 1.0, 3.0, 10.0), min_df=(1, 2), sublinear_tf=(False, True),
                                          token_pattern=(r"(?u)\b\w\w+\b", r"\S+"))),
    "fastText": (fit_fasttext, grid(epoch=(5, 25), lr=(0.1, 0.5, 1.0), dim=(50, 100))),
}


def tune(fit: Fit, settings: list[dict[str, Any]], data: Path) -> dict[str, Any]:
    """Fit with each setting, choose by accuracy on valid, and test that one, one sentence at a time."""
    train, valid, test = ([(e.sentence, e.label) for e in TsvReader(data / name)] for name in SPLITS)
    best: dict[str, Any] = {"valid_accuracy": -1.0}
    predict: Callable[[str], str] = str
    for setting in tqdm(settings, unit="setting", disable=None):
        start = time.perf_counter()
        try:
            candidate = fit(setting, train, data)
        except RuntimeError as error:  # fastText diverges at too high a learning rate
            logger.warning("[%s: %s]", setting, error)
            continue
        seconds = time.perf_counter() - start
        accuracy = sum(candidate(sentence) == label for sentence, label in valid) / len(valid)
        if accuracy > best["valid_accuracy"]:
            best = {"setting": setting, "valid_accuracy": accuracy, "train_seconds": seconds}
            predict = candidate
    correct, times = 0, []
    for sentence, label in test:
        start = time.perf_counter()
        answer = predict(sentence)
        times.append(1000 * (time.perf_counter() - start))
        correct += answer == label
    return {**best, "accuracy": correct / len(test), "correct": correct, "examples": len(test),
            "settings_tried": len(settings), "ms": statistics.mean(times[1:] or times)}
