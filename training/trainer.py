"""The training loop: steps, evaluation, early stopping, checkpoints and resume.

At every evaluation (each --eval_and_save_steps steps and at the end of each epoch) two files are written: the
checkpoint, if this is the best model so far, and `SAVE_PATH.state`, from which --resume goes on. A run killed at any
moment and resumed goes through the same steps as one left alone, bit for bit on the CPU. Another number of processes
goes on from the end of the last epoch, `SAVE_PATH.state.epoch`.

An optimizer step's sentences are drawn as a whole, then cut into what a process computes at a time, so that neither
accumulation nor the number of processes changes what is learned.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from torch import Tensor, nn
from tqdm import tqdm

from cli.training_flags import DECISIVE
from compression.quantization import start_quantization
from dataset import Batch, BucketSampler, prefetch, shard
from pretrained.surgery import merged_weights
from sentence_classifier.errors import InputError
from training.distributed import is_sharded, load_optimizer_state, optimizer_state, prepare, total, whole_weights
from training.losses import (
    WeightAverage,
    cosine_with_warmup,
    divergence,
    evaluate,
    make_class_weights,
    make_criterion,
    parameter_groups,
)
from training.run import Run
from util import Checkpoint, load_state, save_checkpoint, save_state, second_name

logger = logging.getLogger(__name__)

SEED_DISTANCE = 1_000_003  # between the seeds of processes
STEPS_UNREAD = 20  # on a GPU, after which the losses are read


class Diverged(InputError):
    """The loss is not finite any more."""


def find_state(save_path: str, processes: int) -> dict[str, Any] | None:
    """The state of the run that writes to `save_path`, None where there is none.

    For another number of processes than that run's it is the one at the end of the last epoch.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(f"{save_path}.state")
    if not path.exists():
        logger.info("[no %s to resume: beginning at the beginning]", path)
        return None
    state = load_state(path)
    if state["processes"] != processes and state["progress"]["position"]:
        state = load_state(f"{path}.epoch")
    return state


@dataclass
class EarlyStopping:
    """Decides which model is kept, and after how many epochs without a gain training stops.

    A model as accurate as the best so far is kept, yet it is no gain that patience counts: a small valid file is soon
    answered as well as it ever will be, while training goes on to help other data. The loss does not break such ties
    well, since it punishes confidence, which grows with training.
    """

    measure: str  # "loss", "accuracy" (with several labels, micro F1) or "last"
    patience: int  # epochs
    gained: bool = False  # in this epoch
    epochs_without_gain: int = 0

    def is_better(self, metrics: dict[str, float], best: dict[str, Any]) -> bool:
        """Whether a model with these metrics takes the place of the best one so far (empty: there is none)."""
        if not best or self.measure == "last":
            better = gain = True
        elif self.measure == "loss":
            better = gain = metrics["loss"] < best["valid_loss"]
        else:
            name = "f1" if "f1" in metrics else "accuracy"
            better = metrics[name] >= best[f"valid_{name}"]
            gain = metrics[name] > best[f"valid_{name}"]
        self.gained |= gain
        return better

    def ends(self) -> bool:
        """Close an epoch; whether training stops."""
        self.epochs_without_gain = 0 if self.gained else self.epochs_without_gain + 1
        self.gained = False
        return self.epochs_without_gain >= self.patience


@dataclass
class Progress:
    """Where a run stands; a state file carries it."""

    stopping: EarlyStopping
    step: int = 0
    epoch: int = 0
    position: int = 0  # steps of the epoch that are done
    loss_sum: float = 0.0  # of the examples since the last evaluation
    loss_count: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # metrics of the model that is kept
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each evaluation
    finished: bool = False


class Curves:
    """TensorBoard's curves of a run, written at once. Where the disk is full they break off without ending the run.

    Points from `step` on that an earlier file in the folder holds are void.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._write(step, summary=scalar(name, value))

    def _write(self, step: int, **content: Any) -> None:
        with contextlib.suppress(OSError):
            self.file.write_event(Event(wall_time=time.time(), step=step, **content))
            self.file.flush()


class Trainer:
    """Trains a classifier on encoded data and keeps the best checkpoint.

    Args:
        on_epoch: called after each epoch's evaluation with the number of epochs done and the evaluation's metrics
            (the newest of the history), in all processes; what it raises ends the training.

    Raises:
        InputError: the run to go on with had other flags, another config or other data.
    """

    decisive: tuple[str, ...] = DECISIVE  # flags that a resumed run must share

    def __init__(self, run: Run, on_epoch: Callable[[int, dict[str, float]], None] | None = None) -> None:
        model, args, accelerator, state = run.model, run.args, run.accelerator, run.state
        self.args = args
        self.state_path = Path(f"{args.save_path}.state")  # where --resume finds the run
        # The state at the end of the last epoch, where the other is within one: for other numbers of processes.
        self.epoch_path = Path(f"{self.state_path}.epoch")
        self.info = run.info
        self.accelerator = accelerator
        self.on_epoch = on_epoch
        self.train_data = run.train
        if accelerator.device.type == "cuda":
            self.train_data.length_multiple = 8
        self.valid_data = run.valid
        self.processes = accelerator.num_processes
        self.notes: dict[str, Any] = {}  # what the results say beside the history
        step_batch_size = args.batch_size * args.gradient_accumulation_steps * self.processes
        self.sampler = BucketSampler(run.train.lengths, step_batch_size, seed=args.seed)
        weights = make_class_weights(args.class_weights, run.train)
        self.criterion = make_criterion(args.criterion, None if weights is None else weights.to(accelerator.device),
                                        args.kd_temperature, run.train.multi_label)

        self.steps_per_epoch = len(self.sampler)
        self.total_steps = self.steps_per_epoch * args.epoch
        if args.max_train_steps:
            self.total_steps = min(self.total_steps, args.max_train_steps)
        warmup = args.num_warmup_steps
        if warmup is None:
            warmup = round(args.warmup_epoch * self.steps_per_epoch if args.warmup_epoch
                           else args.warmup_ratio * self.total_steps)

        self.progress = Progress(EarlyStopping(args.measure, args.patience))
        self.losses: list[Tensor] = []  # of batches, on the device, not yet in the progress
        self.saved_at_end = False  # whether the state on disk is one at the end of an epoch
        self.writer: Any = None
        if state:
            self._load_progress(state)

        groups = parameter_groups(model, args.weight_decay, args.lr, args.embedding_lr, args.layer_lr_decay)
        optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=args.adam_epsilon,
                                      fused=accelerator.device.type in ("cpu", "cuda"))
        self.quantization = start_quantization(model, optimizer, args)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, warmup, self.total_steps))
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        if state and not self.progress.finished:
            model.load_state_dict(state["model"])  # before DeepSpeed shares the weights out
        self.model, self.optimizer = prepare(model, optimizer, accelerator)
        self.plain_model = model
        if args.compile:
            self.model = torch.compile(self.model, dynamic=True)
        self.average = WeightAverage(self.plain_model, args.ema_decay) if args.ema_decay else None
        if accelerator.process_index:  # all began with the same weights; from here on each has dropout of its own
            torch.manual_seed(args.seed + SEED_DISTANCE * accelerator.process_index)
        if state and not self.progress.finished:
            self._load_rest(state)

    def save_state(self) -> None:
        """Write all that a resumed run needs to go on as if it had never stopped. To be called in all processes."""
        state: dict[str, Any] = {"processes": self.processes, "progress": asdict(self.progress)}
        random = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        finished = self.progress.finished
        with contextlib.nullcontext() if finished else whole_weights(self.plain_model, self.accelerator):
            if not finished:
                state |= {
                    "model": self.plain_model.state_dict(),
                    "optimizer": optimizer_state(self.optimizer, self.parameters, self.accelerator),
                    "scheduler": {"last_epoch": self.scheduler.last_epoch},
                    "average": self.average.state_dict() if self.average else None,
                    "quantization": self.quantization.state_dict() if self.quantization else None,
                    "random": gather_object([random]),
                    "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                }
            if self.accelerator.is_main_process:
                if self.progress.position and self.saved_at_end:
                    second_name(self.state_path, self.epoch_path)
                save_state(self.info, state, self.state_path)
                if not self.progress.position:
                    self.epoch_path.unlink(missing_ok=True)
        self.saved_at_end = not self.progress.position

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
        self.progress = Progress(**{**state["progress"], "stopping": EarlyStopping(**state["progress"]["stopping"])})
        self.saved_at_end = not self.progress.position and not moved
        if moved and not self.progress.finished:
            self.progress.step = self.progress.epoch * self.steps_per_epoch
            logger.info("[processes: %d, where there were %d: resuming at the end of epoch %d, step %d of now %d; "
                        "dropout draws anew]", self.processes, state["processes"], self.progress.epoch,
                        self.progress.step, self.total_steps)
            self.progress.finished = self.progress.step >= self.total_steps

    def _load_rest(self, state: dict[str, Any]) -> None:
        """What goes with the weights."""
        load_optimizer_state(self.optimizer, self.parameters, self.accelerator, state["optimizer"])
        moved = state["processes"] != self.processes
        self.scheduler.last_epoch = self.progress.step if moved else state["scheduler"]["last_epoch"]
        for group, base, factor in zip(self.optimizer.param_groups, self.scheduler.base_lrs,
                                       self.scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.scheduler.last_epoch)
        if self.average:
            self.average.load_state_dict(state["average"])
        if self.quantization:
            self.quantization.load_state_dict(state["quantization"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if not moved:
            random = state["random"][self.accelerator.process_index]
            torch.set_rng_state(random["cpu"])
            if "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.accelerator.device)
        else:
            torch.manual_seed(self.args.seed + self.progress.step + SEED_DISTANCE * self.accelerator.process_index)

    def fit(self) -> dict[str, Any]:
        """Train to the end. Returns the metrics of the best model."""
        if self.progress.finished:
            logger.info("[%s is finished; nothing is left to resume]", self.args.save_path)
            return self.progress.best
        if not self.progress.step and not self.saved_at_end:
            self.save_state()  # so that --resume never finds another run's state in the place of this one's
        main = self.accelerator.is_main_process
        if main:
            self.writer = Curves(Path(self.args.log_dir) / self.info.run_id, self.progress.step + 1)
        started = time.time()
        bar = tqdm(total=self.total_steps, initial=self.progress.step, unit="step", disable=None if main else True,
                   dynamic_ncols=True)
        try:
            while not self.progress.finished:
                self.train_epoch(bar)
        finally:
            bar.close()
        self.notes["seconds"] = time.time() - started
        logger.info("[trained %d steps in %.1f s]", self.progress.step, self.notes["seconds"])
        return self.progress.best

    def train_epoch(self, bar: tqdm) -> None:
        """Train from the current position to the end of the epoch (or of the run)."""
        self.sampler.epoch = self.progress.epoch
        self.model.train()
        for group, examples in self._groups() if self.total_steps else ():
            self.train_step(group, examples)
            bar.update()
            self.progress.position += 1
            last = self.progress.position >= len(self.sampler)
            stop = self.progress.step >= self.total_steps
            if last or stop:
                break
            if self.progress.step % self.args.eval_and_save_steps == 0:
                self.evaluate_and_save(bar)
                self.model.train()
        self.progress.epoch += 1
        self.progress.position = 0
        self.progress.finished = self.progress.step >= self.total_steps
        self.evaluate_and_save(bar, end_of_epoch=True)
        if self.on_epoch:
            self.on_epoch(self.progress.epoch, self.progress.history[-1])

    def _groups(self) -> Iterator[tuple[list[Batch], int]]:
        """What is left of the epoch, by optimizer steps: this process's batches, and the examples of all processes."""
        steps = self.sampler.batches()[self.progress.position :]
        parts = functools.partial(shard, size=self.args.batch_size, processes=self.processes,
                                  process=self.accelerator.process_index)
        batches = prefetch(self.read_batch, (part for step in steps for part in parts(step)),
                           self.accelerator.device.type == "cuda")
        for step in steps:
            yield [next(batches) for _ in parts(step)], len(step)

    def read_batch(self, indices: Sequence[int]) -> Batch:
        """The training data's batch of the examples at `indices`. A subclass may add to it."""
        return self.train_data.batch(indices)

    def train_step(self, group: list[Batch], examples: int) -> None:
        """One optimizer step, down the gradient of the mean over the examples of all processes' batches.

        Args:
            group: this process's batches.
            examples: in those of all processes.
        """
        sharded = is_sharded(self.accelerator)
        for place, batch in enumerate(group, 1):
            batch = batch.to(self.accelerator.device, non_blocking=True)
            last = place == len(group)  # then processes put their gradients together
            if sharded:
                self.accelerator.sync_gradients = last  # DeepSpeed steps at once then
            with contextlib.nullcontext() if last or sharded else self.accelerator.no_sync(self.model):
                loss = self._loss(batch)
                self.accelerator.backward(loss / (examples / self.processes),  # gradients are averaged over processes
                                          **({"scale_wrt_gas": False} if sharded else {}))
            self.losses.append(loss.detach())
        self.progress.loss_count += examples
        if self.accelerator.device.type == "cpu" or self.progress.step % STEPS_UNREAD == 0:
            self.read_losses()
        if self.args.max_grad_norm and not sharded:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        self.optimizer.step()
        # In fp16 the scaler skips a step whose gradients overflow, and lowers its scale. (accelerate does not notice:
        # a fused AdamW is called all the same, and skips the step by itself.)
        if not scaler or scaler.get_scale() >= scale:
            self.scheduler.step()
            if self.average:
                self.average.update()
        self.optimizer.zero_grad()
        self.progress.step += 1

    def read_losses(self) -> None:
        """Add up the losses since the last reading, for which a GPU has to finish what it does: so not at each step."""
        if not self.losses:
            return
        loss_sum = total(torch.stack(self.losses).cpu().double().sum().view(1), self.accelerator).item()
        self.losses.clear()
        if not math.isfinite(loss_sum):
            raise Diverged(f"the loss is {loss_sum} at step {self.progress.step + 1}; lower --lr (now "
                           f"{self.args.lr:g}). The best checkpoint so far, if there is one, is untouched.")
        self.progress.loss_sum += loss_sum

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One pass: the loss of each example [B], and the logits [B, C]. A subclass may learn from something else."""
        assert batch.targets is not None  # encoded data have them
        with self.accelerator.autocast():
            logits = self.model(batch.input_ids, batch.attention_mask).float()
        logits = logits[: len(batch)]
        return self.criterion(logits, batch.targets), logits

    def _loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its examples.

        With --rdrop, of two passes with different dropout, plus the divergence between their predictions
        (R-Drop, Liang et al. 2021, arXiv 2106.14448, equation 4).
        """
        loss, logits = self.objective(batch)
        if self.args.rdrop:
            loss_again, again = self.objective(batch)
            loss = (loss + loss_again) / 2
            loss = loss + self.args.rdrop * divergence(logits, again, self.train_data.multi_label) / 4
        if self.quantization:
            loss = loss + self.quantization.penalty()
        return loss.sum()

    def evaluate_and_save(self, bar: tqdm, end_of_epoch: bool = False) -> None:
        """Measure on the valid data, keep the model if it is the best, decide on stopping, write the state."""
        self.read_losses()
        progress = self.progress
        if self.quantization and self.processes > 1:  # each process has seen ranges of its own
            ranges = self.quantization.state_dict()
            self.quantization.load_state_dict(
                {name: total(seen, self.accelerator) / self.processes for name, seen in ranges.items()})
        with self.average.applied() if self.average else contextlib.nullcontext():
            with self.quantization.evaluating() if self.quantization else contextlib.nullcontext():
                metrics = evaluate(self.plain_model, self.valid_data, self.args.eval_batch_size,
                                   self.accelerator.device, self.accelerator)
            if not math.isfinite(metrics["loss"]):
                raise Diverged(f"the valid loss is {metrics['loss']} at step {progress.step}; lower --lr.")
            point = {"step": progress.step, "epoch": progress.epoch,
                     "train_loss": progress.loss_sum / max(1, progress.loss_count), "valid_loss": metrics["loss"],
                     "valid_accuracy": metrics["accuracy"], "lr": self.optimizer.param_groups[0]["lr"]}
            if "f1" in metrics:
                point["valid_f1"] = metrics["f1"]
                self.info = replace(self.info, thresholds=tuple(metrics["thresholds"]))
            progress.loss_sum, progress.loss_count = 0.0, 0
            progress.history.append(point)
            better = progress.stopping.is_better(metrics, progress.best)
            if better:
                progress.best = point
                self.save_model(point)
        if end_of_epoch and progress.stopping.ends() and not progress.finished:
            logger.info("[no gain on valid for %d epochs: stopping]", self.args.patience)
            progress.finished = True
        self._report(point, better, bar)
        self.save_state()

    def save_model(self, metrics: dict[str, float]) -> None:
        """Write the checkpoint. To be called in all processes."""
        with whole_weights(self.plain_model, self.accelerator):
            if self.accelerator.is_main_process:
                checkpoint = Checkpoint(run=self.info, metrics=metrics, **self.checkpoint_weights())
                save_checkpoint(checkpoint, self.args.save_path, self.args.keep_checkpoints)

    def checkpoint_weights(self) -> dict[str, Any]:
        """The model under the names of an fp32 model, and what quantizes it."""
        weights = merged_weights(self.plain_model)
        if not self.quantization:
            return {"model": weights}
        return {"model": self.quantization.weights(weights), "quantization": self.quantization.metadata()}

    def _report(self, point: dict[str, float], better: bool, bar: tqdm) -> None:
        if not self.accelerator.is_main_process:
            return
        bar.set_postfix(valid=f"{point['valid_accuracy']:.4f}", refresh=False)
        for name, value in point.items():
            if name not in ("step", "epoch"):
                self.writer.add_scalar(name.replace("_", "/"), value, int(point["step"]))
        logger.info("[epoch %d step %d] train loss %.4f, valid loss %.4f, valid accuracy %.4f, lr %.2e%s",
                    point["epoch"], point["step"], point["train_loss"], point["valid_loss"],
                    point["valid_accuracy"], point["lr"],
                    (f", valid micro F1 {point['valid_f1']:.4f}" if "valid_f1" in point else "") + " *" * better)
