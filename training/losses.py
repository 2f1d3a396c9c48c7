"""What training is made of: losses, class weights, learning rate, averaged weights, figures over a data set."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dataset import BucketSampler, EncodedData, prefetch, shard
from model import Classifier, GaussianDecoder, TransformerEmbedding, WordEmbedding
from pretrained.layout import layers_above
from text.labels import UNKNOWN_LABEL
from training.distributed import total

logger = logging.getLogger(__name__)


def make_criterion(name: str, class_weights: Tensor | None = None,
                   temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of each example: (logits [B, C], targets: class ids [B] or a teacher's logits [B, C]) -> [B].

    CrossEntropyLoss and LabelSmoothingCrossEntropy (0.1) take a teacher's logits as its softmax; KLDivLoss is
    KL(teacher || student); MSELoss compares logits. The first three divide a teacher's logits and the student's by
    the temperature, and multiply the loss by its square, which keeps the gradient's size (Hinton et al. 2015, arXiv
    1503.02531, section 2).
    """
    smoothing = 0.1 if name == "LabelSmoothingCrossEntropy" else 0.0

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "MSELoss":
            return F.mse_loss(logits, targets, reduction="none").mean(-1)
        if targets.is_floating_point() and temperature != 1:
            return temperature**2 * softmax_loss(logits / temperature, targets / temperature)
        return softmax_loss(logits, targets)

    def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "KLDivLoss":
            return F.kl_div(logits.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(logits, targets.softmax(-1) if targets.is_floating_point() else targets,
                               weight=class_weights, label_smoothing=smoothing, reduction="none",
                               ignore_index=UNKNOWN_LABEL)

    return criterion


def balanced_class_weights(class_ids: Any, num_labels: int) -> Tensor:
    """Weights inversely proportional to the classes' frequencies, whose mean over the examples is 1."""
    counts = torch.bincount(torch.as_tensor(class_ids, dtype=torch.int64), minlength=num_labels).double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0).float()


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
             accelerator: Accelerator | None = None) -> dict[str, float]:
    """Mean cross entropy and accuracy over a data set, in fp32, model in evaluation mode and left so.

    A sentence whose label train.txt lacks counts as an error, and the loss leaves it out. An accelerator's processes
    share the work: each example counts once, and all get the same figures.
    """
    model.eval()
    criterion = make_criterion("CrossEntropyLoss")
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    losses, correct = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.bool, device=device)]
    batches = BucketSampler(data.lengths, batch_size * processes, shuffle=False).batches()
    for batch in prefetch(data.batch, (shard(batch, batch_size, processes, process)[0] for batch in batches)):
        batch = batch.to(device)
        assert batch.targets is not None  # encoded data have them
        logits = model(batch.input_ids, batch.attention_mask)[: len(batch)]
        losses.append(criterion(logits, batch.targets))
        classes = batch.targets.argmax(-1) if data.has_logits else batch.targets
        correct.append(logits.argmax(-1) == classes)
    # Read at the end: a GPU does not wait for the processor after each batch.
    sums = torch.stack([torch.cat(losses).cpu().double().sum(), torch.cat(correct).cpu().double().sum()])
    loss, right = total(sums, accelerator).tolist()
    return {"loss": loss / max(1, len(data) - data.unknown_labels), "accuracy": right / len(data)}


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
            probabilities = batch.targets.softmax(-1) if data.has_logits else F.one_hot(batch.targets, len(data.labels))
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
