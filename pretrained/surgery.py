"""Changes to a pretrained model before it is trained: layers left out, low-rank adapters, activations not kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrained.layout import layer_lists, tried_out
from pretrained.loading import build_from_config
from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)


def remove_layers(model: Any, places: Iterable[int]) -> None:
    """Remove layers, counted from 0, in encoder and decoder alike.

    Raises:
        InputError: there is no such layer, or the model does not work without it.
    """
    config = model.config
    count = config.num_hidden_layers
    chosen = sorted(set(places))
    flag = f"--bert_remove_layers={','.join(map(str, chosen))}"
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise InputError(f"{flag}: the model's layers are 0 to {count - 1}.")
    if len(chosen) == count:
        raise InputError(f"{flag}: those are all of the model's layers.")
    if getattr(config, "decoder_layers", count) != getattr(config, "encoder_layers", count):
        raise InputError(f"{flag}: encoder and decoder have different numbers of layers, of which none is removed.")
    kept = [place for place in range(count) if place not in chosen]
    lists = layer_lists(model)
    if not lists:  # ALBERT: layers share their weights, so that only their number can change
        logger.info("[layers share their weights: %d passes in place of %d]", len(kept), count)
    for layers in lists:
        for number, place in enumerate(kept):
            for module in layers[place].modules():
                for name in ("layer_idx", "layer_id"):
                    if getattr(module, name, None) == place:
                        setattr(module, name, number)
        for place in reversed(chosen):
            del layers[place]
    for name in ("layer_types", "attention_layers", "mlp_layer_types"):  # what the config says of each layer
        if isinstance(kinds := getattr(config, name, None), list) and len(kinds) == count:
            setattr(config, name, [kinds[place] for place in kept])
    if hasattr(config, "attention_types"):  # GPT-Neo's config also has them as runs of equal layers
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    for name in ("encoder_layers", "decoder_layers", "num_decoder_layers"):
        if name in vars(config):
            setattr(config, name, len(kept))
    config.num_hidden_layers = len(kept)
    rebuilt = build_from_config(config.to_dict())
    try:
        rebuilt.load_state_dict(model.state_dict())
        with torch.no_grad():
            same = torch.equal(tried_out(rebuilt).last_hidden_state, tried_out(model.eval()).last_hidden_state)
        reason = "it computes something else then"
    except RuntimeError as error:
        same, reason = False, str(error).splitlines()[1].strip()
    if not same:
        raise InputError(f"{flag}: a {config.model_type} model cannot be rebuilt without these layers ({reason}).")


def add_lora(model: Any, rank: int) -> None:
    """Freeze a transformer and train low-rank updates of its matrices (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Every matrix W of its layers gets one, so that it computes W x + 2 B A x, where A has `rank` rows. To adapt all
    matrices is what QLoRA found best (Dettmers et al. 2023, arXiv 2305.14314, section 4).

    Raises:
        InputError: the model has no layer that an adapter fits.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for layers in layer_lists(model) or [model] for module in layers.modules()}
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear | Conv1D) and id(module) in inside]
    if not names:
        raise InputError(f"--lora_r: {model.config.model_type} models have no linear layers to adapt.")
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed),
                            model)


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict, with each adapter merged into the weight that it updates, under the weight's own name."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                key = f"{name}.base_layer.weight"
                state[key] = state[key] + module.get_delta_weight(adapter)
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def checkpoint_activations(model: Any) -> None:
    """Save memory: compute the layers' activations again in the backward pass instead of keeping them.

    Raises:
        InputError: the architecture does not support it.
    """
    try:
        model.activation_checkpointing_enable()
    except ValueError:
        raise InputError(f"--gradient_checkpointing: {model.config.model_type} models lack it.") from None
