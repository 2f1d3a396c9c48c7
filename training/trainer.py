"""The training loop: steps, evaluation, early stopping, checkpoints and resume.

At every evaluation (each --eval_and_save_steps steps and at the end of each epoch) two files are written: the
checkpoint, if this is the best model so far, and `SAVE_PATH.state`, from which --resume goes on. A run killed at any
moment and resumed goes through the same steps as one left alone, bit for bit on the CPU. Another number of processes
goes on from the end of the last epoch, `SAVE_PATH.state.epoch`.

An optimizer step's sentences are drawn as a whole, then cut into what a process computes at a time, so that neither
accumulation nor the number of processes changes what is learned.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from compression.quantization import start_quantization
from dataset import Batch, BucketSampler, EncodedData, make_loader, shard
from model import Classifier, parameter_groups
from pretrained.loading import merged_weights
from sentence_classifier.errors import InputError
from training.distributed import (
    gather,
    is_sharded,
    load_optimizer_state,
    optimizer_state,
    prepare,
    total,
    whole_weights,
)
from training.losses import WeightAverage, balanced_class_weights, cosine_with_warmup, evaluate, make_criterion
from util import Checkpoint, Curves, RunInfo, load_state, save_checkpoint, save_state, second_name

logger = logging.getLogger(__name__)

EARLIER = "left by an earlier version of train.py; start anew without --resume."


class Diverged(InputError):
    """The loss is no number any more."""


def find_state(save_path: str, processes: int) -> dict[str, Any] | None:
    """The state of the run that writes to `save_path`, None where there is none.

    For another number of processes than that run's it is the one at the end of the last epoch.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(f"{save_path}.state")
    if not path.exists():
        return None
    state = load_state(path)
    if "processes" not in state:
        raise InputError(f"{path}: {EARLIER}")
    if state["processes"] != processes and state["progress"]["position"]:
        state = load_state(f"{path}.epoch")
    return state


class Trainer:
    """Trains a classifier on encoded data and keeps the best checkpoint.

    Args:
        model: on the CPU.
        train, valid: encoded data.
        args: train.py's flags.
        info: what a checkpoint says of the run.
        accelerator: device, precision, processes.
        on_epoch: called after each epoch's evaluation with the number of epochs done and the evaluation's metrics
            (the newest of `history`), in all processes; what it raises ends the training.
        state: what save_state saved, to go on from.

    Raises:
        InputError: the run to go on with had other flags, another config or other data.
    """

    # Flags that a resumed run must share.
    decisive: tuple[str, ...] = (
        "batch_size", "eval_batch_size", "epoch", "max_train_steps", "eval_and_save_steps", "lr", "embedding_lr",
        "layer_lr_decay", "num_warmup_steps", "warmup_epoch", "warmup_ratio", "patience", "adam_epsilon",
        "weight_decay", "gradient_accumulation_steps", "max_grad_norm", "seed", "embedding_trainable", "measure",
        "criterion", "class_weights", "kd_temperature", "word_dropout", "embedding_dropout", "token_cutoff",
        "ema_decay", "rdrop", "precision", "restore_path", "bert_model_name_or_path", "bert_use_feature_based",
        "bert_remove_layers", "lora_r", "compile", "enable_qat", "enable_qat_fx", "enable_diffq", "diffq_penalty")

    def __init__(self, model: Classifier, train: EncodedData, valid: EncodedData, args: argparse.Namespace,
                 info: RunInfo, accelerator: Accelerator,
                 on_epoch: Callable[[int, dict[str, float]], None] | None = None,
                 state: dict[str, Any] | None = None) -> None:
        self.args = args
        self.info = info
        self.accelerator = accelerator
        self.on_epoch = on_epoch
        self.train_data = train
        self.valid_data = valid
        self.processes = accelerator.num_processes
        # What an optimizer step takes is drawn whole, so that it does not depend on how it is cut.
        whole = args.batch_size * args.gradient_accumulation_steps * self.processes
        self.sampler = BucketSampler(train.lengths, whole, seed=args.seed)
        weights = None
        if args.class_weights == "balanced":
            weights = balanced_class_weights(train.class_ids(), len(train.labels)).to(accelerator.device)
        self.criterion = make_criterion(args.criterion, weights, args.kd_temperature)

        self.steps_per_epoch = len(self.sampler)
        self.total_steps = self.steps_per_epoch * args.epoch
        if args.max_train_steps:
            self.total_steps = min(self.total_steps, args.max_train_steps)
        warmup = self._warmup_steps()

        self.step = 0
        self.epoch = 0
        self.position = 0  # steps of the epoch that are done
        self.loss_sum, self.loss_count = 0.0, 0  # since the last evaluation
        self.losses: list[Tensor] = []  # of batches, on the device, not yet in loss_sum
        self.best: dict[str, Any] = {}
        self.epochs_without_gain = 0
        self.gained = False  # within this epoch
        self.history: list[dict[str, float]] = []
        self.finished = False
        self.saved_at_end = False  # whether the state on disk is one at the end of an epoch
        self.writer: Any = None
        if state:
            self._load_progress(state)

        groups = parameter_groups(model, args.weight_decay, args.lr, args.embedding_lr, args.layer_lr_decay)
        optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=args.adam_epsilon,
                                      fused=accelerator.device.type in ("cpu", "cuda"))
        self.quantization = start_quantization(model, optimizer, args)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, warmup, self.total_steps)
        )
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        if state and not self.finished:
            moments = state["optimizer"]["state"]
            if any(moments[n]["exp_avg"].shape != p.shape for n, p in enumerate(self.parameters) if n in moments):
                raise InputError(f"{self.state_path}: {EARLIER}")  # it trained whole token tables
            model.load_state_dict(state["model"])  # before DeepSpeed shares the weights out
        self.model, self.optimizer = prepare(model, optimizer, accelerator)
        self.plain_model = model
        if args.compile:
            self.model = torch.compile(self.model, dynamic=True)
        self.average = WeightAverage(self.plain_model, args.ema_decay) if args.ema_decay else None
        if accelerator.process_index:  # all began with the same weights; from here on each has dropout of its own
            torch.manual_seed(args.seed + _APART * accelerator.process_index)
        if state and not self.finished:
            self._load_rest(state)

    def _warmup_steps(self) -> int:
        args = self.args
        if args.num_warmup_steps is not None:
            return args.num_warmup_steps
        if args.warmup_epoch:
            return round(args.warmup_epoch * self.steps_per_epoch)
        return round(args.warmup_ratio * self.total_steps)

    # -------------------------------------------------------------------------------------------------- state files

    @property
    def state_path(self) -> Path:
        """Where --resume finds the run."""
        return Path(f"{self.args.save_path}.state")

    @property
    def epoch_path(self) -> Path:
        """The state at the end of the last epoch, where `state_path` is within one: for other numbers of processes."""
        return Path(f"{self.state_path}.epoch")

    def save_state(self) -> None:
        """Write all that a resumed run needs to go on as if it had never stopped. To be called in all processes."""
        state: dict[str, Any] = {"processes": self.processes,
                 "progress": {name: getattr(self, name) for name in _PROGRESS}}
        with contextlib.ExitStack() as stack:
            if not self.finished:
                stack.enter_context(whole_weights(self.plain_model, self.accelerator))
                state |= {
                    "model": self.plain_model.state_dict(),
                    "optimizer": optimizer_state(self.optimizer, self.parameters, self.accelerator),
                    "scheduler": {"last_epoch": self.scheduler.last_epoch},
                    "average": self.average.state_dict() if self.average else None,
                    "quantization": self.quantization.state_dict() if self.quantization else None,
                    "random": gather(self._random_state(), self.accelerator),
                    "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                }
            if self.accelerator.is_main_process:
                if self.position and self.saved_at_end:
                    second_name(self.state_path, self.epoch_path)
                save_state(self.info, state, self.state_path)
                if not self.position:
                    self.epoch_path.unlink(missing_ok=True)
        self.saved_at_end = not self.position

    def _load_progress(self, state: dict[str, Any]) -> None:
        """Check that the state is of this run, and go back to where it stood."""
        flags = self.info.flags
        moved = state["processes"] != self.processes
        # What one process computes at a time may be chosen anew with the number of processes.
        free = ("batch_size", "gradient_accumulation_steps") if moved else ()
        differing = [f"{name} {value} then, {flags.get(name)} now" for name, value in state["run"].flags.items()
                     if name in self.decisive and name not in free and flags.get(name) != value]
        if differing:
            raise InputError(f"{self.state_path}: the run to resume had other flags ({'; '.join(differing)}); "
                             "give the same ones, or start anew without --resume.")
        if state["run"].identity != self.info.identity:
            raise InputError(f"{self.state_path}: the run to resume had another config or other data; "
                             "start anew without --resume.")
        self.info = replace(self.info, run_id=state["run"].run_id)
        for name in _PROGRESS:
            setattr(self, name, state["progress"][name])
        self.saved_at_end = not self.position and not moved
        if moved and not self.finished:
            self.step = self.epoch * self.steps_per_epoch
            logger.info("[processes: %d, where there were %d: resuming at the end of epoch %d, step %d of now %d; "
                        "dropout draws anew]", self.processes, state["processes"], self.epoch, self.step,
                        self.total_steps)
            self.finished = self.step >= self.total_steps

    def _load_rest(self, state: dict[str, Any]) -> None:
        """What goes with the weights."""
        load_optimizer_state(self.optimizer, self.parameters, self.accelerator, state["optimizer"])
        self.scheduler.last_epoch = self.step
        for group, base, factor in zip(self.optimizer.param_groups, self.scheduler.base_lrs,
                                       self.scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.scheduler.last_epoch)
        if self.average:
            self.average.load_state_dict(state["average"])
        if self.quantization:
            self.quantization.load_state_dict(state["quantization"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["processes"] == self.processes:
            random = state["random"][self.accelerator.process_index]
            torch.set_rng_state(random["cpu"])
            if "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.accelerator.device)
        else:
            torch.manual_seed(self.args.seed + self.step + _APART * self.accelerator.process_index)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        return state

    # -------------------------------------------------------------------------------------------------------- steps

    def fit(self) -> dict[str, Any]:
        """Train to the end. Returns the metrics of the best model."""
        if self.finished:
            logger.info("[%s is finished; nothing is left to resume]", self.args.save_path)
            return self.best
        if not self.step and not self.saved_at_end:
            self.save_state()  # so that --resume never finds another run's state in the place of this one's
        main = self.accelerator.is_main_process
        if main:
            self.writer = Curves(Path(self.args.log_dir) / self.info.run_id, self.step + 1)
        started = time.time()
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None if main else True,
                   dynamic_ncols=True)
        try:
            while not self.finished:
                self.train_epoch(bar)
        finally:
            bar.close()
        logger.info("[trained %d steps in %.1f s]", self.step, time.time() - started)
        return self.best

    def train_epoch(self, bar: tqdm) -> None:
        """Train from the current position to the end of the epoch (or of the run)."""
        self.sampler.epoch = self.epoch
        self.model.train()
        for group, examples in self._groups():
            self._train_step(group, examples)
            bar.update()
            self.position += 1
            last = self.position >= len(self.sampler)
            stop = self.step >= self.total_steps
            if last or stop:
                break
            if self.step % self.args.eval_and_save_steps == 0:
                self.evaluate_and_save(bar)
                self.model.train()
        self.epoch += 1
        self.position = 0
        self.finished = self.step >= self.total_steps
        self.evaluate_and_save(bar, end_of_epoch=True)
        if self.on_epoch:
            self.on_epoch(self.epoch, self.history[-1])

    def _groups(self) -> Iterator[tuple[list[Batch], int]]:
        """What is left of the epoch, by optimizer steps: this process's batches, and the examples of all processes."""
        steps = self.sampler.batches()[self.position :]
        batches = make_loader(self.train_data, (part for step in steps for part in self._shard(step)),
                              self.accelerator.device.type == "cuda")
        for step in steps:
            yield [next(batches) for _ in self._shard(step)], len(step)

    def _shard(self, step: Any) -> list[list[int]]:
        return shard(step, self.args.batch_size, self.processes, self.accelerator.process_index)

    def _train_step(self, group: list[Batch], examples: int) -> None:
        """One optimizer step; the gradient is that of the mean over all of the step's examples.

        Args:
            group: this process's batches.
            examples: in the batches of all processes.
        """
        for place, batch in enumerate(group, 1):
            batch = batch.to(self.accelerator.device, non_blocking=True)
            with self._backward(last=place == len(group)) as backward:
                loss = self._loss(batch)
                backward(loss / (examples / self.processes))  # gradients are averaged over processes
            self.losses.append(loss.detach())
        self.loss_count += examples
        if self.accelerator.device.type == "cpu" or self.step % _STEPS_UNREAD == 0:
            self._read_losses()
        if self.args.max_grad_norm and not is_sharded(self.accelerator):
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            self.average.update()

    def _read_losses(self) -> None:
        """Add up the losses since the last reading, for which a GPU has to finish what it does: so not at each step."""
        if not self.losses:
            return
        loss_sum = total(torch.stack(self.losses).cpu().double().sum().view(1), self.accelerator).item()
        self.losses.clear()
        if not math.isfinite(loss_sum):
            raise Diverged(f"the loss is {loss_sum} at step {self.step + 1}; lower --lr (now {self.args.lr:g}). "
                           "The best checkpoint so far, if there is one, is untouched.")
        self.loss_sum += loss_sum

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One pass: the loss of each example [B], and the logits [B, C]. A subclass may learn from something else."""
        assert batch.targets is not None  # encoded data have them
        with self.accelerator.autocast():
            logits = self.model(batch.input_ids, batch.attention_mask).float()
        logits = logits[: len(batch)]
        return self.criterion(logits, batch.targets), logits

    @contextlib.contextmanager
    def _backward(self, last: bool) -> Iterator[Callable[..., None]]:
        """The backward pass of a batch; with the last one of a step, processes put their gradients together."""
        if is_sharded(self.accelerator):
            self.accelerator.sync_gradients = last  # DeepSpeed steps at once then
            yield functools.partial(self.accelerator.backward, scale_wrt_gas=False)
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield self.accelerator.backward

    def _loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its examples.

        With --rdrop, of two passes with different dropout, plus the divergence between their predictions
        (R-Drop, Liang et al. 2021, arXiv 2106.14448, equation 4).
        """
        loss, logits = self.objective(batch)
        if self.args.rdrop:
            loss_again, again = self.objective(batch)
            loss = (loss + loss_again) / 2
            p, q = logits.log_softmax(-1), again.log_softmax(-1)
            divergence = F.kl_div(p, q, reduction="none", log_target=True) + F.kl_div(
                q, p, reduction="none", log_target=True)
            loss = loss + self.args.rdrop * divergence.sum(-1) / 4
        if self.quantization:
            loss = loss + self.quantization.penalty()
        return loss.sum()

    # --------------------------------------------------------------------------------------------------- evaluation

    def evaluate_and_save(self, bar: tqdm, end_of_epoch: bool = False) -> None:
        """Measure on the valid data, keep the model if it is the best, decide on stopping, write the state."""
        self._read_losses()
        if self.quantization and self.processes > 1:  # each process has seen ranges of its own
            ranges = self.quantization.state_dict()
            self.quantization.load_state_dict(
                {name: total(seen, self.accelerator) / self.processes for name, seen in ranges.items()})
        with self.average.applied() if self.average else contextlib.nullcontext():
            metrics = evaluate(self.plain_model, self.valid_data, self.args.eval_batch_size, self.accelerator.device,
                               self.accelerator)
            if not math.isfinite(metrics["loss"]):
                raise Diverged(f"the valid loss is {metrics['loss']} at step {self.step}; lower --lr.")
            point = {"step": self.step, "epoch": self.epoch, "train_loss": self.loss_sum / max(1, self.loss_count),
                     "valid_loss": metrics["loss"], "valid_accuracy": metrics["accuracy"],
                     "lr": self.optimizer.param_groups[0]["lr"]}
            self.loss_sum, self.loss_count = 0.0, 0
            self.history.append(point)
            better = self._is_better(metrics)
            if better:
                self.gained |= not self._is_tie(metrics)
                self.best = point
                with whole_weights(self.plain_model, self.accelerator):
                    if self.accelerator.is_main_process:
                        checkpoint = Checkpoint(run=self.info, metrics=point, **self._weights())
                        save_checkpoint(checkpoint, self.args.save_path, self.args.keep_checkpoints)
        if end_of_epoch:
            self.epochs_without_gain = 0 if self.gained else self.epochs_without_gain + 1
            self.gained = False
            if self.epochs_without_gain >= self.args.patience and not self.finished:
                logger.info("[no gain on valid for %d epochs: stopping]", self.epochs_without_gain)
                self.finished = True
        self._report(point, better, bar)
        self.save_state()

    def _weights(self) -> dict[str, Any]:
        """The model under the names of an fp32 model, and what quantizes it."""
        weights = merged_weights(self.plain_model)
        if not self.quantization:
            return {"model": weights}
        return {"model": self.quantization.weights(weights), "quantization": self.quantization.metadata()}

    def _is_better(self, metrics: dict[str, float]) -> bool:
        if not self.best:
            return True
        if self.args.measure == "last":
            return True
        if self.args.measure == "loss":
            return metrics["loss"] < self.best["valid_loss"]
        return metrics["accuracy"] > self.best["valid_accuracy"] or self._is_tie(metrics)

    def _is_tie(self, metrics: dict[str, float]) -> bool:
        """As accurate as the best so far: the later model is kept, yet it is no gain that patience counts.

        A small valid file is soon answered as well as it ever will be, while training goes on to help other data; the
        loss does not break such ties well, since it punishes confidence, which grows with training.
        """
        return self.args.measure == "accuracy" and metrics["accuracy"] == self.best.get("valid_accuracy")

    def _report(self, point: dict[str, float], better: bool, bar: tqdm) -> None:
        if not self.accelerator.is_main_process:
            return
        bar.set_postfix(valid=f"{point['valid_accuracy']:.4f}", refresh=False)
        for name, value in point.items():
            if name not in ("step", "epoch"):
                self.writer.add_scalar(name.replace("_", "/"), value, int(point["step"]))
        logger.info("[epoch %d step %d] train loss %.4f, valid loss %.4f, valid accuracy %.4f, lr %.2e%s",
                    point["epoch"], point["step"], point["train_loss"], point["valid_loss"],
                    point["valid_accuracy"], point["lr"], " *" if better else "")


_APART = 1_000_003  # of the seeds of processes
_STEPS_UNREAD = 20  # on a GPU, after which the losses are read
# Attributes that a state file carries.
_PROGRESS = ("step", "epoch", "position", "loss_sum", "loss_count", "best", "epochs_without_gain", "gained", "history",
             "finished")
