"""Pretrained transformers as folders or the hub hold them: tokenizers, configs, weights.

In this package nothing goes by a model's name. Where its layers are, which token it classifies by, how long a sentence
it takes and what has to be masked is read off the model, its config and its tokenizer.
"""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrained.layout import NUM_HEADS, keep_first_heads
from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer of a model folder or of a hub name.

    Raises:
        InputError: there is none, or none that is fast.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, path, "tokenizer", "tokenizer.json and tokenizer_config.json")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up where the files are missing
        raise InputError(f"{path}: no tokenizer in it (tokenizer.json, vocab.txt or a SentencePiece model).")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{path}: its tokenizer has no fast form (tokenizer.json), which this toolkit needs.")
    return tokenizer


def tokenizer_text(tokenizer: Any) -> str:
    """The whole tokenizer as the content of a tokenizer.json, without truncation and padding."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    return bare.to_str()


def begins_with_special(tokenizer: Any) -> bool:
    """Whether each sentence begins with a special token, as BERT's with [CLS]."""
    return bool(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0])


def load_config(path: str) -> Any:
    """The transformers config of a model folder or of a hub name."""
    from transformers import AutoConfig

    return _load(AutoConfig.from_pretrained, path, "config", "config.json")


def load_pretrained(path: str) -> Any:
    """The weights of a model folder or of a hub name, in fp32, without head and pooler.

    Raises:
        InputError: no such folder, no weights in it, weights of another architecture, or no network for a hub name.
    """
    config = load_config(path)
    loader, kwargs = _auto_class(config)
    model, info = _load(loader.from_pretrained, path, "model", "config.json and model.safetensors", config=config,
                        dtype=torch.float32, output_loading_info=True, **kwargs)
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    words = model.get_input_embeddings().weight
    lost = any(name in missing for name, value in model.named_parameters() if value is words)
    if lost or len(missing) > len(model.state_dict()) // 2:
        raise InputError(f"{path}: its weights are not those of a {config.model_type} model "
                         f"({len(missing)} of {len(model.state_dict())} tensors are missing, such as {missing[0]}).")
    if missing:
        logger.warning("[%s] lacks %d of the model's tensors, which begin at random: %s", path, len(missing),
                       ", ".join(sorted(missing)[:8]))
    return model


def build_from_config(config: dict[str, Any]) -> Any:
    """The model that a checkpoint's transformers config describes, with random weights."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(**config)
    loader, kwargs = _auto_class(made)
    return loader.from_config(made, dtype=torch.float32, **kwargs)


def _auto_class(config: Any) -> tuple[Any, dict[str, Any]]:
    """The Auto class of transformers that loads the model (if it is pruned: a class of ours), and its arguments."""
    from transformers import AutoModel, AutoModelForTextEncoding

    # Of T5 and its kin that is the encoder, which serves on its own; BART's decoder belongs to it.
    auto = AutoModelForTextEncoding if model_class_of(AutoModelForTextEncoding, config) else AutoModel
    model_class = model_class_of(auto, config)
    # A pooler that nobody reads would be trained on nothing and exported for nothing.
    takes = inspect.signature(model_class).parameters if model_class else {}
    kwargs = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    return (_pruned_class(model_class) if model_class and getattr(config, NUM_HEADS, None) else auto), kwargs


def _pruned_class(model_class: Any) -> Any:
    """A class of transformers' models whose models have as many heads as NUM_HEADS in their config says."""

    def init(self: Any, config: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, **kwargs)
        keep_first_heads(self)

    # transformers goes by name and module: what a saved config.json calls the class, whether attention can be chosen.
    return type(model_class.__name__, (model_class,), {
        "__init__": init, "__module__": model_class.__module__, "from_config": classmethod(build_of_class)})


def _load(loader: Any, path: str, what: str, files: str, **kwargs: Any) -> Any:
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()  # what matters of a load, load_pretrained says itself
    chatter.disable_progress_bar()
    local = os.path.isdir(path)
    if not local and (path.count("/") > 1 or path.startswith((".", "/", "~"))):  # a hub name is "name" or "owner/name"
        raise InputError(f"{path}: no such folder; a model folder holds {files}.")
    try:
        return loader(path, trust_remote_code=False, **kwargs)  # else a folder's own Python could run
    except Exception as error:  # the hub, safetensors and transformers raise a dozen kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if local:
            raise InputError(f"{path}: no usable {what} in this folder, which has to hold {files} ({reason})."
                             ) from None
        raise InputError(f"{path}: no such folder, and it could not be fetched from the model hub; download it where "
                         f"there is a network, with python etc/download_hf.py --model_name_or_path={path} "
                         f"--output_dir=embeddings/{Path(path).name}, and give that folder ({reason}).") from None


# What follows stands for transformers' private names.


def model_class_of(auto: Any, config: Any) -> Any:
    """The model class that an Auto class takes for a config, None if it has none."""
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def build_of_class(model_class: Any, config: Any, **kwargs: Any) -> Any:
    """A model of this very class with random weights."""
    return model_class._from_config(config, **kwargs)


def attention_of(model: Any) -> str:
    """The name of the attention that a model computes with, among transformers' implementations."""
    return model.config._attn_implementation


def can_choose_attention(model: Any) -> bool:
    """Whether the model takes any of transformers' implementations; DeBERTa, MPNet and others have their own."""
    return model._can_set_attn_implementation()


def keep_scores_in_fp32(model: Any) -> None:
    """Give DeBERTa's attention scores in fp32 under autocast: it fills them with the least number of fp32."""
    for module in model.modules():
        if hasattr(module, "head_logits_proj"):  # what DeBERTa puts the scores through, if anything
            if module.head_logits_proj is None:
                module.head_logits_proj = nn.Identity()
            module.head_logits_proj.register_forward_hook(lambda module, inputs, scores: scores.float())
