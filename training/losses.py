"""What training is made of: losses, class weights, learning rate, averaged weights, figures over a data set."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cli.flags import did_you_mean
from dataset import BucketSampler, EncodedData, prefetch, shard
from model import Classifier, GaussianDecoder, TransformerEmbedding, WordEmbedding
from pretrained.layout import layers_above
from sentence_classifier.errors import InputError
from sentence_classifier.labels import normalize_label
from sentence_classifier.lines import open_input
from text.labels import UNKNOWN_LABEL
from training.distributed import total

logger = logging.getLogger(__name__)


def make_criterion(name: str, class_weights: Tensor | None = None, temperature: float = 1.0,
                   multi_label: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of each example: (logits [B, C], targets) -> [B].

    Targets are class ids [B], label sets [B, C] bool if a sentence may have several labels, or a teacher's logits
    [B, C] float.

    CrossEntropyLoss and LabelSmoothingCrossEntropy (0.1) take a teacher's logits as its softmax; KLDivLoss is
    KL(teacher || student); MSELoss compares logits. The first three divide a teacher's logits and the student's by
    the temperature, and multiply the loss by its square, which keeps the gradient's size (Hinton et al. 2015, arXiv
    1503.02531, section 2).

    With several labels each is a decision of its own: the softmax becomes a sigmoid, the cross entropy the mean of
    binary ones, and class_weights weigh a label where a sentence has it.
    """
    smoothing = 0.1 if name == "LabelSmoothingCrossEntropy" else 0.0

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "MSELoss":
            return F.mse_loss(logits, targets, reduction="none").mean(-1)
        entropy = binary_loss if multi_label else softmax_loss
        if targets.is_floating_point() and temperature != 1:
            return temperature**2 * entropy(logits / temperature, targets / temperature)
        return entropy(logits, targets)

    def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
        goals = targets.sigmoid() if targets.is_floating_point() else targets.to(logits.dtype)
        goals = goals * (1 - smoothing) + smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, goals, reduction="none", pos_weight=class_weights)
        if name == "KLDivLoss":
            loss = loss - F.binary_cross_entropy(goals, goals, reduction="none")
        return loss.mean(-1)

    def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "KLDivLoss":
            return F.kl_div(logits.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(logits, targets.softmax(-1) if targets.is_floating_point() else targets,
                               weight=class_weights, label_smoothing=smoothing, reduction="none",
                               ignore_index=UNKNOWN_LABEL)

    return criterion


def divergence(one: Tensor, other: Tensor, multi_label: bool) -> Tensor:
    """KL(p || q) + KL(q || p) of the predictions p, q of two rows of logits [B, C]: [B]."""
    if multi_label:  # of each label's two outcomes, in the mean over labels, as the loss is
        return ((one.sigmoid() - other.sigmoid()) * (one - other)).mean(-1)
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return (F.kl_div(p, q, reduction="none", log_target=True)
            + F.kl_div(q, p, reduction="none", log_target=True)).sum(-1)


LARGEST_WEIGHT = 20.0  # of a label that hardly a sentence has


def balanced_label_weights(label_sets: Any) -> Tensor:
    """The weight [C] of each label where a sentence has it: how many sentences lack it for one that has it, 1 to 20.

    Args:
        label_sets: [N, C] bool.
    """
    counts = torch.as_tensor(label_sets).double().sum(0)
    return ((len(label_sets) - counts) / counts.clamp(min=1)).clamp(1.0, LARGEST_WEIGHT).float()


def balanced_class_weights(class_ids: Any, num_labels: int) -> Tensor:
    """Weights inversely proportional to the classes' frequencies, whose mean over the examples is 1."""
    counts = torch.bincount(torch.as_tensor(class_ids, dtype=torch.int64), minlength=num_labels).double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0).float()


def make_class_weights(given: str, data: EncodedData) -> Tensor | None:
    """The classes' weights [C] that --class_weights names for the training data; None: all weigh the same.

    Raises:
        InputError: a file that cannot be read, or does not give labels of the data weights of 0 or more.
    """
    if given == "none":
        return None
    if given == "balanced":
        return (balanced_label_weights(data.class_ids()) if data.multi_label
                else balanced_class_weights(data.class_ids(), len(data.labels)))
    with open_input(given) as file:
        try:
            found = json.load(file)
        except ValueError as error:
            raise InputError(f"{given}: not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f'{given}: a JSON object is expected, {{"label": 2.5}}.')
    weights, ids = torch.ones(len(data.labels)), data.labels.index()
    for name, weight in found.items():
        if normalize_label(name) not in ids:
            raise InputError(f"{given}: no label {name!r} in {data.path}{did_you_mean(name, ids)}.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise InputError(f"{given}: the weight of {name!r} is {weight!r}, and a number from 0 to 1e6 is expected.")
        weights[ids[normalize_label(name)]] = weight
    return weights


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """The factor of the learning rate at `step`: linear from 0 to 1, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class WeightAverage:
    """An exponential moving average of a model's parameters, which is evaluated and saved in their place.

    The decay warms up as (1 + t) / (10 + t), so that the first steps are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.updates = 0
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.parameters, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average within the block, and its own parameters again after it."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(zip(self.names, self.average, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state["average"][name])


@torch.no_grad()
def evaluate(model: nn.Module, data: EncodedData, batch_size: int, device: torch.device,
             accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Mean cross entropy and accuracy over a data set, in fp32, model in evaluation mode and left so.

    A sentence whose label train.txt lacks counts as an error, and the loss leaves it out. An accelerator's processes
    share the work: each example counts once, and all get the same figures.

    With several labels a sentence, `thresholds` [C] are those that give each label its best F1 here, `f1` is the micro
    F1 by them, and the accuracy that of whole label sets.
    """
    model.eval()
    criterion = make_criterion("CrossEntropyLoss", multi_label=data.multi_label)
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    losses, correct = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.bool, device=device)]
    answers: list[tuple[Tensor, Tensor]] = []
    parts = [shard(batch, batch_size, processes, process)[0] for batch in
             BucketSampler(data.lengths, batch_size * processes, shuffle=False).batches()]
    for batch in prefetch(data.batch, parts):
        batch = batch.to(device)
        assert batch.targets is not None  # encoded data have them
        logits = model(batch.input_ids, batch.attention_mask)[: len(batch)]
        losses.append(criterion(logits, batch.targets))
        if data.multi_label:
            answers.append((logits.sigmoid(), batch.targets > 0))
        else:
            classes = batch.targets.argmax(-1) if data.has_logits else batch.targets
            correct.append(logits.argmax(-1) == classes)
    found: dict[str, Any] = {}
    if data.multi_label:
        probabilities, goals = (torch.cat(part).cpu() for part in zip(*answers, strict=True))
        found["thresholds"] = choose_thresholds(probabilities, goals, accelerator)
        decided = probabilities >= torch.tensor(found["thresholds"])
        unknown = torch.zeros(len(goals), dtype=torch.bool)
        if data.unknown is not None:
            unknown = torch.from_numpy(data.unknown[np.concatenate([*parts, []]).astype(np.int64)] > 0)
        correct = [(decided == goals).all(1) & ~unknown]
        sums = torch.stack([(decided & goals).sum(), decided.sum(), goals.sum()]).double()
        hits, given, wanted = total(sums, accelerator).tolist()
        found["f1"] = 2 * hits / max(1.0, given + wanted)
    # Read at the end: a GPU does not wait for the processor after each batch.
    sums = torch.stack([torch.cat(losses).cpu().double().sum(), torch.cat(correct).cpu().double().sum()])
    loss, right = total(sums, accelerator).tolist()
    left_out = 0 if data.multi_label else data.unknown_labels
    return {"loss": loss / max(1, len(data) - left_out), "accuracy": right / len(data), **found}


BINS = 1000  # of probabilities, among whose borders thresholds are chosen
FEW = 5  # sentences with a label, below which it gets the threshold of all labels together


def choose_thresholds(probabilities: Tensor, goals: Tensor, accelerator: Accelerator | None = None) -> list[float]:
    """The threshold of each label that gives it the best F1; of equal ones, the middle.

    A label that hardly a sentence has would learn its threshold from chance: it gets the best for the micro F1 of all.

    Args:
        probabilities: [N, C] of this process's sentences.
        goals: [N, C] bool.
    """
    labels = goals.shape[1]
    places = (probabilities * BINS).long().clamp(0, BINS - 1) + BINS * torch.arange(labels)
    counts = torch.stack([torch.bincount(places[chosen], minlength=labels * BINS) for chosen in (goals, ~goals)])
    counts = total(counts.double(), accelerator).view(2, labels, BINS)
    hits, false = counts.flip(-1).cumsum(-1).flip(-1)  # [C, BINS]: with the threshold at the bin's lower border
    wanted = hits[:, :1]

    def best(hits: Tensor, false: Tensor, wanted: Tensor) -> Tensor:
        f1 = 2 * hits / (hits + false + wanted).clamp(min=1)
        equal, bins = f1 >= f1.amax(-1, keepdim=True) - 1e-12, torch.arange(BINS)
        middle = (equal * bins).sum(-1, keepdim=True) / equal.sum(-1, keepdim=True)
        return torch.where(equal, (bins - middle).abs(), BINS).argmin(-1) / BINS

    common = best(hits.sum(0), false.sum(0), wanted.sum(0))
    chosen = torch.where(wanted.squeeze(1) < FEW, common, best(hits, false, wanted))
    return [round(threshold, 6) for threshold in chosen.clamp(0.001, 0.999).tolist()]


@torch.no_grad()
def fit_decoder(model: Classifier, data: EncodedData, batch_size: int, accelerator: Accelerator) -> None:
    """Set a decoder in closed form, from which training goes on, if it is one that can be set so."""
    if not isinstance(model.decoder, GaussianDecoder):
        return
    device = accelerator.device
    model.to(device).eval()

    def encodings() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in prefetch(data.batch, BucketSampler(data.lengths, batch_size, shuffle=False)):
            batch = batch.to(device)
            assert batch.targets is not None  # encoded data have them
            if data.multi_label:
                own = batch.targets.sigmoid() if data.has_logits else batch.targets.float()
                probabilities = torch.cat((own, 1 - own), 1)
            elif data.has_logits:
                probabilities = batch.targets.softmax(-1)
            else:
                probabilities = F.one_hot(batch.targets, len(data.labels))
            yield model.encode(batch.input_ids, batch.attention_mask), probabilities

    model.decoder.fit(encodings())
    model.cpu()


def parameter_groups(model: Classifier, weight_decay: float, lr: float,
                     embedding_lr: float | None = None, layer_lr_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on biases, norms, word vectors and the Gaussian decoder's statistics.

    Args:
        embedding_lr: a rate of its own for the embedding: word vectors, or the transformer.
        layer_lr_decay: a transformer's rate is multiplied by it once for each layer above: its lowest layers, which
            hold the most general knowledge, change least (ULMFiT, Howard and Ruder 2018, arXiv 1801.06146, section
            3.2; with a factor a layer as in ELECTRA, arXiv 2003.10555, appendix B).
    """
    kept = {id(p) for m in model.modules() if isinstance(m, WordEmbedding | nn.Embedding | GaussianDecoder)
            for p in m.parameters(recurse=False)}
    top = lr if embedding_lr is None else embedding_lr
    inside = {id(p): top for p in model.embedding.parameters()}
    if layer_lr_decay != 1 and isinstance(model.embedding, TransformerEmbedding):
        above = layers_above(model.embedding.transformer)
        if not above:
            logger.warning("[--layer_lr_decay has no effect, since the layers of %s models share their weights]",
                           model.embedding.transformer.config.model_type)
        inside = {parameter: top * layer_lr_decay ** above.get(parameter, 0) for parameter in inside}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and id(parameter) not in kept
            key = (id(parameter) not in inside, inside.get(id(parameter), lr), decayed)
            groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "lr": key[1], "weight_decay": weight_decay if key[2] else 0.0}
            for key in sorted(groups, reverse=True)]
