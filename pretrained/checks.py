"""What is tried out on a pretrained model before it is trained: how it classifies, and that it fits the data."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from pretrained.layout import tried_out
from pretrained.loading import load_tokenizer, tokenizer_text
from sentence_classifier.errors import InputError
from util import EncodingInfo


@torch.no_grad()
def classification_token(model: Any, leading_special: bool) -> str:
    """The position that the architecture classifies by: "first" or "last" (the last real token).

    BERT-likes classify by the special token that their tokenizer puts first. Where there is none, where attention
    goes to earlier positions only (GPT), and in encoder-decoders (BART), it is the last token, which has seen all.
    """
    if not leading_special or model.config.is_encoder_decoder:
        return "last"
    hidden = tried_out(model, [[1, 2, 3], [1, 2, 4]]).last_hidden_state
    return "last" if torch.equal(hidden[0, 0], hidden[1, 0]) else "first"  # the same whatever follows, or not


def check_tokenizer(path: str, encoding: EncodingInfo, source: str) -> None:
    """Refuse data, encoded in the file `source`, that another model's tokenizer than that at `path` encoded."""
    made = tokenizer_text(load_tokenizer(path))
    if hashlib.sha256(made.encode()).hexdigest() != encoding.vocab_sha256:
        raise InputError(f"{source}: encoded with the tokenizer of {encoding.bert_model_name_or_path}, which is not "
                         f"that of {path}; run preprocess.py with --bert_model_name_or_path={path}.")


@torch.no_grad()
def check_size(model: Any, last_id: int, n_ctx: int, path: str) -> None:
    """Refuse a model without an embedding of the data's last id, or that takes no sentence of n_ctx tokens (tried)."""
    rows = model.get_input_embeddings().num_embeddings
    if last_id >= rows:
        raise InputError(f"{path}: its tokenizer has more tokens than the model has embeddings ({rows}).")
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
def check_padding(embedding: Any, path: str) -> None:
    """Refuse a TransformerEmbedding in which padding changes a sentence's vectors, or that reads batches otherwise."""
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
