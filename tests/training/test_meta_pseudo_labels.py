"""Meta pseudo labels: the teacher's gradient against finite differences, and what is read."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Place
from helpers import make_lines, write_lines
from torch import Tensor, nn

from dataset import EncodedData, pad
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import WORDS, TokenizerInfo, WordTokenizer
from training.distillation import read_sentences
from training.meta_pseudo_labels import log_probability_slopes, meta_loss, read_rows, read_text, read_twice

SENTENCES, LABELS, FEATURES = 3, 2, 4


class Toy:
    """A student of two layers and a linear teacher in double precision; each `step` begins at the same place."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(3)
        self.unlabelled, self.labelled = torch.randn(2, SENTENCES, FEATURES, dtype=torch.float64)
        self.targets = torch.tensor([0, 1, 1])
        self.teacher = torch.randn(FEATURES, LABELS, dtype=torch.float64, requires_grad=True)
        self.first: nn.Module = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, LABELS)).double()
        self.optimizer = optimizer
        if optimizer == "adamw":  # moments of some hundred steps, so that the newest gradient is one of many
            made = self.make_optimizer(self.first)
            for _ in range(300):
                noisy = torch.randn_like(self.labelled)
                self.update(made, F.cross_entropy(self.first(noisy), torch.randint(LABELS, (SENTENCES,))))
            self.state = made.state_dict()

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """One without a past."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.3)
        return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """A step."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def begin(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The student where each step begins."""
        student = copy.deepcopy(self.first)
        optimizer = self.make_optimizer(student)
        if self.optimizer == "adamw":
            optimizer.load_state_dict(copy.deepcopy(self.state))
        return student, optimizer

    def after(self, targets: Tensor) -> float:
        """L': the loss on labelled data after a step on these pseudo labels, ids [B] or probabilities [B, C]."""
        student, optimizer = self.begin()
        self.update(optimizer, F.cross_entropy(student(self.unlabelled), targets))
        return F.cross_entropy(student(self.labelled), self.targets).item()

    def meta_gradient(self, hard: bool) -> Tensor:
        """By meta_loss."""
        student, optimizer = self.begin()
        loss, fall = meta_loss(self.unlabelled @ self.teacher, lambda: student(self.unlabelled),
                               lambda: F.cross_entropy(student(self.labelled), self.targets),
                               lambda loss: self.update(optimizer, loss), list(student.parameters()), optimizer, hard)
        before = F.cross_entropy(self.first(self.labelled), self.targets).item()
        now = F.cross_entropy(student(self.labelled), self.targets).item()
        assert fall == pytest.approx(before - now)
        return torch.autograd.grad(loss, self.teacher)[0]

    def differences(self, value: Callable[[Tensor], float], size: float = 1e-5) -> Tensor:
        """The gradient of a function of the teacher's parameters by central differences."""
        found = torch.zeros_like(self.teacher)
        for place in itertools.product(range(FEATURES), range(LABELS)):
            nudge = torch.zeros_like(self.teacher)
            nudge[place] = size
            found[place] = (value(self.teacher.detach() + nudge) - value(self.teacher.detach() - nudge)) / (2 * size)
        return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_hard_labels_give_the_gradient_of_the_expected_loss(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all labellings that could be drawn, weighted by their probabilities; exact for any optimizer."""
    toy = Toy(optimizer)
    labellings = [torch.tensor(c) for c in itertools.product(range(LABELS), repeat=SENTENCES)]
    losses = [toy.after(labelling) for labelling in labellings]

    def probability(labelling: Tensor, teacher: Tensor) -> Tensor:
        return (toy.unlabelled @ teacher).softmax(-1).gather(1, labelling.unsqueeze(1)).prod()

    expected = toy.differences(lambda teacher: sum(
        probability(labelling, teacher).item() * loss for labelling, loss in zip(labellings, losses, strict=True)))
    found = torch.zeros_like(expected)
    for labelling in labellings:
        monkeypatch.setattr(torch, "multinomial", lambda *given, drawn=labelling: drawn.unsqueeze(1))
        found += probability(labelling, toy.teacher.detach()) * toy.meta_gradient(hard=True)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_soft_labels_give_the_gradient_of_the_loss() -> None:
    """Exact for plain SGD, but for the error of a central difference."""
    toy = Toy("sgd")
    expected = toy.differences(lambda teacher: toy.after((toy.unlabelled @ teacher).softmax(-1)))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(toy.meta_gradient(hard=False), expected, rtol=1e-3, atol=1e-6)


def test_soft_labels_with_adamw_take_the_second_moment_as_constant() -> None:
    toy = Toy("adamw")
    expected = toy.differences(lambda teacher: toy.after((toy.unlabelled @ teacher).softmax(-1)))
    found = toy.meta_gradient(hard=False)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_slopes_leave_the_parameters_as_they_were() -> None:
    model = nn.Linear(3, 2)
    x, parameters = torch.randn(5, 3), list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    place, direction = ([torch.randn_like(p) for p in parameters] for _ in range(2))
    found = log_probability_slopes(lambda: model(x), parameters, place, direction)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))

    def log_probabilities(*values: Tensor) -> Tensor:
        return F.linear(x, *values).log_softmax(-1)

    _, expected = torch.func.jvp(log_probabilities, tuple(place), tuple(direction))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert not log_probability_slopes(lambda: model(x), parameters, place, [0 * p for p in direction]).any()


# -------------------------------------------------------------------------------------------------------------- data


def test_text_with_and_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "augmented.raw"
    lines = make_lines(9, 1)
    write_lines(path, lines)
    labelled = list(read_text(str(path)))
    path.write_text("".join(f"{sentence}\n" for sentence, _ in lines))
    assert labelled == list(read_text(str(path))) == [sentence for sentence, _ in lines]
    path.write_text("a sentence\na sentence\twith a label\n")
    with pytest.raises(InputError, match=r"augmented\.raw:2: a TAB"):
        list(read_text(str(path)))


def test_student_and_teacher_read_the_same_sentences(encoded: Place) -> None:
    """Each with its own tokenizer, in any order, more than fit in one chunk."""
    lines = make_lines(1500, 2)
    path = encoded.root / "more.txt"
    write_lines(path, lines)
    vocabulary = (encoded.data / "vocab.txt").read_text()
    info = TokenizerInfo(kind=WORDS, tokenizer="whitespace", lowercase=True, n_ctx=100)
    own = WordTokenizer(vocabulary, info)
    other = WordTokenizer("\n".join(reversed(vocabulary.splitlines())), replace(info, n_ctx=4))
    rows, teacher_rows = (read_rows(read_text(str(path)), tokenizer) for tokenizer in (own, other))
    train = EncodedData(encoded.data / "train.txt.ids")
    unlabelled = read_twice(pad([rows[place] for place in [1499, 0, 1024, 7]]), teacher_rows, [1499, 0, 1024, 7])
    labelled = read_twice(train.batch([3, 45, 0]), read_rows(read_sentences(train), other), [3, 45, 0])
    for batch, places, sentences in (
            (unlabelled, [1499, 0, 1024, 7], [sentence for sentence, _ in lines]),
            (labelled, [3, 45, 0], [line.split("\t")[0]
                                    for line in (encoded.data / "train.txt").read_text().splitlines()])):
        assert batch.teacher is not None and len(batch) == len(places)
        for row, (place, part, encoder) in enumerate(itertools.chain(
                ((place, batch, own) for place in places), ((place, batch.teacher, other) for place in places))):
            kept = part.input_ids[row % len(places)][part.attention_mask[row % len(places)]]
            assert kept.tolist() == encoder(sentences[place])
    batch = read_twice(train.batch([5, 6]), None, [5, 6])
    assert batch.teacher is not None and torch.equal(batch.teacher.input_ids, batch.input_ids)
    moved = batch.to(torch.device("cpu"))
    assert moved.teacher is not None and moved.targets is not None and moved.targets.tolist() == [1, 2]
