"""What makes training a transformer faster and leaves what it learns as it is.

On a CPU dropout draws fewer random numbers, and attention is computed in fewer and faster steps than by torch, whose
fused kernels take no dropout. Everywhere, gradients and optimizer state exist only for the tokens that the data have;
the other rows of the token table each process holds as they are, with ZeRO's stage 3 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # of a random number of 16 bits
_ATTENTION = "training_on_cpu"  # among transformers' implementations of attention


def speed_up_training(transformer: Any, device: torch.device, token_ids: Any) -> None:
    """Make a model of the transformers library fast to train. To be called before its optimizer is made.

    Args:
        device: on which it will be trained.
        token_ids: all of the training data's, an array of integers; None: train the whole token table.
    """
    for module in transformer.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    if device.type == "cpu" and transformer.config._attn_implementation == "sdpa":  # else the model has its own
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(_ATTENTION, attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        transformer.set_attn_implementation(_ATTENTION)
    if token_ids is not None:
        train_read_rows(transformer, token_ids)


# --------------------------------------------------------------------------------------------------------- dropout


class FastDropout(nn.Dropout):
    """nn.Dropout that lets 16 random bits decide on an element of a CPU tensor, in place of a number of its own.

    torch's generator, which the seed sets and a resumed run goes on with, is asked for a quarter as many numbers. The
    probability is rounded to a multiple of 2^-16: 0.1 becomes 0.100006, by which what stays is scaled, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x and the answer of any shape."""
        return fast_dropout(x, self.p) if self.training else x


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """What FastDropout does in training: x and the answer of any shape."""
    dropped = round(p * _LEVELS)
    if not 0 < dropped < _LEVELS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


# ------------------------------------------------------------------------------------------------------- attention


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as transformers' models call it (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Scores stand in memory with the queries last, [B, heads, T keys, T queries], so that the softmax over keys works on
    whole vectors of queries: over the last axis torch computes it slowly where sentences are short.

    Args:
        query, key, value: [B, heads, T, size].
        attention_mask: what is added to the scores, [B or 1, 1 or heads, T queries, T keys]; None: nothing.

    Returns:
        [B, T queries, heads, size], and None in the place of the weights.
    """
    batch, heads, length, size = query.shape
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # what decides where there is no mask
    plain = key.shape[1] == heads and kwargs.get("position_bias") is None and not (causal and attention_mask is None)
    if not plain or not torch.is_grad_enabled():  # without gradients torch has a fused kernel
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = size**-0.5 if scaling is None else scaling
    q, k, v = (x.reshape(batch * heads, -1, x.shape[-1]) for x in (query, key, value))
    scores = torch.bmm(k, q.transpose(1, 2)).view(batch, heads, -1, length)
    if attention_mask is None:
        scores = scores.float() * scale
    else:
        scores = torch.add(attention_mask.float().transpose(2, 3), scores, alpha=scale)
    weights = fast_dropout(scores.softmax(2).to(v.dtype), dropout).flatten(0, 1)
    return torch.bmm(weights.transpose(1, 2), v).view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


# ----------------------------------------------------------------------------------------------------- token table


class PartialEmbedding(nn.Embedding):
    """An nn.Embedding of which some rows are trained and the others are frozen.

    AdamW without weight decay leaves rows without gradients as they are, so that a model learns what it would with the
    whole table; its steps leave out the zeros. State dicts hold the whole table, under its own name.

    Attributes:
        weight: the trained rows [N, D].
        whole: all rows [V, D]; the trained ones as they were at first, or when last loaded.
        rows: where the trained ones stand in it [N] int64.
        places: for each row its place among the trained ones, and N for the others [V] int64.
    """

    whole: Tensor
    rows: Tensor
    places: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids of any shape [...] -> [..., D]."""
        places, count = self.places[input_ids], len(self.rows)
        trained = F.embedding(places.clamp(max=count - 1), self.weight)
        return torch.where((places < count).unsqueeze(-1), trained, F.embedding(input_ids, self.whole))


def train_read_rows(transformer: Any, token_ids: Any) -> None:
    """Train of a transformer's token table the rows that the data read, where lookups are all that uses the table.

    Args:
        token_ids: all of the training data's, an array of integers.
    """
    module = transformer.get_input_embeddings()
    table = module.weight
    users = sum(parameter is table for one in transformer.modules() for parameter in one.parameters(recurse=False))
    if type(module) is not nn.Embedding or users != 1 or not table.requires_grad or module.max_norm is not None:
        return
    seen = np.zeros(len(table), dtype=bool)
    seen[token_ids] = True
    read = torch.from_numpy(seen)
    if module.padding_idx is not None:
        read[module.padding_idx] = False  # it gets no gradient
    if not read.any():
        return
    rows, whole = read.nonzero().flatten(), table.detach()
    places = torch.full((len(whole),), len(rows)).index_put((rows,), torch.arange(len(rows)))
    module.weight = nn.Parameter(whole[rows])
    for name, tensor in (("whole", whole), ("rows", rows), ("places", places)):
        module.register_buffer(name, tensor, persistent=False)
    module.__class__ = PartialEmbedding
    module.register_state_dict_post_hook(_fill_in)
    module.register_load_state_dict_pre_hook(_take_out)


def _fill_in(module: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The whole table in the place of the trained rows, in a state dict that is made."""
    state[f"{prefix}weight"] = module.whole.index_copy(0, module.rows, state[f"{prefix}weight"])


def _take_out(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The trained rows in the place of the whole table, in a state dict that is loaded."""
    table = state.get(f"{prefix}weight")
    if table is not None and table.shape == module.whole.shape:  # else torch says what does not fit
        module.whole.copy_(table)
        state[f"{prefix}weight"] = table[module.rows.to(table.device)]
