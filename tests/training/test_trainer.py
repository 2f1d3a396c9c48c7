"""The training loop: accumulation, clipping, averaging, evaluation, stopping."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import Place
from helpers import make_config, make_run_info
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tqdm import tqdm

import train
from cli.training_flags import TABLE
from dataset import EncodedData, load_table, pad
from model import WordEmbedding, build_model
from training import trainer
from training.losses import cosine_with_warmup, evaluate
from training.run import Run
from training.trainer import EarlyStopping, Trainer

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------------- steps


def make_trainer(place: Place, *flags: str) -> Trainer:
    """A Trainer on the CPU in fp32, without dropout, as train.py makes it."""
    from accelerate import Accelerator

    args, _ = train.get_params(place.train_flags(*flags))
    data = EncodedData(place.data / "train.txt.ids")
    torch.manual_seed(args.seed)
    table = load_table(place.data / "embedding.npy", data.encoding.table)
    model = build_model(make_config(dropout=0.0), 4, WordEmbedding(table, data.encoding.seen_rows))
    made = Trainer(Run(args, data, EncodedData(place.data / "valid.txt.ids"), make_run_info(), model,
                       Accelerator(cpu=True)))
    made.writer = Silent()
    return made


class Silent:
    """In place of a SummaryWriter."""

    def add_scalar(self, *values: Any) -> None:
        """Nothing."""


def parameters(made: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in made.plain_model.parameters()]


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def batch_of(made: Trainer, *places: int) -> Any:
    return made.train_data.batch(list(places))


@pytest.mark.parametrize(("one", "other"), [
    ([[0], [1], [2], [3], [4], [5], [6], [7]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([[0, 1], [2, 3], [4]], [[0, 1, 2, 3], [4]]),
    ([[4], [0, 1, 2, 3]], [[0, 1, 2, 3, 4]]),
])
def test_how_a_step_is_cut_does_not_matter(encoded: Place, one: list[list[int]], other: list[list[int]]) -> None:
    ends = []
    for cut in (one, other):
        made = make_trainer(encoded)
        for _ in range(3):
            made.train_step([batch_of(made, *places) for places in cut], sum(map(len, cut)))
        ends.append(parameters(made))
    close(*ends)


@pytest.mark.parametrize("flags", [["--batch_size=1", "--gradient_accumulation_steps=64"],
                                   ["--batch_size=8", "--gradient_accumulation_steps=7"]])
def test_accumulated_epochs_equal_whole_batches(encoded: Place, flags: list[str]) -> None:
    ends = []
    for cut in (["--batch_size=64"], flags):  # 46 examples: the last group is never complete
        made = make_trainer(encoded, "--epoch=3", *cut)
        assert made.steps_per_epoch == 1
        for _ in range(3):
            made.train_epoch(tqdm(disable=True))
        assert made.progress.step == made.total_steps == 3
        ends.append(parameters(made))
    close(*ends)


@pytest.mark.parametrize(("size", "accumulation", "groups"), [
    (8, 4, [4, 2]), (8, 1, [1] * 6), (8, 6, [6]), (1, 45, [45, 1])])
def test_groups(encoded: Place, size: int, accumulation: int, groups: list[int]) -> None:
    made = make_trainer(encoded, f"--batch_size={size}", f"--gradient_accumulation_steps={accumulation}")
    found = list(made._groups())
    assert sorted((len(group) for group, _ in found), reverse=True) == groups and made.steps_per_epoch == len(groups)
    assert [examples for _, examples in found] == [sum(map(len, group)) for group, _ in found]


def test_step_equals_plain_torch(encoded: Place) -> None:
    made = make_trainer(encoded, "--max_grad_norm=0", "--weight_decay=0", "--lr=0.01")
    model = copy.deepcopy(made.plain_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(4):
        batch = batch_of(made, step, step + 5, step + 9)
        made.train_step([batch], len(batch))
        optimizer.param_groups[0]["lr"] = 0.01 * cosine_with_warmup(step, 0, made.total_steps)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.targets).backward()
        optimizer.step()
    close(parameters(made), [p.detach() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_clipping(encoded: Place, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer(encoded, f"--max_grad_norm={limit}")
    norms = []

    def look(*_: Any, **__: Any) -> None:
        gradients = [p.grad for p in made.plain_model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    monkeypatch.setattr(made.optimizer, "step", look)
    made.train_step([batch_of(made, 0, 1, 2)], 3)
    assert norms[0] == pytest.approx(limit, rel=1e-3) if limit else norms[0] > 0.1


@pytest.mark.parametrize(("flags", "warmup"), [
    (["--num_warmup_steps=3", "--warmup_epoch=1", "--warmup_ratio=0.5"], 3),
    (["--num_warmup_steps=0", "--warmup_epoch=1"], 0), (["--warmup_epoch=1", "--warmup_ratio=0.5"], 6),
    (["--warmup_ratio=0.5"], 12), ([], 0)])
def test_which_warmup_wins(encoded: Place, flags: list[str], warmup: int) -> None:
    made = make_trainer(encoded, "--epoch=4", *flags)
    factor = made.scheduler.lr_lambdas[0]
    assert made.total_steps == 24 and factor(warmup) == 1 > factor(warmup + 1)
    assert all(factor(step) < 1 for step in range(warmup))


def test_max_train_steps(encoded: Place) -> None:
    made = make_trainer(encoded, "--epoch=4", "--max_train_steps=8")
    while not made.progress.finished:
        made.train_epoch(tqdm(disable=True))
    assert made.progress.step == made.total_steps == 8


def test_averaged_model_is_saved_and_training_goes_on_without_it(encoded: Place) -> None:
    plain = make_trainer(encoded, "--epoch=1")
    averaged = make_trainer(encoded, "--epoch=1", "--ema_decay=0.9")
    for made in (plain, averaged):
        made.train_epoch(tqdm(disable=True))
    close(parameters(plain), parameters(averaged))
    saved = torch.load(encoded.model, weights_only=True)["model"]
    for name, value in averaged.average.state_dict()["average"].items():
        assert torch.equal(saved[name], value)


def test_a_skipped_step_moves_neither_the_schedule_nor_the_average(encoded: Place) -> None:
    """In fp16 a step is skipped whose gradients overflow; here the scaler of a GPU is at work on the CPU."""
    made = make_trainer(encoded, "--ema_decay=0.9", "--max_grad_norm=0", "--num_warmup_steps=4")
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    made.optimizer = AcceleratedOptimizer(made.optimizer.optimizer, scaler=made.accelerator.scaler)
    made.accelerator._optimizers = [made.optimizer]
    loss = made._loss

    def state() -> tuple[Any, ...]:
        return made.scheduler.last_epoch, made.average.updates, [*parameters(made), *map(Tensor.clone,
                                                                                         made.average.average)]

    for step in range(4):
        before = state()
        made._loss = lambda batch, step=step: loss(batch) * (math.inf if step == 2 else 1.0)
        made.read_losses = made.losses.clear
        made.train_step([batch_of(made, 0, 1, 2)], 3)
        after = state()
        moved = [not torch.equal(one, other) for one, other in zip(before[2], after[2], strict=True)]
        if step == 2:
            assert after[:2] == before[:2] and not any(moved) and made.accelerator.scaler.get_scale() == 2.0
        else:
            assert after[:2] == (before[0] + 1, before[1] + 1) and any(moved) == (step > 0)  # the first rate is 0
        assert made.progress.step == step + 1


def test_evaluate_against_a_loop(encoded: Place) -> None:
    made = make_trainer(encoded)
    found = evaluate(made.plain_model, made.valid_data, 5, CPU)
    losses, right = [], []
    for place, label in enumerate(made.valid_data.class_ids()):
        batch = pad([made.valid_data.token_ids[slice(*made.valid_data.offsets[place : place + 2])]])
        with torch.no_grad():
            logits = made.plain_model(batch.input_ids, batch.attention_mask)[0]
        losses.append(-logits.log_softmax(-1)[label].item())
        right.append(logits.argmax().item() == label)
    assert found == pytest.approx({"loss": np.mean(losses), "accuracy": np.mean(right)}, rel=1e-5)


# ----------------------------------------------------------------------------------------------- the best, stopping


def scripted(monkeypatch: pytest.MonkeyPatch, *metrics: tuple[float, float]) -> None:
    """Let evaluation answer these losses and accuracies in turn."""
    turn = iter(metrics)

    def answer(*_: Any) -> dict[str, float]:
        loss, accuracy = next(turn)
        return {"loss": loss, "accuracy": accuracy}

    monkeypatch.setattr(trainer, "evaluate", answer)


def run(made: Trainer) -> Trainer:
    while not made.progress.finished:
        made.train_epoch(tqdm(disable=True))
    return made


COURSE = [(0.9, 0.5), (0.5, 0.6), (0.7, 0.8), (0.8, 0.8), (0.6, 0.7), (0.5, 0.6)]


@pytest.mark.parametrize(("measure", "epoch"), [("loss", 2), ("accuracy", 4), ("last", 6)])
def test_measure_chooses_the_model(encoded: Place, monkeypatch: pytest.MonkeyPatch, measure: str, epoch: int) -> None:
    scripted(monkeypatch, *COURSE)
    made = run(make_trainer(encoded, "--epoch=6", f"--measure={measure}"))
    assert made.progress.best["step"] == epoch * made.steps_per_epoch and made.progress.best["epoch"] == epoch
    assert torch.load(encoded.model, weights_only=True)["metrics"] == made.progress.best


@pytest.mark.parametrize(("patience", "measure", "last"), [
    (1, "loss", 3), (2, "loss", 4), (2, "accuracy", 5), (9, "loss", 6), (1, "last", 6)])
def test_patience(encoded: Place, monkeypatch: pytest.MonkeyPatch, patience: int, measure: str, last: int) -> None:
    scripted(monkeypatch, *COURSE)
    made = run(make_trainer(encoded, "--epoch=6", f"--patience={patience}", f"--measure={measure}"))
    assert made.progress.epoch == last


def test_a_gain_within_the_epoch_counts(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    course = [(0.9, 0.5), (0.8, 0.5), (0.85, 0.5), (0.7, 0.5), (0.75, 0.5), (0.72, 0.5), (0.73, 0.5)]
    scripted(monkeypatch, *course)
    made = run(make_trainer(encoded, "--epoch=9", "--patience=1", "--eval_and_save_steps=4"))  # 6 steps an epoch
    assert made.progress.epoch == 3 and made.progress.best["valid_loss"] == 0.7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_valid_loss_that_is_no_number(encoded: Place, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    scripted(monkeypatch, (0.9, 0.5), (value, 0.9))
    made = make_trainer(encoded)
    made.train_epoch(tqdm(disable=True))
    before = [path.read_bytes() for path in (encoded.model, made.state_path)]
    with pytest.raises(trainer.InputError, match="valid loss is"):
        made.train_epoch(tqdm(disable=True))
    assert [path.read_bytes() for path in (encoded.model, made.state_path)] == before


@pytest.mark.parametrize(("measure", "better"), [("loss", False), ("accuracy", True)])
def test_equals(measure: str, better: bool) -> None:
    stopping = EarlyStopping(measure, patience=1)
    best = {"valid_loss": 0.5, "valid_accuracy": 0.9}
    assert stopping.is_better({"loss": 0.5, "accuracy": 0.9}, best) == better and not stopping.gained


@given(st.sampled_from(["loss", "accuracy", "last"]), st.integers(1, 4), st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.sampled_from([0.7, 0.8, 0.9])), min_size=1, max_size=12))
def test_early_stopping(measure: str, patience: int, epochs: list[tuple[float, float]]) -> None:
    """It stops after `patience` epochs none of which was better than the best before; equals are kept by accuracy."""
    stopping, best = EarlyStopping(measure, patience), {}
    last_gain = None
    for epoch, (loss, accuracy) in enumerate(epochs, 1):
        before = epochs[: epoch - 1]
        gain = measure == "last" or not before or (
            loss < min(x for x, _ in before) if measure == "loss" else accuracy > max(x for _, x in before))
        tie = measure == "accuracy" and bool(before) and accuracy == max(x for _, x in before)
        better = stopping.is_better({"loss": loss, "accuracy": accuracy}, best)
        assert better == (gain or tie)
        if better:
            best = {"valid_loss": loss, "valid_accuracy": accuracy}
        last_gain = epoch if gain else last_gain
        stops = stopping.ends()
        assert stops == (epoch - last_gain >= patience) and stopping.epochs_without_gain == epoch - last_gain
        if stops:
            break


def test_a_resumed_run_must_share_the_decisive_flags_and_no_others(encoded: Place) -> None:
    made = make_trainer(encoded)
    names = [*(flag.name for flag in TABLE), "precision"]
    made.info = make_run_info(flags=dict.fromkeys(names, "now"))
    decisive = []
    for name in names:
        other = make_run_info(flags={**made.info.flags, name: "then"})
        try:
            made._load_progress({"processes": 1, "run": other, "progress": asdict(made.progress)})
        except trainer.InputError as error:
            assert f"other flags ({name} then then, now now)" in str(error)
            decisive.append(name)
    assert decisive == [*(flag.name for flag in TABLE if flag.decisive), "precision"]
    # What must decide, and what must not, whatever the table says.
    assert {"lr", "seed", "batch_size", "epoch", "criterion", "embedding_trainable", "restore_path"} <= set(decisive)
    assert not {"resume", "save_path", "log_path", "keep_checkpoints", "local_rank"} & set(decisive)


def test_state_path(encoded: Place) -> None:
    assert make_trainer(encoded).state_path == Path(f"{encoded.model}.state")


def test_on_epoch_hears_of_each_epoch_and_may_end_the_run(encoded: Place) -> None:
    made = make_trainer(encoded, "--epoch=5", "--eval_and_save_steps=4")  # 6 steps an epoch
    heard = []

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        heard.append((epoch, metrics["step"], metrics["valid_accuracy"]))
        if epoch == 3:
            raise StopIteration

    made.on_epoch = on_epoch
    with pytest.raises(StopIteration):
        run(made)
    assert heard == [(point["epoch"], point["step"], point["valid_accuracy"]) for point in made.progress.history
                     if point["step"] % 6 == 0] and len(heard) == 3
