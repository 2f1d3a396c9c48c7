"""A student learns from a teacher: from its logits, its hidden states and its attentions.

The loss of a sentence, with the student's logits s, the teacher's t, labels y and the flags' ratios, is

    h L(s, y) + (1 - h) T^2 KL(softmax(t / T) || softmax(s / T)) + r_state L_state + r_att L_att

h = --hard_loss_ratio, T = --kd_temperature, L = --criterion. T^2 keeps the size of the gradients when T changes (Hinton
et al. 2015, arXiv 1503.02531); hidden states and attentions after TinyBERT (Jiao et al. 2020, arXiv 1909.10351) and
FastFormers (Kim and Hassan 2020, arXiv 2010.13382). A teacher's logits are computed once, in fp32, and from raw text
with its own tokenizer, so that any teacher goes with any student. Hidden states and attentions belong to tokens:
teacher and student then need the same tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Batch, EncodedData, pad
from model import Classifier, TransformerEmbedding, build_model, load_classifier
from pretrained.surgery import remove_layers
from sentence_classifier.batches import by_length
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from sentence_classifier.tokenizers import SUBWORDS, Tokenizer, make_tokenizer
from text.arrays import ArrayWriter, open_arrays
from text.labels import LabelParser, find_logits_info
from text.lines import TsvReader
from training.losses import evaluate, make_criterion
from training.run import Run
from training.trainer import Trainer
from util import Checkpoint, EncodingInfo, sha256

logger = logging.getLogger(__name__)


def matched_layers(student: int, teacher: int) -> list[int]:
    """The teacher's layer that each of the student's layers imitates, counted from 1 and evenly spread.

    Layer m of M imitates layer m N / M, rounded, so that the last layers match (arXiv 1909.10351, section 3.1).
    """
    return [(2 * layer * teacher + student) // (2 * student) for layer in range(1, student + 1)]


def state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, cosine: bool) -> Tensor:
    """The distance of hidden states, the mean over pairs of layers and real tokens: [B].

    Args:
        student, teacher: [B, T, D] of each pair of layers.
        mask: [B, T], True at real tokens.
        cosine: measure 1 - cos of two vectors instead of their mean squared difference.
    """
    lengths = mask.sum(1)
    total = torch.zeros(len(mask), device=mask.device)
    for own, given in zip(student, teacher, strict=True):
        own, given = own.float(), given.float()
        apart = 1 - F.cosine_similarity(own, given, dim=-1) if cosine else (own - given).square().mean(-1)
        total = total + apart.masked_fill(~mask, 0.0).sum(1) / lengths
    return total / len(student)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The mean squared difference of attentions over pairs of layers, heads and pairs of real tokens: [B].

    Where the numbers of heads differ, the means over heads are compared. (A divergence would be infinite where the
    student's dropout sets an attention to zero.)

    Args:
        student, teacher: [B, heads, T, T] of each pair of layers.
        mask: [B, T], True at real tokens.
    """
    pads = ~(mask.unsqueeze(1) & mask.unsqueeze(2)).unsqueeze(1)  # [B, 1, T, T]
    total = torch.zeros(len(mask), device=mask.device)
    for own, given in zip(student, teacher, strict=True):
        if own.shape[1] != given.shape[1]:
            own, given = own.mean(1, keepdim=True), given.mean(1, keepdim=True)
        apart = (own.float() - given.float()).masked_fill(pads, 0.0).square()
        total = total + apart.sum((1, 2, 3)) / (own.shape[1] * mask.sum(1).square())
    return total / len(student)


class Teacher(nn.Module):
    """A trained classifier that answers in the order of the student's labels.

    Args:
        path: the checkpoint's file, for messages.
        folders: where to look for frozen word vectors.
        labels, multi_label: the student's.

    Raises:
        InputError: it was trained on other labels.
    """

    def __init__(self, checkpoint: Checkpoint, path: str, folders: list[str], labels: Labels,
                 multi_label: bool = False) -> None:
        super().__init__()
        own = checkpoint.run.labels
        if checkpoint.run.encoding.multi_label != multi_label:
            has, needs = ("one label", "several") if multi_label else ("several labels", "one")
            raise InputError(f"{path}: the teacher gives a sentence {has}, and the student's data {needs}.")
        if set(own.names) != set(labels.names):
            raise InputError(f"{path}: the teacher's labels ({', '.join(own.names)}) are not those of the student's "
                             f"data ({', '.join(labels.names)}).")
        self.path = path
        self.run = checkpoint.run
        self.model: Classifier = load_classifier(checkpoint, folders)
        self.order: Tensor
        self.register_buffer("order", torch.tensor([own.index()[name] for name in labels.names]), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] -> logits [B, C], in the order of the student's labels."""
        return self.model(input_ids, attention_mask)[:, self.order]

    def reads_like(self, encoding: EncodingInfo) -> bool:
        """Whether this encoding has the token ids that the teacher's own tokenizer makes of the same text."""
        same = ("kind", "vocab_sha256", "n_ctx", "tokenizer", "lowercase", "truncation_side")
        return all(getattr(self.run.encoding, fact) == getattr(encoding, fact) for fact in same)

    def tokenizer(self, augmented: bool) -> Tokenizer:
        """The teacher's own tokenizer; `augmented`: a [MASK] in the text is the mask token."""
        return make_tokenizer(self.run.vocabulary, replace(self.run.encoding, augmented=augmented))


def read_sentences(data: EncodedData) -> Iterator[str]:
    """The raw sentences of encoded data, in order.

    Raises:
        InputError: the text is no longer there.
    """
    if not data.source.is_file():
        raise InputError(f"{data.source}: no such file; a teacher reads the text that {data.path} was made from.")
    skipped = data.encoding.skip_bad_lines  # lines with an unusable label are among those; else there were none
    parser = LabelParser(data.labels, separator=data.encoding.label_separator) if skipped else str
    for example in TsvReader(data.source, skipped, parse_label=parser, empty_labels=data.multi_label):
        yield example.sentence


def tokenize(sentences: Iterable[str], tokenizer: Tokenizer, size: int) -> Iterator[list[np.ndarray]]:
    """The token ids of sentences, in chunks of `size` sentences."""
    sentences = iter(sentences)
    while chunk := list(itertools.islice(sentences, size)):
        yield [np.asarray(ids, dtype=np.int32) for ids, _ in tokenizer.tokenize_batch(chunk)]


@torch.no_grad()  # not inference_mode: weights that moved to a GPU within it could not be trained any more
def answer(teacher: Teacher, data: EncodedData, augmented: bool, batch_size: int, device: torch.device) -> np.ndarray:
    """The teacher's logits for each sentence of encoded data, from raw text, in fp32: [N, C] float32.

    Where evaluate.py --augmented labelled the text with this teacher, they are the labels. Otherwise they are stored
    beside the data as SOURCE.teacher, which is read again for the same teacher and the same text.

    Raises:
        InputError: a logit is not finite, or the raw text is missing.
    """
    if labelled_by(data) == teacher.run.run_id:
        logger.info("[the teacher's answers to %s] are its labels", data.source)
        return np.asarray(data.targets, dtype=np.float32)
    path = data.source.with_name(f"{data.source.name}.teacher")
    made_from = {"format": "teacher-logits-1", "teacher": sha256(teacher.path), "source": data.encoding.source_sha256,
                 "skip_bad_lines": json.dumps(data.encoding.skip_bad_lines), "labels": json.dumps(data.labels.names)}
    with contextlib.suppress(InputError):  # none yet, or damaged
        arrays, metadata = open_arrays(path)
        if metadata == made_from:
            logger.info("[the teacher's answers to %s] are in %s", data.source, path)
            return arrays["logits"]
    teacher.eval().to(device)
    logits = np.empty((len(data), len(data.labels)), dtype=np.float32)
    done = 0
    with tqdm(total=len(data), unit="sentence", desc="teacher", disable=None) as bar:
        for rows in tokenize(read_sentences(data), teacher.tokenizer(augmented), 64 * batch_size):
            for places in by_length([len(row) for row in rows], batch_size):
                batch = pad([rows[place] for place in places]).to(device)
                logits[done + places] = teacher(batch.input_ids, batch.attention_mask).cpu().numpy()
                bar.update(len(places))
            done += len(rows)
    if not np.isfinite(logits).all():
        raise InputError(f"{teacher.path}: the teacher's logits for {data.source} are not all finite; train it anew.")
    with ArrayWriter(path, {"logits": ("f4", (len(data.labels),))}) as writer:
        writer.append("logits", logits)
        writer.metadata.update(made_from)
    return logits


def labelled_by(data: EncodedData) -> str | None:
    """The run of the one teacher whose logits are the data's labels; None: other labels, or it is not known."""
    if not data.has_logits or not data.source.exists():
        return None
    match find_logits_info(data.source):
        case {"teacher": {"run_id": str(run_id)}}:
            return run_id
    return None


def student_from_teacher(checkpoint: Checkpoint, args: argparse.Namespace, config: dict[str, Any],
                         train: EncodedData) -> Classifier:
    """A student whose transformer begins as --student_init_layers of the teacher's, with its embeddings.

    Raises:
        InputError: there are no such layers, or teacher and student do not read the same tokens.
    """
    flag = f"--student_init_layers={','.join(map(str, args.student_init_layers))}"
    encoding = checkpoint.run.encoding
    if encoding.kind != SUBWORDS or encoding.vocab_sha256 != train.encoding.vocab_sha256:
        raise InputError(f"{flag}: {args.teacher_model_path} and {train.path} have different vocabularies, so that the "
                         "student cannot use the teacher's layers; leave the flag out.")
    transformer: Any = load_classifier(checkpoint, []).embedding.transformer
    count = transformer.config.num_hidden_layers
    chosen = sorted(set(args.student_init_layers))
    if chosen != args.student_init_layers or chosen[-1] >= count:
        raise InputError(f"{flag}: the teacher's layers are 0 to {count - 1}; name some of them, in their order.")
    if others := [place for place in range(count) if place not in chosen]:
        remove_layers(transformer, others)
    logger.info("[student] begins with layers %s of %s", ", ".join(map(str, chosen)), args.teacher_model_path)
    embedding = TransformerEmbedding.for_training(train, **vars(args), transformer=transformer)
    return build_model(config, len(train.labels), embedding)


def keep_inside(embedding: Any, attentions: bool, path: str) -> None:
    """Let a model keep its hidden states and, where `attentions` is set, its attentions.

    Raises:
        InputError: it has none, or those of more than one stack of layers.
    """
    if not isinstance(embedding, TransformerEmbedding):
        raise InputError(f"{path}: --state_loss_ratio and --att_loss_ratio are for transformers, and this is none.")
    embedding.keep_output(attentions)
    kind = embedding.transformer.config.model_type
    with torch.no_grad():
        embedding.eval()(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
    if not getattr(embedding.output, "hidden_states", None):
        raise InputError(f"{path}: {kind} models do not tell the hidden states of one stack of layers; distil their "
                         "logits alone.")
    if attentions:
        given = getattr(embedding.output, "attentions", None)
        if not given or not all(torch.allclose(layer.sum(-1), torch.ones(()), atol=1e-3) for layer in given):
            raise InputError(f"{path}: {kind} models do not tell their attentions; leave --att_loss_ratio out.")


class DistillationTrainer(Trainer):
    """Trains a student by the loss at the head of this file; `logits` are the teacher's for the training data [N, C].

    Raises:
        InputError: hidden states or attentions that cannot be compared.
    """

    decisive = (*Trainer.decisive, "teacher_sha256", "hard_loss_ratio", "state_loss_ratio",
                "state_distill_cs", "att_loss_ratio", "student_init_layers", "mpl_data_path")

    def __init__(self, run: Run, teacher: Teacher, logits: np.ndarray) -> None:
        self.teacher = teacher.to(run.accelerator.device).eval()
        self.logits = logits
        self.logit_loss = make_criterion("KLDivLoss", None, run.args.kd_temperature, run.train.multi_label)
        self.student: Any = run.model.embedding
        self.guide: Any = teacher.model.embedding
        self.inside = bool(run.args.state_loss_ratio or run.args.att_loss_ratio)
        self.projection: nn.Module | None = None
        self.pairs: list[tuple[int, int]] = []  # student's layer, teacher's layer
        if self.inside:
            self._match(run.model, teacher, run.args, run.train)
        self.parts: dict[str, Any] = {}  # of the loss, summed over the examples since the last log line
        self.examples = 0
        super().__init__(run)

    def _match(self, model: Classifier, teacher: Teacher, args: argparse.Namespace, train: EncodedData) -> None:
        if not teacher.reads_like(train.encoding):
            raise InputError(f"{teacher.path}: the teacher reads other tokens than {train.path} holds, so that hidden "
                             "states and attentions cannot be compared; leave --state_loss_ratio and --att_loss_ratio "
                             "out, or encode the data as for the teacher.")
        for embedding, path in ((self.guide, teacher.path), (self.student, args.config)):
            keep_inside(embedding, bool(args.att_loss_ratio), path)
        layers, guides = (embedding.transformer.config.num_hidden_layers for embedding in (self.student, self.guide))
        widths = [embedding.output_size for embedding in (self.student, self.guide)]
        if layers > guides:
            raise InputError(f"{teacher.path}: the student has {layers} layers and the teacher {guides}, so that "
                             "layers cannot be matched; leave --state_loss_ratio and --att_loss_ratio out.")
        if args.state_loss_ratio and widths[0] > widths[1]:
            raise InputError(f"{teacher.path}: the student's hidden states are wider ({widths[0]}) than the teacher's "
                             f"({widths[1]}), which cannot guide them all; leave --state_loss_ratio out.")
        self.pairs = list(enumerate(matched_layers(layers, guides), 1))
        logger.info("[layers] student, teacher: %s", ", ".join(f"{m} - {n}" for m, n in self.pairs))
        if args.state_loss_ratio and widths[0] != widths[1]:
            # A part of the model, so that it is optimized, clipped and resumed with it; checkpoints leave it out.
            self.projection = nn.Linear(*widths)
            model.add_module("projection", self.projection)

    def read_batch(self, indices: Sequence[int]) -> Batch:
        answers = torch.from_numpy(self.logits[np.asarray(indices, dtype=np.int64)])
        return replace(super().read_batch(indices), teacher=answers)

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        args = self.args
        hard, logits = super().objective(batch)
        parts = {"hard": hard, "logits": self.logit_loss(logits, batch.teacher)}
        weights = {"hard": args.hard_loss_ratio, "logits": 1 - args.hard_loss_ratio,
                   "states": args.state_loss_ratio, "attentions": args.att_loss_ratio}
        if self.inside:
            with torch.no_grad(), self.accelerator.autocast():
                self.teacher(batch.input_ids, batch.attention_mask)
            own, given = self.student.output, self.guide.output
            self.student.output = self.guide.output = None
            mask = batch.attention_mask
            if args.state_loss_ratio:
                with self.accelerator.autocast():
                    states = [own.hidden_states[m] for m, _ in [(0, 0), *self.pairs]]
                    states = [self.projection(state) for state in states] if self.projection else states
                parts["states"] = state_loss(states, [given.hidden_states[n] for _, n in [(0, 0), *self.pairs]], mask,
                                             args.state_distill_cs)[: len(hard)]
            if args.att_loss_ratio:
                parts["attentions"] = attention_loss([own.attentions[m - 1] for m, _ in self.pairs],
                                                     [given.attentions[n - 1] for _, n in self.pairs],
                                                     mask)[: len(hard)]
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value.detach().sum()
        self.examples += len(hard)
        return sum((weights[name] * value for name, value in parts.items()), torch.zeros_like(hard)), logits

    def train_step(self, group: list[Batch], examples: int) -> None:
        super().train_step(group, examples)
        if self.progress.step % self.args.logging_steps == 0:
            means = {name: total.item() / max(1, self.examples) for name, total in self.parts.items()}
            self.parts, self.examples = {}, 0
            if self.args.log_evaluate_during_training:
                metrics = evaluate(self.plain_model, self.valid_data, self.args.eval_batch_size,
                                   self.accelerator.device)
                means |= {f"valid {name}": value for name, value in metrics.items()}
                self.model.train()
            logger.info("[step %d] %s", self.progress.step,
                        ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
            for name, value in means.items():
                self.writer.add_scalar(f"distillation/{name.replace(' ', '_')}", value, self.progress.step)

    def checkpoint_weights(self) -> dict[str, Any]:
        weights = super().checkpoint_weights()
        return {**weights, "model": {name: value for name, value in weights["model"].items()
                                     if not name.startswith("projection.")}}
