"""Losses, class weights, the learning rate's schedule and averaged weights, each against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from training.losses import WeightAverage, balanced_class_weights, cosine_with_warmup, make_criterion


@pytest.fixture
def scores() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class ids and a teacher's logits."""
    torch.manual_seed(0)
    return 2 * torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0]), 3 * torch.randn(6, 4)


def log_softmax(x: Tensor) -> Tensor:
    return x - x.exp().sum(-1, keepdim=True).log()


def soft_formula(name: str, logits: Tensor, teacher: Tensor) -> Tensor:
    p, log_q = log_softmax(teacher).exp(), log_softmax(logits)
    return {
        "CrossEntropyLoss": -(p * log_q).sum(-1),
        "LabelSmoothingCrossEntropy": -((0.9 * p + 0.1 / 4) * log_q).sum(-1),
        "MSELoss": ((logits - teacher) ** 2).mean(-1),
        "KLDivLoss": (p * (p.log() - log_q)).sum(-1),
    }[name]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LabelSmoothingCrossEntropy", "MSELoss", "KLDivLoss"])
def test_soft_targets(name: str, scores: tuple[Tensor, ...]) -> None:
    logits, _, teacher = scores
    torch.testing.assert_close(make_criterion(name)(logits, teacher), soft_formula(name, logits, teacher))


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LabelSmoothingCrossEntropy", "KLDivLoss"])
def test_temperature(name: str, scores: tuple[Tensor, ...]) -> None:
    logits, ids, teacher = scores
    found = make_criterion(name, temperature=3.0)(logits, teacher)
    torch.testing.assert_close(found, 9 * soft_formula(name, logits / 3, teacher / 3))
    if name != "KLDivLoss":  # class labels are not softened, valid data's among them
        given = logits, ids
        torch.testing.assert_close(make_criterion(name, temperature=3.0)(*given), make_criterion(name)(*given))


def test_teacher_and_student_alike_lose_nothing(scores: tuple[Tensor, ...]) -> None:
    for name in ("MSELoss", "KLDivLoss"):
        assert make_criterion(name)(scores[2], scores[2]).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "smoothing"), [("CrossEntropyLoss", 0.0), ("LabelSmoothingCrossEntropy", 0.1)])
def test_class_ids(name: str, smoothing: float, scores: tuple[Tensor, ...]) -> None:
    logits, ids, _ = scores
    log_q = log_softmax(logits)
    expected = -(1 - smoothing) * log_q[torch.arange(6), ids] - smoothing * log_q.mean(-1)
    torch.testing.assert_close(make_criterion(name)(logits, ids), expected)


def test_class_weights(scores: tuple[Tensor, ...]) -> None:
    logits, ids, teacher = scores
    weights = torch.tensor([1.0, 0.5, 4.0, 2.0])
    criterion = make_criterion("CrossEntropyLoss", weights)
    torch.testing.assert_close(criterion(logits, ids), -weights[ids] * log_softmax(logits)[torch.arange(6), ids])
    soft = -(weights * log_softmax(teacher).exp() * log_softmax(logits)).sum(-1)
    torch.testing.assert_close(criterion(logits, teacher), soft)


def test_balanced_class_weights() -> None:
    ids = np.array([0] * 6 + [1] * 3 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=ids)
    np.testing.assert_allclose(balanced_class_weights(ids, 3), expected, rtol=1e-6)
    assert balanced_class_weights(np.array([0, 0, 2]), 3).tolist() == [0.75, 0.0, 1.5]


def test_cosine_schedule() -> None:
    factors = [cosine_with_warmup(step, 4, 14) for step in range(15)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = [(1 + math.cos(math.pi * done / 10)) / 2 for done in range(11)]
    assert factors[4:] == pytest.approx(expected) and factors[9] == pytest.approx(0.5)
    assert cosine_with_warmup(0, 0, 5) == 1.0 and cosine_with_warmup(9, 0, 5) == 0.0


def test_average_is_exponential() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, 0.5)
    expected, values = model.weight.detach().clone(), []
    for update in range(1, 20):
        with torch.no_grad():
            model.weight.copy_(torch.full((1, 2), float(update)))
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        values.append(decay)
    torch.testing.assert_close(average.average[0], expected)
    assert values[0] < 0.2 and values[-1] == 0.5
    with average.applied():
        torch.testing.assert_close(model.weight.data, expected)
    assert (model.weight == 19.0).all()
