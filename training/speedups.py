"""What makes training a transformer faster and leaves what it learns as it is.

On a CPU, dropout draws fewer random numbers, and attention takes fewer and faster steps than torch's, whose fused
kernels have no dropout there. On a GPU, attention masks are made without waiting for the GPU. Everywhere, gradients and
optimizer state exist only for the tokens that the data have; each process holds the other rows of the token table as
they are, with ZeRO's stage 3 too.

Modules are changed in place: `module.__class__ = X` gives a module that a model already holds the methods of a subclass
of its own class, and leaves its parameters, buffers, hooks and name in the state dict as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.loading import attention_of

_LEVELS = 1 << 16  # of a random number of 16 bits


def speed_up_training(transformer: Any, device: torch.device, token_ids: Any) -> None:
    """Make a model of the transformers library fast to train. To be called before its optimizer is made.

    Of the token table only the rows of `token_ids` (all of the training data's) are trained; None: the whole table.
    """
    for module in transformer.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    if attention_of(transformer) == "sdpa":  # else the model has its own
        choose_attention(transformer, device)
    if token_ids is not None:
        train_read_rows(transformer, token_ids)


def choose_attention(transformer: Any, device: torch.device) -> None:
    """Let a model whose attention is torch's compute it as is fastest in training on this device."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask

    ways: dict[str, Any] = {"cpu": (attention, eager_mask), "cuda": (sdpa_attention_forward, mask_without_asking)}
    if device.type in ways:
        name = f"training_on_{device.type}"  # among transformers' implementations of attention
        compute, make_mask = ways[device.type]
        AttentionInterface.register(name, compute)
        AttentionMaskInterface.register(name, make_mask)
        transformer.set_attn_implementation(name)
    if device.type == "cuda":
        # cuDNN, which torch prefers in half precision on Hopper GPUs, plans anew for each new batch size and length,
        # and batches of like sentences have many.
        torch.backends.cuda.enable_cudnn_sdp(False)


def mask_without_asking(**kwargs: Any) -> Tensor | None:
    """The mask of torch's attention, True where a query sees a key: [B, 1, T queries, T keys].

    transformers would leave it out where nothing is masked, and to know that wait in each pass for the GPU's answer.
    """
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


class FastDropout(nn.Dropout):
    """nn.Dropout that decides on each element of a CPU tensor by 16 random bits, a quarter of a random number.

    The bits come from torch's generator, which the seed sets and a resumed run continues. The probability is rounded to
    a multiple of 2^-16: 0.1 becomes 0.100006. What stays is scaled by the rounded probability.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return fast_dropout(x, self.p) if self.training else x


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """What FastDropout does in training: x of any shape -> the same shape."""
    dropped = round(p * _LEVELS)
    if not 0 < dropped < _LEVELS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as transformers' models call it (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    The scores are laid out with the queries last, [B, heads, T keys, T queries], so that the softmax over the keys runs
    over whole vectors of queries. Over the last axis torch's softmax is slow where sentences are short.

    Args:
        query, key, value: [B, heads, T, size].
        attention_mask: added to the scores, [B or 1, 1 or heads, T queries, T keys]; None: nothing is.

    Returns:
        [B, T queries, heads, size], and None where transformers expects the attention weights.
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


class PartialEmbedding(nn.Embedding):
    """An nn.Embedding of which some rows are trained and the others are frozen.

    A model learns what it would with the whole table: AdamW without weight decay never changes a row without gradients.
    State dicts hold the whole table, under its own name.

    Attributes:
        weight: the trained rows [N, D].
        table: all rows [V, D]; the trained ones as they were at first, or when last loaded.
        rows: the index in the table of each trained row [N] int64.
        positions: for each row of the table, its index among the trained ones, or N if it is frozen [V] int64.
    """

    table: Tensor
    rows: Tensor
    positions: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids of any shape [...] -> [..., D]."""
        positions, count = self.positions[input_ids], len(self.rows)
        trained = F.embedding(positions.clamp(max=count - 1), self.weight)
        return torch.where((positions < count).unsqueeze(-1), trained, F.embedding(input_ids, self.table))


def train_read_rows(transformer: Any, token_ids: Any) -> None:
    """Train only those rows of a transformer's token table that the data read, if only lookups use the table."""
    module = transformer.get_input_embeddings()
    weight = module.weight
    users = sum(parameter is weight for one in transformer.modules() for parameter in one.parameters(recurse=False))
    if type(module) is not nn.Embedding or users != 1 or not weight.requires_grad or module.max_norm is not None:
        return
    seen = np.zeros(len(weight), dtype=bool)
    seen[token_ids] = True
    read = torch.from_numpy(seen)
    if module.padding_idx is not None:
        read[module.padding_idx] = False  # it gets no gradient
    if not read.any():
        return
    rows, table = read.nonzero().flatten(), weight.detach()
    positions = torch.full((len(table),), len(rows)).index_put((rows,), torch.arange(len(rows)))
    module.weight = nn.Parameter(table[rows])
    for name, tensor in (("table", table), ("rows", rows), ("positions", positions)):
        module.register_buffer(name, tensor, persistent=False)
    module.__class__ = PartialEmbedding
    module.register_state_dict_post_hook(_insert_rows)
    module.register_load_state_dict_pre_hook(_extract_rows)


def _insert_rows(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the trained rows in a new state dict by the whole table."""
    state[f"{prefix}weight"] = module.table.index_copy(0, module.rows, state[f"{prefix}weight"])


def _extract_rows(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the whole table in a state dict that is loaded by the trained rows."""
    table = state.get(f"{prefix}weight")
    if table is not None and table.shape == module.table.shape:  # else torch says what does not fit
        module.table.copy_(table)
        state[f"{prefix}weight"] = table[module.rows.to(table.device)]
