"""Losses, class weights, the learning rate's schedule and averaged weights, each against its formula."""

from __future__ import annotations

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import Place
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

import train
from cli.flags import changed
from dataset import Batch, EncodedData, pad
from model import Classifier
from text.labels import UNKNOWN_LABEL
from training import losses
from training.losses import WeightAverage, balanced_class_weights, cosine_with_warmup, evaluate, make_criterion
from training.run import new_model

CPU = torch.device("cpu")


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


class Sum(torch.nn.Module):
    """A classifier of two classes: whether the sum of the token ids is odd."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        odd = input_ids.sum(1) % 2
        return torch.stack((1.0 - odd, 2.0 * odd), -1)


class Sentences:
    """Encoded data in memory."""

    has_logits = multi_label = False

    def __init__(self, rows: list[list[int]], targets: list[int]) -> None:
        self.rows, self.targets = [np.array(row) for row in rows], np.array(targets)
        self.lengths = np.array([len(row) for row in rows])
        self.unknown_labels = targets.count(UNKNOWN_LABEL)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> Batch:
        return pad([self.rows[i] for i in indices or [0]], self.targets[np.array(indices, dtype=int)])


def sentences(count: int) -> Sentences:
    """Of every fourth one the label is one that train.txt lacks."""
    return Sentences([[number] * (1 + number % 5) for number in range(count)],
                     [UNKNOWN_LABEL if number % 4 == 3 else number % 2 for number in range(count)])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_label_that_training_lacks_is_an_error_and_has_no_loss(batch_size: int) -> None:
    data = sentences(23)
    expected, right = [], 0
    for row, target in zip(data.rows, data.targets, strict=True):
        logits = Sum()(torch.tensor(row).unsqueeze(0), torch.ones(1, len(row)))[0]
        right += int(logits.argmax().item() == target)
        if target != UNKNOWN_LABEL:
            expected.append(-log_softmax(logits)[target].item())
    assert data.unknown_labels == 5 and len(expected) == 18
    found = evaluate(Sum(), data, batch_size, CPU)  # type: ignore[arg-type]
    assert found == pytest.approx({"loss": np.mean(expected), "accuracy": right / 23})


@pytest.mark.parametrize("count", [2, 7, 23])
def test_processes_evaluate_as_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts its own sentences; their sums are those of one process, unknown labels included."""
    data, sums = sentences(count), []
    alone = evaluate(Sum(), data, 3, CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(losses, "total", lambda values, accelerator: sums.append(values) or values)
    for process in range(3):
        evaluate(Sum(), data, 3, CPU, Namespace(num_processes=3, process_index=process))  # type: ignore[arg-type]
    loss, right = torch.stack(sums).sum(0).tolist()
    assert alone == pytest.approx({"loss": loss / (count - data.unknown_labels), "accuracy": right / count})


def test_only_unknown_labels() -> None:
    data = Sentences([[1], [2]], [UNKNOWN_LABEL] * 2)
    assert evaluate(Sum(), data, 2, CPU) == {"loss": 0.0, "accuracy": 0.0}  # type: ignore[arg-type]


def test_evaluation_reads_the_device_as_often_for_many_batches_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading lets a GPU finish all that it has to do."""
    reads = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *given, method=method: reads.append(1) or method(self, *given))
    counts = []
    for batch_size in (64, 1):
        reads.clear()
        evaluate(Sum(), sentences(40), batch_size, CPU)  # type: ignore[arg-type]
        counts.append(len(reads))
    assert counts[0] == counts[1] <= 4


def test_a_gaussian_is_fitted_in_batches_of_the_flags_size_on_the_device(encoded: Place) -> None:
    args, config = train.get_params(encoded.train_flags("--eval_batch_size=5"))
    config = {**config, "enc_class": "gnb"}
    data, seen, moved = EncodedData(encoded.data / "train.txt.ids"), [], []
    encode, to = Classifier.encode, Batch.to
    models = []
    for size in (5, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Classifier, "encode", lambda self, ids, mask: (
                seen.append(len(ids)) or encode(self, ids, mask)))
            patch.setattr(Batch, "to", lambda self, device, **more: moved.append(device) or to(self, CPU))
            device = torch.device("cpu", 0)
            models.append(new_model(changed(args, eval_batch_size=size), config, data, Namespace(device=device)))
        assert max(seen) == min(size, len(data)) and sum(seen) == len(data)
        assert set(moved) == {device} and len(moved) == len(seen)
        assert {parameter.device for parameter in models[-1].parameters()} == {CPU}
        seen.clear()
        moved.clear()
    for one, other in zip(*(model.decoder.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)
    assert models[0].decoder.mean.abs().max() > 0


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
