"""What a measured file says: figures of each class, the confusion matrix, its picture, and the predictions.

Macro F1 is the mean over the classes that the file's labels or the predictions hold, as scikit-learn's default has it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from text.labels import UNKNOWN_LABEL
from util import atomic_write, picture

MOST_PRINTED = 25  # classes, whose matrix is printed; of more, the most confused pairs
PAIRS = 20
WIDTH = 120  # characters of a printed line, where names allow


@dataclass
class EvaluationReport:
    """The confusions of a measured file and what follows from them.

    Attributes:
        names: of the classes: the model's, and behind them those that only the measured file has.
        matrix: [C, C] how many sentences of each class (rows) got each prediction (columns).
        unknown: how many sentences have each label that the model lacks. They count as errors.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    unknown: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, targets: np.ndarray, predictions: np.ndarray, names: Sequence[str],
           written: Sequence[str]) -> EvaluationReport:
        """Count labels and predictions.

        Args:
            targets, predictions: class ids [N]; UNKNOWN_LABEL for a label that the model lacks.
            names: the model's classes.
            written: [N] the labels as the file has them.
        """
        unknown = Counter(name for name, target in zip(written, targets, strict=True) if target == UNKNOWN_LABEL)
        every = (*names, *unknown)
        ids = {name: place for place, name in enumerate(every)}
        matrix = np.zeros((len(every), len(every)), dtype=np.int64)
        for name, target, prediction in zip(written, targets, predictions, strict=True):
            matrix[ids[name] if target == UNKNOWN_LABEL else target, prediction] += 1
        return cls(every, matrix, unknown)

    def __post_init__(self) -> None:
        self._count(self.matrix.sum(1), self.matrix.sum(0))
        self.correct, self.count = int(self.matrix.trace()), int(self.matrix.sum())

    def _count(self, support: np.ndarray, answered: np.ndarray) -> None:
        """The scores of each class, which so many sentences have [C] and so many got as an answer [C]."""
        hits, self.support, self.answered = self.matrix.diagonal(), support, answered
        # [C, 3]: precision, recall, F1; 0 where they would be 0 / 0.
        self.scores = np.stack([hits / np.maximum(answered, 1), hits / np.maximum(self.support, 1),
                                2 * hits / np.maximum(answered + self.support, 1)], axis=1)
        self.present = np.flatnonzero(answered + self.support)

    @property
    def accuracy(self) -> float:
        """The fraction of the sentences that are predicted as labelled."""
        return self.correct / self.count

    @property
    def micro(self) -> tuple[float, float, float]:
        """Precision, recall and F1 over all labels of all sentences."""
        hits, given, wanted = int(self.matrix.trace()), int(self.answered.sum()), int(self.support.sum())
        return hits / max(1, given), hits / max(1, wanted), 2 * hits / max(1, given + wanted)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur."""
        return float(self.scores[self.present, 2].mean())

    def to_json(self) -> dict[str, Any]:
        """Plain data: all classes are in per_class and in the matrix, in the same order."""
        columns = ("precision", "recall", "f1-score")
        return {"accuracy": self.accuracy, "correct": self.correct, "examples": self.count, "macro_f1": self.macro_f1,
                "micro_f1": self.micro[2],
                "confusion_matrix": self.matrix.tolist(),
                "per_class": {name: {**dict(zip(columns, row.tolist(), strict=True)), "support": int(support)}
                              for name, row, support in zip(self.names, self.scores, self.support, strict=True)}}

    def lines(self) -> list[str]:
        """The report for a screen: a line for each class that occurs, averages, and the confusions."""
        shown = [(self.names[i], self.scores[i], self.support[i]) for i in self.present]
        support = self.support[self.present]
        weighted = self.scores[self.present].T @ support / max(1, support.sum())
        width = max(len("weighted avg"), *(columns_of(name) for name, *_ in shown))

        def line(name: str, scores: Sequence[float] | np.ndarray, count: int) -> str:
            return f"{rjust(name, width)} " + "".join(f"{score:>10.4f}" for score in scores) + f"{count:>10}"

        head = " " * (width + 1) + "".join(f"{name:>10}" for name in ("precision", "recall", "f1-score", "support"))
        return [head, "", *(line(*row) for row in shown), "",
                f"{'accuracy':>{width}} {self.accuracy:>30.4f}{self.count:>10}",
                *self._averages(line),
                line("macro avg", self.scores[self.present].mean(0), self.count),
                line("weighted avg", weighted, self.count), "", *self._confusions()]

    def _averages(self, line: Callable[..., str]) -> list[str]:
        return []

    def _confusions(self) -> list[str]:
        return self._printed_matrix() if len(self.names) <= MOST_PRINTED else self._confused_pairs()

    def _printed_matrix(self) -> list[str]:
        cell = 2 + max(len(str(self.matrix.max())), *map(columns_of, self.names))
        heads, rows = list(self.names), list(self.names)
        if cell * len(self.names) + max(map(columns_of, self.names)) > WIDTH:
            cell = 2 + max(len(str(self.matrix.max())), 3)
            heads = [str(number) for number in range(1, len(self.names) + 1)]
            rows = [f"{number} {name}" for number, name in zip(heads, self.names, strict=True)]
        return ["confusion matrix (rows: the label, columns: the prediction)",
                "".join(rjust(head, cell) for head in heads),
                *("".join(f"{count:>{cell}}" for count in row) + f"  {name}"
                  for row, name in zip(self.matrix, rows, strict=True))]

    def _confused_pairs(self) -> list[str]:
        wrong = self.matrix.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
        pairs = [(wrong[place], *place) for place in zip(*np.unravel_index(order, wrong.shape), strict=True)
                 if wrong[place]]
        said = [f"{count:>7}  {self.names[label]} -> {self.names[prediction]}" for count, label, prediction in pairs]
        return [f"confusion matrix: {len(self.names)} classes; the most confused pairs (label -> prediction)",
                *(said or ["no sentence is predicted wrongly"])]


@dataclass
class LabelSetReport(EvaluationReport):
    """The same where a sentence may have several labels.

    Attributes:
        matrix: [C, C] on the diagonal, how many sentences rightly got each label; elsewhere, how many lack the row's
            label in their answer and have the column's too many.
    """

    @classmethod
    def of_sets(cls, targets: np.ndarray, predictions: np.ndarray, names: Sequence[str],
                unknown: Sequence[Sequence[str]]) -> LabelSetReport:
        """Count label sets.

        Args:
            targets, predictions: [N, C] bool.
            names: the model's classes.
            unknown: [N] the labels of each sentence that the model lacks.
        """
        extra = Counter(name for row in unknown for name in row)
        every, size = (*names, *extra), len(names)
        matrix = np.zeros((len(every), len(every)), dtype=np.int64)
        missed, surplus = targets & ~predictions, predictions & ~targets
        matrix[:size, :size] = missed.astype(np.int64).T @ surplus.astype(np.int64)
        np.fill_diagonal(matrix[:size, :size], (targets & predictions).sum(0))
        report = cls(every, matrix, extra)
        report._count(np.concatenate([targets.sum(0), list(extra.values())]).astype(np.int64),
                      np.concatenate([predictions.sum(0), np.zeros(len(extra))]).astype(np.int64))
        whole = (targets == predictions).all(1) & np.array([not row for row in unknown], dtype=bool)
        report.correct, report.count = int(whole.sum()), len(targets)
        return report

    def _averages(self, line: Callable[..., str]) -> list[str]:
        return [line("micro avg", self.micro, self.count)]

    def _confusions(self) -> list[str]:
        return [one.replace("(label -> prediction)", "(missing -> given)") for one in self._confused_pairs()]


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese, Japanese and Korean characters take two."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def rjust(text: str, width: int) -> str:
    """A text at the right of so many columns of a terminal."""
    return " " * (width - columns_of(text)) + text


def clip(text: str, limit: int = 40) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def draw_confusion(report: EvaluationReport, path: str | Path) -> None:
    """Draw the confusion matrix, shaded by the fraction of each label's sentences."""
    from matplotlib.colors import PowerNorm

    count = len(report.names)
    step = 1 if count <= 200 else -(-count // 200)  # of more classes not every name fits
    side = 3.0 + min(40.0, max(0.17, 0.6 - 0.012 * count) * count)
    size = 10 if count <= 20 else 8
    fractions = report.matrix / np.maximum(report.support, 1)[:, None]
    ticks = range(0, count, step)
    names = [clip(report.names[i]) for i in ticks]
    with picture(path, figsize=(1.1 * side, side)) as (figure, axes):
        image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # so that rare confusions are seen
        slant = {"rotation": 45, "rotation_mode": "anchor"} if count <= 20 else {"rotation": 90}
        axes.set_xticks(ticks, names, ha="right" if count <= 20 else "center", fontsize=size, parse_math=False,
                        **slant)
        axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.set_title(f"accuracy {report.accuracy:.4f}")
        for row, column in np.argwhere(report.matrix) if count <= 40 else ():
            axes.text(column, row, str(report.matrix[row, column]), ha="center", va="center", fontsize=size,
                      color="white" if fractions[row, column] > 0.25 else "black")
        figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the label's sentences")


def write_predictions(path: Path, sentences: list[str], written: list[str], predicted: list[str]) -> None:
    """Write sentence TAB label TAB prediction."""
    with atomic_write(path) as file:
        for row in zip(sentences, written, predicted, strict=True):
            file.write("\t".join(row) + "\n")


def time_figures(seconds: np.ndarray, batch_size: int) -> dict[str, float]:
    """Milliseconds in all and of the first batch, which warms up; and a sentence without that batch."""
    milliseconds = 1000 * seconds
    rest = milliseconds[batch_size:] if len(seconds) > batch_size else milliseconds
    return {"total_ms": float(milliseconds.sum()), "warm_up_ms": float(milliseconds.sum() - rest.sum()),
            "mean_ms": float(rest.mean()), "median_ms": float(np.median(rest)),
            "p95_ms": float(np.percentile(rest, 95))}
