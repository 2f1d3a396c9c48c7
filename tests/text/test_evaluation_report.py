"""Figures of a measured file, on the screen and in the picture, for few classes and for many."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import classification_report, f1_score, precision_recall_fscore_support

from text import evaluation_report
from text.evaluation_report import EvaluationReport, columns_of, draw_confusion
from text.labels import UNKNOWN_LABEL

AWKWARD = ("accuracy", "macro avg", "weighted avg", "날씨", "🎵 $x$")


def make_report(count: int, sentences: int = 900, name: str = "class_number_{}") -> EvaluationReport:
    """The report of a model that is right three times in four."""
    random = np.random.default_rng(count)
    targets = random.integers(0, count, sentences)
    predictions = np.where(random.random(sentences) < 0.75, targets, random.integers(0, count, sentences))
    names = [name.format(number) for number in range(count)]
    return EvaluationReport.of(targets, predictions, names, [names[target] for target in targets])


# --------------------------------------------------------------------------------------------------------- figures


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=30))
def test_figures_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    """Of five classes and two that the model lacks."""
    every = [*AWKWARD, "oos", "도움말"]
    written = [every[label] for label, _ in pairs]
    targets = np.array([label if label < 5 else UNKNOWN_LABEL for label, _ in pairs])
    predictions = np.array([prediction for _, prediction in pairs])
    report = EvaluationReport.of(targets, predictions, AWKWARD, written)
    answered = [AWKWARD[prediction] for prediction in predictions]
    found = report.to_json()
    assert found["macro_f1"] == pytest.approx(f1_score(written, answered, average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(np.mean([one == other for one, other in zip(written, answered,
                                                                                         strict=True)]))
    expected = zip(*precision_recall_fscore_support(written, answered, labels=report.names, zero_division=0),
                   strict=True)
    for name, row in zip(report.names, expected, strict=True):
        assert list(found["per_class"][name].values()) == pytest.approx(row)
    assert set(report.names[:5]) == set(AWKWARD) and report.unknown.total() == sum(targets == UNKNOWN_LABEL)
    shown = sorted({*written, *answered}, key=report.names.index)
    printed = classification_report(written, answered, labels=shown, digits=4, zero_division=0).split()
    own = " ".join(report.lines()).split("confusion matrix")[0].split()
    assert own == [word.removesuffix(".0") for word in printed]  # of counts, which it has as 3.0 where nothing is right


def test_one_class_of_three_all_right() -> None:
    report = EvaluationReport.of(np.array([1, 1]), np.array([1, 1]), ["a", "b", "c"], ["b", "b"])
    assert report.macro_f1 == report.accuracy == 1.0
    assert report.to_json()["per_class"]["a"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}


# ---------------------------------------------------------------------------------------------------------- screen


@pytest.mark.parametrize("count", [2, 7, 25, 26, 77, 151])
def test_the_report_fits_a_screen(count: int) -> None:
    report = make_report(count)
    lines = report.lines()
    assert max(map(columns_of, lines)) <= 160
    place = next(number for number, line in enumerate(lines) if line.startswith("confusion matrix"))
    confusions = lines[place + 1 :]
    assert len(lines[:place]) <= count + 7
    if count <= 25:
        heads, *rows = confusions
        assert len(heads.split()) == count == len(rows) and all(name in row for name, row in
                                                                zip(report.names, rows, strict=True))
        assert [[int(cell) for cell in row.split()[:count]] for row in rows] == report.matrix.tolist()
    else:
        assert len(confusions) == 20
        for line in confusions:
            number, label, _, prediction = line.split()
            assert report.matrix[report.names.index(label), report.names.index(prediction)] == int(number)
        assert [int(line.split()[0]) for line in confusions] == sorted(
            report.matrix[~np.eye(count, dtype=bool)])[::-1][:20]


def test_no_confusion_at_all() -> None:
    ids = np.arange(30)
    names = [str(number) for number in ids]
    assert EvaluationReport.of(ids, ids, names, names).lines()[-1] == "no sentence is predicted wrongly"


def test_columns_stand_under_their_names_in_any_script() -> None:
    names = ["날씨", "cafe\u0301", "b"]
    ids = np.array([0, 1, 2])
    heads, *rows = EvaluationReport.of(ids, ids, names, names).lines()[-4:]
    for row, name in zip(rows, names, strict=True):
        assert row.endswith(f"  {name}") and columns_of(row) - columns_of(f"  {name}") == columns_of(heads)


# --------------------------------------------------------------------------------------------------------- picture


def overlapping(labels: list[Any]) -> list[str]:
    """Names on an axis that are drawn over the one before."""
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
    return [name for (_, one), (name, other) in zip(boxes, boxes[1:], strict=False)
            if one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1]


@pytest.mark.parametrize("count", [1, 2, 20, 21, 77, 151])
def test_names_in_the_picture_do_not_overlap(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    whole = evaluation_report.picture

    @contextlib.contextmanager
    def seen(path: Any, **options: Any) -> Iterator[Any]:
        with whole(path, **options) as (figure, axes):
            yield figure, axes
            figure.canvas.draw()
            drawn.append((overlapping(axes.get_yticklabels()), axes.get_xticklabels()[0].get_rotation(),
                          overlapping(axes.get_xticklabels())))

    monkeypatch.setattr(evaluation_report, "picture", seen)
    draw_confusion(make_report(count, 400), tmp_path / "confusion.png")
    [(rows, rotation, columns)] = drawn
    assert not rows
    assert rotation == 45 if count <= 20 else not columns  # boxes around slanted names overlap, the names do not


def test_any_script_is_drawn_without_a_warning(tmp_path: Path) -> None:
    names = [*AWKWARD, "東京", "मौसम", "طقس", "\u200b", "a\u0301" * 60, "_hidden"]
    ids = np.arange(len(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(EvaluationReport.of(ids, ids, names, names), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
