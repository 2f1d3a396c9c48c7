"""Where layers are: by use, not by the order in which a model holds its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, make_model

from pretrained.layout import layer_lists, layers_above
from pretrained.loading import load_pretrained

WORDS = ["play some jazz", "wake me up at six"] * 20
# What is used elsewhere than where it is registered.
ELSEWHERE = {
    "DeBERTa": {"encoder.rel_embeddings.weight": 2},
    "DeBERTa-v2": {"encoder.rel_embeddings.weight": 2, "encoder.LayerNorm.weight": 2, "encoder.conv.conv.weight": 2},
    "MPNet": {"encoder.relative_attention_bias.weight": 2},
    "BART": {"shared.weight": 6, "encoder.layernorm_embedding.weight": 6, "decoder.layernorm_embedding.weight": 3,
             "decoder.embed_positions.weight": 3},
    "GPT-2": {"wte.weight": 3, "ln_f.weight": 0},
    "T5": {"shared.weight": 3, "encoder.final_layer_norm.weight": 0},
    "SqueezeBERT": {"embeddings.word_embeddings.weight": 3, "pooler.dense.weight": 0},
    "ALBERT": {},
}


def layer_inputs(model: Any) -> list[torch.Tensor]:
    """The first tensor that each layer's modules read, in the order of the layers."""
    layers = [layer for layers in layer_lists(model) for layer in layers]
    found: dict[int, torch.Tensor] = {}

    def note(place: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if tensors:
                found.setdefault(place, tensors[0].clone())
        return hook

    handles = [module.register_forward_pre_hook(note(place), with_kwargs=True)
               for place, layer in enumerate(layers) for module in layer.modules()]
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return [found[place] for place in range(len(layers))]


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_layers_above_are_counted_by_use(tmp_path: Path, name: str) -> None:
    """By experiment: a parameter outside of the layers moves the input of each layer above it, and no other."""
    model = load_pretrained(str(make_model(name, tmp_path, WORDS))).eval()
    above = layers_above(model)
    layers = [layer for layers in layer_lists(model) for layer in layers]
    if name == "ALBERT":
        assert layers == [] and above == {}
        return
    for place, layer in enumerate(layers):
        assert {above[id(p)] for p in layer.parameters()} == {len(layers) - place - 1}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    before = layer_inputs(model)
    for parameter_name, parameter in model.named_parameters():
        if id(parameter) in inside:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        changed = [not torch.equal(*pair) for pair in zip(before, layer_inputs(model), strict=True)]
        parameter.data.copy_(kept)
        first = changed.index(True) if any(changed) else len(layers)
        assert above.get(id(parameter), 0) == len(layers) - first, parameter_name
    known = {name: above.get(id(p), 0) for name, p in model.named_parameters()}
    assert {key: known[key] for key in ELSEWHERE.get(name, {})} == ELSEWHERE.get(name, {})


def test_counting_leaves_the_model_and_the_random_numbers_alone(tmp_path: Path) -> None:
    model = load_pretrained(str(make_model("BERT", tmp_path, WORDS)))
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            assert len(set(layers_above(model).values())) == LAYERS + 1
        assert model.training == training and all(p.grad is None for p in model.parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
