"""Pretrained transformers as embeddings: all that depends on which architecture a model is, in one place.

Nothing here goes by a model's name. Where its layers are, which token it classifies by, how long a sentence it takes
and what has to be masked is read off the model, its config and its tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import EncodedData
from pretrained.layout import NUM_HEADS, keep_first_heads, layer_lists, layer_parts
from sentence_classifier.errors import InputError
from util import IDENTITY, RUN_ID, Checkpoint, keep_previous, refuse_full_disk, saved_fact, sweep, sync_folder

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- loading


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
    """Which of transformers' Auto classes loads the model (or, where it is pruned, a class of ours), with what
    arguments."""
    from transformers import AutoModel, AutoModelForTextEncoding

    # Of T5 and its kin that is the encoder, which serves on its own; BART's decoder belongs to it.
    auto = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    found: Any = auto._model_mapping.get(type(config), None)
    # A pooler that nobody reads would be trained on nothing and exported for nothing.
    model_class = found[0] if isinstance(found, tuple) else found
    takes = inspect.signature(model_class).parameters if found else {}
    kwargs = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    return (_pruned_class(model_class) if found and getattr(config, NUM_HEADS, None) else auto), kwargs


def _pruned_class(model_class: Any) -> Any:
    """A class of transformers' models whose models have as many heads as NUM_HEADS in their config says."""

    def init(self: Any, config: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, **kwargs)
        keep_first_heads(self)

    # transformers goes by name and module: what a saved config.json calls the class, whether attention can be chosen.
    return type(model_class.__name__, (model_class,), {
        "__init__": init, "__module__": model_class.__module__,
        "from_config": classmethod(lambda cls, config, **kwargs: cls._from_config(config, **kwargs))})


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


# ------------------------------------------------------------------------------------------------------- embedding


class TransformerEmbedding(nn.Module):
    """A transformer whose last hidden states are the token vectors.

    Args:
        transformer: a model of the transformers library.
        classify_by: "first" or "last", see `classification_token`.
        frozen: its weights are not trained, and it has no dropout.
        token_cutoff: the share of tokens whose vectors training reads as zeros, drawn anew in each pass; positions
            stay, and so do a sentence's first and last token, which are special in most tokenizers. Token cutoff, Shen
            et al. 2020 (arXiv 2009.13818, section 3.1).
    """

    def __init__(self, transformer: Any, classify_by: str, frozen: bool = False, token_cutoff: float = 0.0) -> None:
        super().__init__()
        self.transformer = transformer
        self.classify_by = classify_by
        self.frozen = frozen
        self.token_cutoff = token_cutoff
        self.output_size: int = transformer.config.hidden_size
        self._pad: Tensor | None = None  # [B, T], True at pad positions, while a forward pass runs
        self._unread: Tensor | None = None  # [B, T], these, and in training the tokens that --token_cutoff hides
        self.output: Any = None  # see keep_output
        takes = inspect.signature(transformer.forward).parameters
        self._kwargs = {"use_cache": False} if "use_cache" in takes else {}
        if frozen:
            transformer.requires_grad_(False)
        self._keep_padding_out()

    def _keep_padding_out(self) -> None:
        """Zero the pad positions wherever something other than attention lets positions see each other.

        MobileBERT concatenates the embeddings of neighbours; ConvBERT convolves hidden states and unfolds windows of
        them; attention masks reach neither.
        """
        table = self.transformer.get_input_embeddings().weight
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Embedding) and module.weight is table:  # encoder-decoders have several
                shifted = self.transformer.config.is_encoder_decoder and name.startswith("decoder.")
                module.register_forward_hook(self._mask_unread_later if shifted else self._mask_unread)
            if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
                module.register_forward_pre_hook(self._mask_channels)
            if isinstance(getattr(module, "conv_out_layer", None), nn.Module):
                module.conv_out_layer.register_forward_hook(self._mask_output)

    def _mask_unread(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]: the token table's, without positions."""
        return output if self._unread is None else output.masked_fill(self._unread.unsqueeze(-1), 0.0)

    def _mask_unread_later(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]: a decoder's, which reads each token a position later, and first one that begins or ends."""
        if self._unread is None or not self.training:  # no position sees the padding behind it
            return output
        return output.masked_fill(F.pad(self._unread[:, :-1], (1, 0)).unsqueeze(-1), 0.0)

    def _mask_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]."""
        return output if self._pad is None else output.masked_fill(self._pad.unsqueeze(-1), 0.0)

    def _mask_channels(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """inputs[0] [B, D, T]."""
        x = inputs[0]
        return inputs if self._pad is None else (x.masked_fill(self._pad.unsqueeze(1), 0.0), *inputs[1:])

    def read_first_only(self) -> None:
        """From now on only the first token's vector is read: compute no other in the last layer after its attention.

        Nothing there lets positions see each other. Of a layer built as BERT's that saves three quarters of the matrix
        products, forward and backward. Layers of other kinds are computed as ever.
        """
        try:
            last = layer_parts(self.transformer)[-1]
        except InputError:
            return
        for module in self.transformer.modules():
            if getattr(module, "dense", None) is last.output:  # takes the attention's context, and its input to add
                module.register_forward_pre_hook(self._first_token)

    def _first_token(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """inputs [B, T, D]. An exported graph is fused as a whole first, and narrowed then: graph.select_early."""
        whole = self._pad is None or "output_hidden_states" in self._kwargs or torch.compiler.is_exporting()
        return inputs if whole else tuple(x[:, :1] for x in inputs)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T], 0 where mask [B, T] is False -> [B, T, D], zero there; [B, 1, D] after read_first_only."""
        self._pad = self._unread = ~mask
        if self.training and self.token_cutoff:
            inner = F.pad(F.pad(mask, (0, 1))[:, 2:], (1, 0))  # all but a sentence's first and last
            self._unread = self._pad | (inner & (torch.rand(mask.shape, device=mask.device) < self.token_cutoff))
        if pad_id := self.transformer.config.pad_token_id:  # mBART finds a sentence's end by it
            input_ids = input_ids.masked_fill(self._pad, pad_id)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.transformer(input_ids=input_ids, attention_mask=mask.long(), **self._kwargs)
        if not torch.is_grad_enabled():  # else gradient checkpointing needs it once more
            self._pad = self._unread = None
        hidden = output.last_hidden_state
        return hidden.masked_fill(~mask[:, : hidden.shape[1]].unsqueeze(-1), 0.0)

    def keep_output(self, attentions: bool) -> None:
        """From now on keep in `output` what each pass computes: all hidden states and, if asked for, attentions."""
        self._kwargs["output_hidden_states"] = True
        if attentions:
            self.transformer.set_attn_implementation("eager")  # the others compute none
            self._kwargs["output_attentions"] = True
        self.transformer.register_forward_hook(lambda module, inputs, output: setattr(self, "output", output))

    def train(self, mode: bool = True) -> TransformerEmbedding:
        """Frozen transformers stay without dropout."""
        super().train(mode)
        if self.frozen:
            self.transformer.eval()
        return self

    @classmethod
    def for_training(cls, data: EncodedData, args: argparse.Namespace, model: Any = None) -> TransformerEmbedding:
        """The embedding that training begins with: `model`, or that of --bert_model_name_or_path."""
        path = args.bert_model_name_or_path
        made = tokenizer_text(load_tokenizer(path))
        if hashlib.sha256(made.encode()).hexdigest() != data.encoding.vocab_sha256:
            raise InputError(f"{data.path}: encoded with the tokenizer of {data.encoding.bert_model_name_or_path}, "
                             f"which is not that of {path}; run preprocess.py with "
                             f"--bert_model_name_or_path={path}.")
        model = model or load_pretrained(path)
        if args.bert_remove_layers:
            remove_layers(model, args.bert_remove_layers)
        rows = model.get_input_embeddings().num_embeddings
        if int(data.token_ids.max()) >= rows:
            raise InputError(f"{path}: its tokenizer has more tokens than the model has embeddings ({rows}).")
        check_length(model, data.encoding.n_ctx, path)
        embedding = cls(model, classification_token(model, data.encoding.leading_special),
                        args.bert_use_feature_based, args.token_cutoff)
        check_padding(embedding, path)
        if args.gradient_checkpointing:
            try:
                model.activation_checkpointing_enable()
            except ValueError:
                raise InputError(f"--gradient_checkpointing: {model.config.model_type} models lack it.") from None
        return embedding

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, folders: list[str]) -> TransformerEmbedding:
        """The embedding that load_state_dict fills."""
        made = checkpoint.run.embedding
        return cls(build_from_config(json.loads(made["config"])), made["classify_by"])

    def metadata(self) -> dict[str, Any]:
        """What from_checkpoint needs to know beside the weights."""
        return {"config": self.transformer.config.to_json_string(use_diff=False), "classify_by": self.classify_by}

    def identity(self) -> dict[str, Any]:
        """What makes it another model: the architecture, not where it came from."""
        passing = ("_name_or_path", "id2label", "label2id", RUN_ID, IDENTITY, "architectures", "transformers_version")
        config = self.transformer.config.to_dict()
        return {"frozen": self.frozen, **{key: value for key, value in config.items() if key not in passing}}


def classification_token(model: Any, leading_special: bool) -> str:
    """Which position the architecture classifies by: "first" or "last" (the last real token).

    BERT-likes classify by the special token that their tokenizer puts first. Where there is none, where attention
    goes to earlier positions only (GPT), and in encoder-decoders (BART), it is the last token, which has seen all.

    Args:
        leading_special: whether the tokenizer begins each sentence with a special token.
    """
    return "first" if leading_special and not model.config.is_encoder_decoder and not _is_causal(model) else "last"


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Whether a position's hidden state is the same whatever follows it: tried out on three tokens."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % model.config.vocab_size
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    model.train(was_training)
    return torch.equal(hidden[0, 0], hidden[1, 0])


@torch.no_grad()
def check_length(model: Any, n_ctx: int, path: str) -> None:
    """Refuse sentences longer than the model has positions for: tried out on one of n_ctx tokens."""
    pad = model.config.pad_token_id or 0  # counts for no position in RoBERTa and its kin
    ids = torch.full((1, n_ctx), (pad + 1) % model.config.vocab_size, device=model.device)
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "alloc" in str(error):
            raise
        most = getattr(model.config, "max_position_embeddings", None)
        raise InputError(f"{path}: n_ctx is {n_ctx}, and the model takes shorter sentences only"
                         f"{f' (it has {most} positions)' if most else ''}; lower n_ctx in the config or with "
                         "preprocess.py --n_ctx.") from None


@torch.no_grad()
def check_padding(embedding: TransformerEmbedding, path: str) -> None:
    """Refuse a model for which padding changes a sentence's vectors, or that reads batches in another way."""
    ids = torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 0, 0]]) % embedding.transformer.config.vocab_size
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    try:
        padded, alone = embedding.eval()(ids, mask)[1:, :3], embedding(ids[1:, :3], mask[1:, :3])
        fine = torch.allclose(padded, alone, rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        fine = False
    if not fine:
        raise InputError(f"{path}: {embedding.transformer.config.model_type} models do not take padded sentences in a "
                         "way that this toolkit knows; choose another architecture.")


# ---------------------------------------------------------------------------------------------------- fewer layers


def remove_layers(model: Any, places: Iterable[int]) -> None:
    """Remove layers, counted from 0, in encoder and decoder alike.

    Raises:
        InputError: no such layer, or the model does not work without it.
    """
    config = model.config
    count = config.num_hidden_layers
    places = sorted(set(places))
    said = f"--bert_remove_layers={','.join(map(str, places))}"
    if not places or places[0] < 0 or places[-1] >= count:
        raise InputError(f"{said}: the model's layers are 0 to {count - 1}.")
    if len(places) == count:
        raise InputError(f"{said}: those are all of the model's layers.")
    if getattr(config, "decoder_layers", count) != getattr(config, "encoder_layers", count):
        raise InputError(f"{said}: encoder and decoder have different numbers of layers, of which none is removed.")
    kept = [place for place in range(count) if place not in places]
    lists = layer_lists(model)
    if not lists:  # ALBERT: layers share their weights, so that only their number can change
        logger.info("[layers share their weights: %d passes in place of %d]", len(kept), count)
    for layers in lists:
        moved = {old: new for new, old in enumerate(kept)}
        for place in kept:
            for module in layers[place].modules():
                for name in ("layer_idx", "layer_id"):
                    if getattr(module, name, None) == place:
                        setattr(module, name, moved[place])
        for place in reversed(places):
            del layers[place]
    for name in ("layer_types", "attention_layers", "mlp_layer_types"):  # what config says layer by layer
        if isinstance(kinds := getattr(config, name, None), list) and len(kinds) == count:
            setattr(config, name, [kinds[place] for place in kept])
    if hasattr(config, "attention_types"):  # GPT-Neo writes its list of layers down as runs
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    for name in ("encoder_layers", "decoder_layers", "num_decoder_layers"):
        if name in vars(config):
            setattr(config, name, len(kept))
    config.num_hidden_layers = len(kept)
    rebuilt = build_from_config(config.to_dict()).eval()
    ids = torch.tensor([[1, 2, 3]]) % config.vocab_size
    try:
        rebuilt.load_state_dict(model.state_dict())
        with torch.no_grad():
            same = torch.equal(rebuilt(ids).last_hidden_state, model.eval()(ids).last_hidden_state)
        reason = "it computes something else then"
    except RuntimeError as error:
        same, reason = False, str(error).splitlines()[1].strip()
    if not same:
        raise InputError(f"{said}: a {config.model_type} model cannot be rebuilt without these layers ({reason}).")


# ------------------------------------------------------------------------------------------------ low-rank adapters


def add_lora(model: Any, rank: int) -> None:
    """Freeze a transformer and train low-rank updates of its matrices (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Every matrix product of its layers gets one, W x + 2 B A x with A of `rank` rows, as QLoRA found best (Dettmers et
    al. 2023, arXiv 2305.14314, section 4).

    Raises:
        InputError: it has no layer that an adapter fits.
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
    """A model's state dict with adapters merged into the weights that they update, under the weights' own names."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                key = f"{name}.base_layer.weight"
                state[key] = state[key] + module.get_delta_weight(adapter)
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


# ---------------------------------------------------------------------------------------------------------- saving


def check_output_folder(folder: str, data_dir: str) -> None:
    """Refuse, before training, a place where save_pretrained could not write or would move aside what is no model."""
    target = Path(folder).absolute()
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise InputError(f"--bert_output_dir={folder}: is there already and holds no model; name another folder.")
    if any(target == place or target in place.parents for place in (Path.cwd(), Path(data_dir).absolute())):
        raise InputError(f"--bert_output_dir={folder}: name a folder of its own.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"--bert_output_dir={folder}: {target.parent} cannot be written to.")


def save_pretrained(model: Any, tokenizer: Any, labels: list[str], run_id: str, identity: str, folder: str) -> None:
    """Write model and tokenizer in the hub's layout, whole or not at all.

    A folder that is there already and was not written by a run on the same config and data moves aside.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, f".{target.name}-*")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as place:
        made, old = Path(place) / "model", Path(place) / "old"
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        setattr(model.config, RUN_ID, run_id)
        setattr(model.config, IDENTITY, identity)
        try:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            for file in made.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        except Exception as error:
            refuse_full_disk(target, error)
            raise
        if target.exists():
            if saved_fact(target, IDENTITY) == identity or not any(target.iterdir()):
                os.rename(target, old)
            else:
                logger.warning("[%s came from elsewhere and is kept as %s]", target, keep_previous(target))
        os.rename(made, target)
    sync_folder(target.parent)
