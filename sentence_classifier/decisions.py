"""From logits to labels: one a sentence, or several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sentence_classifier.labels import SEPARATOR


@dataclass(frozen=True)
class Decision:
    """How a model's logits become labels.

    One label a sentence: the likeliest. Several: each whose probability reaches its threshold, perhaps none.

    Attributes:
        multi_label: whether a sentence may have several labels, or none.
        thresholds: [C] of multi_label; empty: 0.5.
        separator: of multi_label, what stands between labels in text.
    """

    multi_label: bool = False
    thresholds: tuple[float, ...] = ()
    separator: str = SEPARATOR

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """logits [B, C] -> probabilities [B, C]: of a softmax, or of each label on its own."""
        if self.multi_label:
            return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """probabilities [B, C] -> class ids [B], or with several labels which they are [B, C] bool."""
        if self.multi_label:
            return probabilities >= np.array(self.thresholds or 0.5, dtype=probabilities.dtype)
        return probabilities.argmax(1)

    @property
    def measure(self) -> str:
        """What `score` is called."""
        return "micro F1" if self.multi_label else "accuracy"

    def score(self, answers: np.ndarray, targets: np.ndarray) -> float:
        """Accuracy of class ids [N], or micro F1 of several labels [N, C]."""
        if not self.multi_label:
            return float((answers == targets).mean())
        return float(2 * (answers & targets).sum() / max(1, answers.sum() + targets.sum()))


ONE_LABEL = Decision()


def differing(answers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which sentences got other answers: [N] bool."""
    apart = answers != others
    return apart.any(1) if apart.ndim == 2 else apart
