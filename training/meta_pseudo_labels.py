"""Meta pseudo labels: a teacher that learns from how its student fares (Pham et al. 2020, arXiv 2003.10580).

A step, with unlabelled text u, labelled text (x, y), student S and teacher T:

    1. the teacher labels u;
    2. the student takes an optimizer step on these pseudo labels, which turns its loss L on (x, y) into L';
    3. the teacher takes a step down the gradient of L' with respect to itself, through the student's step, plus that
       of its own supervised loss on (x, y).

The paper's optional unsupervised augmentation loss is left out. The gradient of L' is computed in one of two ways:

    hard    Pseudo labels c are drawn from the teacher's probabilities p. The expectation of L' is
            E[L'] = sum over c of p(c) L'(c). Its gradient is estimated by (L' - L) grad log p(c) = h grad CE(c, T(u)),
            where h = L - L' is the fall of the student's loss. L does not depend on c: it only lowers the variance. The
            estimate is unbiased for every optimizer of the student. (The paper writes h as the product of the student's
            gradients before and after the step, times the learning rate: the first-order term of L - L' for plain SGD.)
            The cross entropy is summed over u, since the labels of u are drawn together.
    soft    The student learns p itself. For a step s' = s - D grad_s CE(p, S(u)), D diagonal and constant, the chain
            rule gives dL'/dp_c = (D grad L') . grad_s log S_c(u) / |u|. That is the slope of log S_c in the direction
            D grad L'; a central difference of log S around s, the place before the step, measures it. For plain SGD, D
            is the learning rate, and the result is exact. For AdamW, D multiplies the newest gradient in this step: the
            second moment counts as constant, and neither clipping nor momentum in later steps is taken into account.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Batch, BucketSampler, pad, prefetch
from sentence_classifier.errors import InputError
from sentence_classifier.lines import open_input
from sentence_classifier.tokenizers import Tokenizer, make_tokenizer
from text.lines import TsvReader
from training.distillation import Teacher, read_sentences, tokenize
from training.losses import cosine_with_warmup, parameter_groups
from training.run import Run
from training.trainer import Diverged, Trainer

logger = logging.getLogger(__name__)


def meta_loss(answers: Tensor, student_logits: Callable[[], Tensor], labelled_loss: Callable[[], Tensor],
              update: Callable[[Tensor], None], parameters: Sequence[Tensor], optimizer: Any, hard: bool
              ) -> tuple[Tensor, float]:
    """Let the student take its step, and return the loss of the teacher.

    Args:
        answers: the teacher's logits [B, C], with their graph.
        student_logits: computes the student's logits for the same sentences [B, C], with their graph.
        labelled_loss: the student's mean loss on labelled data, without dropout.
        update: one optimizer step down the gradient of a loss.
        parameters, optimizer: the student's.
        hard: see the head of this file.

    Returns:
        The loss whose gradient is the teacher's meta gradient, and h, the fall of the student's loss on labelled data.
    """
    with torch.no_grad():
        before = labelled_loss()
        soft = answers.softmax(-1)
        labels = torch.multinomial(soft, 1).squeeze(1) if hard else soft
    old = [] if hard else [parameter.detach().clone() for parameter in parameters]
    update(F.cross_entropy(student_logits(), labels))
    if hard:
        with torch.no_grad():
            fall = (before - labelled_loss()).item()
        return fall * F.cross_entropy(answers, labels, reduction="sum"), fall
    after = labelled_loss()
    gradients = torch.autograd.grad(after, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    direction = [torch.zeros_like(p) if g is None else step_factor(optimizer, p) * g for p, g in pairs]
    slopes = log_probability_slopes(student_logits, parameters, old, direction)
    return (answers.softmax(-1) * slopes).sum(-1).mean(), (before - after.detach()).item()


@torch.no_grad()
def log_probability_slopes(student_logits: Callable[[], Tensor], parameters: Sequence[Tensor], place: Sequence[Tensor],
                           direction: Sequence[Tensor]) -> Tensor:
    """The slopes of the log probabilities in a direction, where the parameters are `place`: [B, C]."""
    norm = torch.stack([part.norm() for part in direction]).norm().clamp(min=1e-30)
    size = 0.01 / norm  # as in DARTS (arXiv 1806.09055, section 2.3)
    now = [parameter.detach().clone() for parameter in parameters]
    nearby = []
    for sign in (1, -1):
        for parameter, origin, part in zip(parameters, place, direction, strict=True):
            parameter.copy_(origin + sign * size * part)
        nearby.append(student_logits().log_softmax(-1))
    for parameter, value in zip(parameters, now, strict=True):
        parameter.copy_(value)
    return (nearby[0] - nearby[1]) / (2 * size)


def step_factor(optimizer: Any, parameter: Tensor) -> Any:
    """D: how far the last optimizer step moved a parameter, for each unit of its newest gradient.

    For SGD it is the learning rate; for Adam also what the first and second moments make of the newest gradient.
    """
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return group["lr"]
    (beta1, beta2), step = group["betas"], float(state["step"])
    second = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
    return group["lr"] * (1 - beta1) / (1 - beta1**step) / second


def read_twice(own: Batch, teacher_rows: list[np.ndarray] | None, indices: Sequence[int]) -> Batch:
    """A batch of the student's with the teacher's token ids, those at `indices`; None: they are the same."""
    return replace(own, teacher=pad([teacher_rows[i] for i in indices]) if teacher_rows else own)


def read_rows(sentences: Iterable[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The token ids of each sentence."""
    chunks = tokenize(tqdm(sentences, unit="sentence", disable=None), tokenizer, 1024)
    return list(itertools.chain.from_iterable(chunks))


def read_text(path: str) -> Iterator[str]:
    """The sentences of a file; its first line decides whether it has labels."""
    with open_input(path) as file:
        labelled = b"\t" in file.readline()
    for example in TsvReader(path, labelled=labelled):
        yield example.sentence


class MetaTrainer(Trainer):
    """Trains a student on a teacher's pseudo labels, and the teacher by the student's loss.

    An epoch is one pass over the labelled data; each step takes as many sentences of the unlabelled text. The run's
    flags are those of this part of the training.
    """

    def __init__(self, run: Run, teacher: Teacher) -> None:
        args, train = run.args, run.train
        if train.multi_label:
            raise InputError("--mpl_data_path: meta pseudo labels are one a sentence, and these data have several; "
                             "leave it out.")
        same = teacher.reads_like(train.encoding)
        logger.info("[meta pseudo labels] reading %s", args.mpl_data_path)
        self.teacher_rows = None if same else read_rows(read_sentences(train), teacher.tokenizer(args.augmented))
        tokenizer = make_tokenizer(run.info.vocabulary, replace(train.encoding, augmented=True))
        rows = read_rows(read_text(args.mpl_data_path), tokenizer)
        teacher_rows = None if same else read_rows(read_text(args.mpl_data_path), teacher.tokenizer(augmented=True))
        super().__init__(run)
        self.teacher = teacher.to(self.accelerator.device)
        groups = parameter_groups(teacher.model, args.mpl_weight_decay, args.mpl_learning_rate)
        self.teacher_optimizer = torch.optim.AdamW(groups, lr=args.mpl_learning_rate, eps=args.adam_epsilon)
        self.teacher_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.teacher_optimizer, lambda step: cosine_with_warmup(step, args.mpl_warmup_steps, self.total_steps))
        self.learned = [p for p in self.plain_model.parameters() if p.requires_grad]
        self.unlabelled = self._endless(rows, teacher_rows)
        self.fall = 0.0  # of the student's loss, summed over the steps since the last log line

    def read_batch(self, indices: Sequence[int]) -> Batch:
        return read_twice(super().read_batch(indices), self.teacher_rows, indices)

    def _endless(self, rows: list[np.ndarray], teacher_rows: list[np.ndarray] | None) -> Iterator[Batch]:
        """Batches of the unlabelled text, again and again."""
        sampler = BucketSampler(np.array([len(row) for row in rows]), self.args.batch_size, seed=self.args.seed)

        def read(indices: Sequence[int]) -> Batch:
            return read_twice(pad([rows[i] for i in indices]), teacher_rows, indices)

        while True:
            yield from prefetch(read, sampler)
            sampler.epoch += 1

    def train_step(self, group: list[Batch], examples: int) -> None:
        device = self.accelerator.device
        labelled = [batch.to(device) for batch in group]
        unlabelled = [next(self.unlabelled).to(device) for _ in group]

        def answers(batches: list[Batch]) -> list[Tensor]:
            with self.accelerator.autocast():
                return [self.teacher(b.teacher.input_ids, b.teacher.attention_mask).float() for b in batches]

        def student_logits() -> Tensor:
            if not torch.is_grad_enabled():  # small differences need full precision and no dropout
                self.plain_model.eval()
                return torch.cat([self.plain_model(b.input_ids, b.attention_mask) for b in unlabelled])
            self.plain_model.train()
            with self.accelerator.autocast():
                return torch.cat([self.model(b.input_ids, b.attention_mask).float() for b in unlabelled])

        def labelled_loss() -> Tensor:
            self.plain_model.eval()  # and in full precision
            losses = [self.criterion(self.plain_model(b.input_ids, b.attention_mask), b.targets).sum()
                      for b in labelled if b.targets is not None]
            return torch.stack(losses).sum() / examples

        self.teacher.train()
        meta, fall = meta_loss(torch.cat(answers(unlabelled)), student_logits, labelled_loss, self._update,
                               self.learned, self.optimizer, self.args.mpl_labels == "hard")
        self.scheduler.step()
        supervised = torch.stack([self.criterion(logits, b.targets).sum() for logits, b in
                                  zip(answers(labelled), labelled, strict=True) if b.targets is not None])
        (meta + supervised.sum() / examples).backward()
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.teacher.parameters(), self.args.max_grad_norm)
        self.teacher_optimizer.step()
        self.teacher_scheduler.step()
        self.teacher_optimizer.zero_grad()
        self.model.train()
        self.progress.step += 1
        self.progress.loss_count += 1
        self.fall += fall
        if self.progress.step % self.args.logging_steps == 0:
            logger.info("[meta pseudo labels, step %d] teacher's loss %.4f, student's loss falls by %.2e a step",
                        self.progress.step, supervised.sum().item() / examples, self.fall / self.args.logging_steps)
            self.writer.add_scalar("mpl/fall", self.fall / self.args.logging_steps, self.progress.step)
            self.fall = 0.0

    def _update(self, loss: Tensor) -> None:
        if not math.isfinite(value := loss.item()):
            raise Diverged(f"the loss on pseudo labels is {value} at step {self.progress.step + 1}; lower --lr "
                           f"(now {self.args.lr:g}).")
        self.progress.loss_sum += value
        self.accelerator.backward(loss)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()

    def save_state(self) -> None:
        """Nothing: --resume does not go on with this part of a run."""
