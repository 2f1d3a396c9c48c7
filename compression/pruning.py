"""Structured pruning: remove the attention heads and feed-forward units of a transformer that matter least.

After FastFormers (Kim and Hassan 2020, arXiv 2010.13382), which takes the importance of a head from Michel et al. 2019
(arXiv 1905.10650). Let L(x) be the loss of an example x, and m a mask of ones that multiplies each head's context and
each unit. Then

    I_m = sum over x of |dL(x) / dm|,  and  dL(x) / dm = sum over positions and elements of h * dL(x) / dh,

where h is the value that m multiplies: the head's context, an input of the attention's output projection, or the unit
after its activation, an input of the second feed-forward projection. Hooks read both from these inputs, whatever
computes the attention. The absolute value is taken for each example, as in the paper of 2019, so that the batches do
not matter. Pad positions have no gradient and add nothing.

All layers keep the same number of heads and units. So only the order within a layer decides, which
--dont_normalize_importance_by_layer does not change: it changes the reported and drawn figures, which compare layers.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import BucketSampler, EncodedData, prefetch
from model import Classifier
from pretrained.layout import NUM_HEADS, layer_parts, num_heads
from sentence_classifier.errors import InputError
from util import picture

logger = logging.getLogger(__name__)


class Importance(NamedTuple):
    """How much each head and each feed-forward unit matters."""

    heads: Tensor  # [layers, heads]
    units: Tensor  # [layers, units]

    def normalized(self) -> Importance:
        """Divided by each layer's L2 norm."""
        return Importance(*(F.normalize(scores, dim=1) for scores in self))


def check_targets(transformer: Any, heads: int, units: int) -> None:
    """Check the numbers of heads and units to keep.

    Raises:
        InputError: the model has fewer, or is of a kind that cannot be pruned.
    """
    parts = layer_parts(transformer)[0]
    for flag, target, most, what in (
        ("target_num_heads", heads, num_heads(transformer.config), "attention heads"),
        ("target_ffn_dim", units, parts.inner.out_features, "feed-forward units"),
    ):
        if target > most:
            raise InputError(f"--{flag}={target}: the model has {most} {what} in each layer; give {most} or fewer.")


def measure_importance(model: Classifier, data: EncodedData, batch_size: int, device: torch.device) -> Importance:
    """The importance of each head and unit on labelled data, see above; the model is left in evaluation mode."""
    model.eval()
    transformer: Any = model.embedding.transformer
    parts, heads = layer_parts(transformer), num_heads(transformer.config)
    projections = [linear for part in parts for linear in (part.output, part.outer)]
    inputs: list[Tensor] = []
    hooks = [linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for linear in projections]
    sums = [torch.zeros(heads if place % 2 == 0 else linear.in_features, dtype=torch.float64)
            for place, linear in enumerate(projections)]
    sampler = BucketSampler(data.lengths, batch_size, shuffle=False)
    try:
        for batch in tqdm(prefetch(data.batch, sampler), total=len(sampler), desc="importance", unit="batch",
                          disable=None):
            batch = batch.to(device)
            assert batch.targets is not None  # encoded data have them
            inputs.clear()
            logits, targets = model(batch.input_ids, batch.attention_mask), batch.targets
            if data.multi_label:
                goals = targets.sigmoid() if data.has_logits else targets.float()
                loss = F.binary_cross_entropy_with_logits(logits, goals, reduction="sum")
            else:
                loss = F.cross_entropy(logits, targets.softmax(-1) if data.has_logits else targets, reduction="sum")
            gradients = torch.autograd.grad(loss, inputs)
            for total, x, gradient in zip(sums, inputs, gradients, strict=True):
                # x [B, T, heads * head size] or [B, T, units] -> [B, heads] or [B, units]
                each = (x.detach() * gradient).sum(1).view(len(batch), len(total), -1).sum(-1)
                total += each.abs().sum(0).cpu().double()
    finally:
        for hook in hooks:
            hook.remove()
    return Importance(torch.stack(sums[::2]).float(), torch.stack(sums[1::2]).float())


def prune(transformer: Any, importance: Importance, heads: int, units: int) -> None:
    """Remove all but the most important heads and feed-forward units of each layer; these keep their order.

    The config records it: NUM_HEADS, and the architecture's own key for the feed-forward part.

    Raises:
        InputError: as check_targets.
    """
    check_targets(transformer, heads, units)
    config = transformer.config
    for layer, parts in enumerate(layer_parts(transformer)):
        size = parts.query.out_features // num_heads(config)
        parts.keep_heads(_best(importance.heads[layer], heads).to(parts.query.weight.device), size)
        parts.keep_units(_best(importance.units[layer], units).to(parts.inner.weight.device))
    if heads < config.num_attention_heads:
        setattr(config, NUM_HEADS, heads)
    setattr(config, "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size", units)


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores, in ascending order; of equal scores the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def draw_importance(importance: Importance, heads: int, units: int, path: str) -> None:
    """Draw the importance by layer: of heads, all but `heads` crossed out, and of units in ascending order."""
    from matplotlib import colormaps

    layers, count = importance.heads.shape
    with picture(path, 1, 2, figsize=(5 + 0.45 * count, 2.6 + 0.4 * layers)) as (figure, (left, right)):
        image = left.imshow(importance.heads, cmap="Blues", vmin=0, aspect="auto")
        left.set(title="attention heads (x: removed)", xlabel="head", ylabel="layer", xticks=range(count),
                 yticks=range(layers))
        for layer, scores in enumerate(importance.heads):
            for head in sorted({*range(count)} - {*_best(scores, heads).tolist()}):
                left.text(head, layer, "x", ha="center", va="center", color="tab:red")
        figure.colorbar(image, ax=left, label="importance")
        for layer, scores in enumerate(importance.units.sort(dim=1).values):
            right.plot(scores, color=colormaps["viridis"](layer / max(1, layers - 1)), label=f"layer {layer}")
        right.axvline(importance.units.shape[1] - units, color="tab:red", linestyle="--", label="removed to the left")
        right.set(title="feed-forward units", xlabel="unit, least important first", ylabel="importance", yscale="log")
        right.legend(fontsize="small")
