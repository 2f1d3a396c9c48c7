"""The losses of distillation, the teacher's answers, and what the student's trainer makes of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from architectures import LAYERS, make_model
from conftest import Place
from helpers import make_run_info
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import preprocess
import train
from dataset import EncodedData, pad
from model import TransformerEmbedding
from pretrained.loading import load_pretrained
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from training import distillation
from training.distillation import (
    DistillationTrainer,
    Teacher,
    answer,
    attention_loss,
    keep_inside,
    matched_layers,
    state_loss,
)
from training.losses import make_criterion
from training.run import Run
from util import load_checkpoint, save_checkpoint

# ---------------------------------------------------------------------------------------------------------- losses


def logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return make_criterion("KLDivLoss", temperature=temperature)(student, teacher)


def test_logit_loss_is_the_divergence_at_a_temperature() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 3)
    for temperature in (1.0, 4.0):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = temperature**2 * (p * (p / q).log()).sum(-1)
        torch.testing.assert_close(logit_loss(student, teacher, temperature), expected)
    torch.testing.assert_close(logit_loss(student, student + 2.5, 2.0), torch.zeros(5))  # a shift changes nothing


def test_gradients_keep_their_size_at_high_temperatures() -> None:
    """At high temperatures the loss is half the squared difference of centred logits over C: T^2 takes care of that."""
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    apart = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(logit_loss(student, teacher, 1e4), apart.square().sum(-1) / 6, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 40), st.integers(1, 40))
def test_layers_are_matched_evenly(student: int, more: int) -> None:
    teacher = student + more - 1
    matched = matched_layers(student, teacher)
    assert matched[-1] == teacher and matched[0] >= 1
    steps = np.diff([0, *matched])
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_layers_of_the_paper() -> None:
    assert matched_layers(4, 12) == [3, 6, 9, 12] and matched_layers(3, 6) == [2, 4, 6]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3), st.booleans(),
       st.sampled_from([(2, 2), (2, 3)]), st.sampled_from([0.0, 7.0, float("inf"), float("nan")]))
def test_padding_takes_no_part(lengths: list[int], layers: int, cosine: bool, heads: tuple[int, int],
                               filling: float) -> None:
    """A sentence's losses are what they are without the sentences beside it, whatever pad positions hold."""
    random = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)

    def tensors(*shape: int) -> list[Tensor]:
        return [torch.rand(len(lengths), *shape, generator=random) for _ in range(layers)]

    states = tensors(longest, 5), tensors(longest, 5)
    attentions = tensors(heads[0], longest, longest), tensors(heads[1], longest, longest)
    for number, length in enumerate(lengths):
        alone = [[[layer[number : number + 1, :length] for layer in side] for side in states],
                 [[layer[number : number + 1, :, :length, :length] for layer in side] for side in attentions]]
        whole = torch.ones(1, length, dtype=torch.bool)
        expected = state_loss(*alone[0], whole, cosine), attention_loss(*alone[1], whole)
        for side in states:
            for layer in side:
                layer[number, length:] = filling
        for side in attentions:
            for layer in side:
                layer[number, :, length:] = filling
                layer[number, :, :, length:] = filling
        found = state_loss(*states, mask, cosine), attention_loss(*attentions, mask)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[number : number + 1], other)


def test_what_states_and_attentions_are_compared_by() -> None:
    mask = torch.tensor([[True, True, False]])
    ones, twos = torch.ones(1, 3, 4), 2 * torch.ones(1, 3, 4)
    assert state_loss([ones, ones], [ones, twos], mask, cosine=False).tolist() == [0.5]
    assert state_loss([ones, ones], [-twos, twos], mask, cosine=True).tolist() == pytest.approx([1.0])
    half, full = torch.full((1, 2, 3, 3), 0.5), torch.ones(1, 2, 3, 3)
    assert attention_loss([half], [full], mask).tolist() == [0.25]
    own = torch.cat((full, 0 * full), 1)  # four heads, whose mean is that of two
    assert attention_loss([own], [half], mask).tolist() == [0.0]


# --------------------------------------------------------------------------------------------------------- teacher


def load(place: Place, labels: tuple[str, ...] | None = None, path: Path | None = None) -> Teacher:
    """The teacher of a trained place."""
    path = path or place.model
    checkpoint = load_checkpoint(path)
    return Teacher(checkpoint, str(path), [str(place.data)], Labels(labels or checkpoint.run.labels.names)).eval()


def test_a_teacher_answers_in_the_students_order(trained: Place) -> None:
    names = load_checkpoint(trained.model).run.labels.names
    other = names[::-1]
    batch = pad(EncodedData(trained.data / "valid.txt.ids").rows(range(5)))
    with torch.no_grad():
        own = load(trained)(batch.input_ids, batch.attention_mask)
        mapped = load(trained, other)(batch.input_ids, batch.attention_mask)
    assert torch.equal(own.flip(-1), mapped) and not torch.equal(own, mapped)
    with pytest.raises(InputError, match="the teacher's labels .* are not those of the student's data"):
        load(trained, (*names[:-1], "another"))


def test_answers_are_the_teachers_logits_and_are_kept(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data, teacher = EncodedData(trained.data / "train.txt.ids"), load(trained)
    device = torch.device("cpu")
    found = answer(teacher, data, False, 7, device)
    batch = pad(data.rows(range(len(data))))
    with torch.no_grad():
        expected = teacher(batch.input_ids, batch.attention_mask).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)

    kept = trained.data / "train.txt.teacher"
    monkeypatch.setattr(distillation, "read_sentences", lambda data: pytest.fail("read again"))
    assert np.array_equal(answer(teacher, data, False, 7, device), found)
    monkeypatch.undo()
    # Another teacher, or other sentences, and they are asked for anew.
    checkpoint = load_checkpoint(trained.model)
    checkpoint.model["decoder.output.bias"] = checkpoint.model["decoder.output.bias"] + 1.0
    save_checkpoint(checkpoint, trained.root / "other.pt")
    other = answer(load(trained, path=trained.root / "other.pt"), data, False, 7, device)
    np.testing.assert_allclose(other, found + 1.0, atol=1e-5)
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(answer(teacher, data, False, 7, device), found) and kept.stat().st_size > 100
    kept.unlink()

    data.source.unlink()
    with pytest.raises(InputError, match="a teacher reads the text"):
        answer(teacher, data, False, 7, device)


def test_a_teacher_that_has_answered_can_still_learn(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta pseudo labels train it; on a GPU it moved there to answer."""
    monkeypatch.setattr(Teacher, "to", lambda teacher, device: teacher._apply(torch.clone))
    teacher, data = load(trained), EncodedData(trained.data / "train.txt.ids")
    answer(teacher, data, False, 7, torch.device("cpu"))
    batch = data.batch([0, 1])
    teacher(batch.input_ids, batch.attention_mask).sum().backward()
    assert any(parameter.grad is not None for parameter in teacher.parameters())


def test_answers_pass_over_the_lines_that_encoding_skipped(trained: Place) -> None:
    """Or else each later sentence would have another's answer."""
    lines = (trained.data / "train.txt").read_text().splitlines()
    lines[3:3] = ["no label", "a label that is unknown\tnever"]
    (trained.data / "augmented.raw").write_text("\n".join(lines))
    flags = ("--augmented", "--skip_bad_lines")
    preprocess.main(trained.preprocess_flags(*flags))
    whole, skipped = (EncodedData(trained.data / f"{name}.ids") for name in ("train.txt", "augmented.raw"))
    found = [answer(load(trained), data, False, 7, torch.device("cpu")) for data in (whole, skipped)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_teacher_of_nan_is_refused(trained: Place) -> None:
    teacher = load(trained)
    with torch.no_grad():
        next(iter(teacher.model.decoder.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match="not all finite"):
        answer(teacher, EncodedData(trained.data / "train.txt.ids"), False, 7, torch.device("cpu"))
    assert not (trained.data / "train.txt.teacher").exists()


# --------------------------------------------------------------------------------------------------------- student


def make_trainer(place: Place, *flags: str, **changes: Any) -> DistillationTrainer:
    """A student's trainer without dropout, and the student a copy of the teacher."""
    args, _ = train.get_params(place.train_flags(*flags))
    own = {"kd_temperature": 1.0, "hard_loss_ratio": 0.0, "state_loss_ratio": 0.0, "att_loss_ratio": 0.0,
           "state_distill_cs": False, "logging_steps": 2, "log_evaluate_during_training": False}
    args = argparse.Namespace(**{**vars(args), **own, **changes})
    teacher, data = load(place), EncodedData(place.data / "train.txt.ids")
    logits = answer(teacher, data, False, 8, torch.device("cpu"))
    model = load(place).model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    valid = EncodedData(place.data / "valid.txt.ids")
    run = Run(args, data, valid, make_run_info(), model, Accelerator(cpu=True))
    return DistillationTrainer(run, teacher, logits)


def test_the_loss_is_the_sum_of_its_parts(trained: Place) -> None:
    trainer = make_trainer(trained, kd_temperature=2.0)
    batch = next(iter(trainer._groups()))[0][0]
    loss, logits = trainer.objective(batch)
    assert loss.abs().max() < 1e-5  # the student answers as the teacher does
    with torch.no_grad():
        trainer.plain_model.decoder.output.bias[0] += 1.0
    trainer.args.hard_loss_ratio = 0.25
    loss, logits = trainer.objective(batch)
    hard = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    expected = 0.25 * hard + 0.75 * logit_loss(logits, batch.teacher, 2.0)
    torch.testing.assert_close(loss, expected)
    trainer.args.hard_loss_ratio = 1.0
    torch.testing.assert_close(trainer.objective(batch)[0], hard)


def test_word_vectors_have_no_hidden_states(trained: Place) -> None:
    for changes in ({"state_loss_ratio": 1.0}, {"att_loss_ratio": 1.0}):
        with pytest.raises(InputError, match="are for transformers, and this is none"):
            make_trainer(trained, **changes)


@pytest.mark.parametrize(("name", "says"), [
    ("BART", "bart models do not tell the hidden states of one stack"),
    ("SqueezeBERT", "squeezebert models do not tell their attentions"), ("ELECTRA", None), ("GPT-2", None)])
def test_models_that_tell_what_they_compute_inside(name: str, says: str | None, tmp_path: Path) -> None:
    path = make_model(name, tmp_path / "model", ["play some jazz", "will it rain in tokyo"])
    embedding = TransformerEmbedding(load_pretrained(str(path)), "first")
    if says:
        with pytest.raises(InputError, match=says):
            keep_inside(embedding, True, "x")
        return
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    before = embedding.eval()(ids, mask)
    keep_inside(embedding, True, "x")
    torch.testing.assert_close(embedding(ids, mask), before)  # asked for attentions, it answers the same
    assert len(embedding.output.hidden_states) == LAYERS + 1 and len(embedding.output.attentions) == LAYERS
    last = embedding.output.hidden_states[-1].masked_fill(~mask.unsqueeze(-1), 0.0)
    torch.testing.assert_close(last, before)


def test_batches_bring_the_answers_of_their_sentences(trained: Place) -> None:
    trainer = make_trainer(trained)
    batch = trainer.read_batch([4, 0, 9])
    assert torch.equal(batch.teacher, torch.from_numpy(trainer.logits[[4, 0, 9]]))
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.teacher, batch.teacher) and torch.equal(moved.targets, batch.targets)
