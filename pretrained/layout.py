"""Where a pretrained transformer's layers, heads and feed-forward units are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sentence_classifier.errors import InputError
from util import IDENTITY, RUN_ID

# In a pruned transformer's config.json: the heads of each layer. Its num_attention_heads stays what it was, since
# transformers' models take the size of a head from it; the width of the feed-forward part has a key of their own.
NUM_HEADS = "classifier_num_heads"


def architecture(config: Any) -> dict[str, Any]:
    """What a transformers config says of the model's architecture, and not of where it came from."""
    passing = ("_name_or_path", "id2label", "label2id", RUN_ID, IDENTITY, "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in passing}


def tried_out(model: Any, ids: Sequence[Sequence[int]] = ((1, 2, 3),)) -> Any:
    """What a transformer computes, in evaluation mode, of a tiny batch of token ids; its mode stays what it was."""
    was_training = model.training
    input_ids = torch.tensor(ids, device=model.device) % model.config.vocab_size
    output = model.eval()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    model.train(was_training)
    return output


def layer_lists(model: Any) -> list[nn.ModuleList]:
    """The outermost lists of the model's layers: one, or two where there is a decoder."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers and not inner:
            found.append((name, module))
    return [module for _, module in found]


def layers_above(model: Any) -> dict[int, int]:
    """How many layers stand above each parameter, by the parameter's id(), in the order in which the model uses them.

    Above a layer's own parameters stand the layers after it. Any other parameter has those layers above it whose input
    depends on it: all of them for token embeddings, all but the lowest for relative positions, which each layer reads
    beside its input. What is used after the last layer, and what is not used, is left out: nothing is above it. The
    result is empty where layers share their weights.
    """
    owners = {id(module): layer for layers in layer_lists(model) for layer in layers for module in layer.modules()}
    inputs: dict[nn.Module, Tensor] = {}  # the hidden states that each layer reads, in the order of use

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if hidden is not None:
            inputs.setdefault(owners[id(module)], hidden)

    # On every module: SqueezeBERT calls its layers' parts and passes the hooks of the layers by.
    handles = [module.register_forward_pre_hook(note, with_kwargs=True)
               for module in model.modules() if id(module) in owners]
    with torch.enable_grad():
        tried_out(model)
    for handle in handles:
        handle.remove()

    above: dict[int, int] = {}
    seen: set[Any] = set()
    for place, (layer, hidden) in enumerate(inputs.items()):
        waiting = [hidden.grad_fn]  # the way back through autograd's graph, to what no earlier layer has reached
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
                if isinstance(parameter := getattr(node, "variable", None), Tensor):
                    above.setdefault(id(parameter), len(inputs) - place)
        above |= {id(parameter): len(inputs) - place - 1 for parameter in layer.parameters()}
    return above


class LayerParts(NamedTuple):
    """The parts of a layer built as BERT's that can be narrowed: attention with its projections, and feed-forward."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear  # of the attention: [heads * head size] -> [D]
    inner: nn.Linear
    outer: nn.Linear  # of the feed-forward part: [units] -> [D]

    def keep_heads(self, places: Tensor, size: int) -> None:
        """Remove all heads but those at `places`; a head is `size` elements wide."""
        rows = (places.unsqueeze(1) * size + torch.arange(size, device=places.device)).flatten()
        for linear in (self.query, self.key, self.value):
            _keep(linear, rows, 0)
        _keep(self.output, rows, 1)
        for name, value in (("num_attention_heads", len(places)), ("n_heads", len(places)),
                            ("all_head_size", len(rows))):
            if hasattr(self.attention, name):
                setattr(self.attention, name, value)

    def keep_units(self, places: Tensor) -> None:
        """Remove all units of the feed-forward part but those at `places`."""
        _keep(self.inner, places, 0)
        _keep(self.outer, places, 1)


def _keep(linear: nn.Linear, places: Tensor, axis: int) -> None:
    """Keep these outputs (axis 0) or inputs (axis 1) of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, places), linear.weight.requires_grad)
    if axis:
        linear.in_features = len(places)
        return
    linear.out_features = len(places)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, places), linear.bias.requires_grad)


# The names of these matrices in a layer of BERT, RoBERTa, ELECTRA and all that are built alike, and in DistilBERT's.
LAYOUTS = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
     "intermediate.dense", "output.dense"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
)


def layer_parts(model: Any) -> list[LayerParts]:
    """The parts of each layer.

    Raises:
        InputError: the layers are not built as BERT's, or have other matrices beside those.
    """
    lists = layer_lists(model)
    found = []
    for layer in lists[0] if len(lists) == 1 else ():
        modules = dict(layer.named_modules())
        matrices = {name for name, module in modules.items()
                    if any(weight.ndim > 1 for weight in module.parameters(recurse=False))}
        layout = next((names for names in LAYOUTS if set(names) == matrices), None)
        if layout is None or not all(type(modules[name]) is nn.Linear for name in layout):
            break
        attention = layout[0].rpartition(".")[0]
        found.append(LayerParts(*(modules[name] for name in (attention, *layout))))  # type: ignore[arg-type]
    if not found or len(found) < len(lists[0]):
        raise InputError(f"the model's architecture is {model.config.model_type}; those that can be pruned are BERT, "
                         "DistilBERT, RoBERTa, ELECTRA, MiniLM and others with layers like theirs.")
    return found


def num_heads(config: Any) -> int:
    """The heads of a layer."""
    return getattr(config, NUM_HEADS, None) or config.num_attention_heads


def keep_first_heads(model: Any) -> None:
    """Make a whole model's attention as narrow as its config's NUM_HEADS says, before weights are loaded into it.

    Raises:
        InputError: the config says what cannot be.
    """
    count, most = num_heads(model.config), model.config.num_attention_heads
    if not isinstance(count, int) or not 0 < count <= most:
        raise InputError(f"{NUM_HEADS} in config.json is {count!r} and has to be a whole number from 1 to {most}.")
    for parts in layer_parts(model):
        parts.keep_heads(torch.arange(count), parts.query.out_features // most)
