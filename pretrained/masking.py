"""What a transformer must not read or need not compute in a pass, kept out by hooks on its modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.layout import layer_parts
from sentence_classifier.errors import InputError


class Masking:
    """The hooks of one transformer, which act during a pass through its embedding and not when it is called itself.

    Padding: attention masks keep it out of attention alone. MobileBERT also concatenates the embeddings of neighbours,
    and ConvBERT convolves hidden states and unfolds windows of them. There, too, pad positions are zeros.

    First token: where nobody reads another vector, the last layer computes no other after its attention, since nothing
    there lets positions see each other. Of a layer built as BERT's that saves three quarters of the matrix products,
    forward and backward. Layers of other kinds are computed as ever.

    Attributes:
        pad: [B, T], True at pad positions; None outside of a pass.
        hidden: [B, T], the tokens whose vectors are zeros: padding, and in training what --token_cutoff hides.
        first_only: whether only the first token's vector is read.
    """

    def __init__(self, transformer: Any) -> None:
        self.pad: Tensor | None = None
        self.hidden: Tensor | None = None
        self.first_only = False
        table = transformer.get_input_embeddings().weight
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Embedding) and module.weight is table:  # encoder-decoders have several
                shifted = transformer.config.is_encoder_decoder and name.startswith("decoder.")
                module.register_forward_hook(self._hide_later if shifted else self._hide)
            if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
                module.register_forward_pre_hook(self._mask_channels)
            if isinstance(getattr(module, "conv_out_layer", None), nn.Module):
                module.conv_out_layer.register_forward_hook(self._mask_output)
        try:
            output = layer_parts(transformer)[-1].output
        except InputError:
            return
        for module in transformer.modules():
            if getattr(module, "dense", None) is output:  # takes the attention's context, and its input to add
                module.register_forward_pre_hook(self._first_token)

    def begin(self, mask: Tensor, token_cutoff: float, first_only: bool) -> None:
        """Begin a pass; mask [B, T], True at real tokens; token_cutoff: the share of the inner tokens to hide."""
        self.pad = self.hidden = ~mask
        self.first_only = first_only
        if token_cutoff:
            inner = F.pad(F.pad(mask, (0, 1))[:, 2:], (1, 0))  # all but a sentence's first and last
            self.hidden = self.pad | (inner & (torch.rand(mask.shape, device=mask.device) < token_cutoff))

    def end(self) -> None:
        """End it."""
        self.pad = self.hidden = None

    def _hide(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]: the token table's, without positions."""
        return output if self.hidden is None else output.masked_fill(self.hidden.unsqueeze(-1), 0.0)

    def _hide_later(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]: in a decoder, which reads one special token first and then each token a position later."""
        if self.hidden is None or self.hidden is self.pad:  # no position sees the padding behind it
            return output
        return output.masked_fill(F.pad(self.hidden[:, :-1], (1, 0)).unsqueeze(-1), 0.0)

    def _mask_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """output [B, T, D]."""
        return output if self.pad is None else output.masked_fill(self.pad.unsqueeze(-1), 0.0)

    def _mask_channels(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """inputs[0] [B, D, T]."""
        x = inputs[0]
        return inputs if self.pad is None else (x.masked_fill(self.pad.unsqueeze(1), 0.0), *inputs[1:])

    def _first_token(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """inputs [B, T, D]."""
        return inputs if self.pad is None or not self.first_only else tuple(x[:, :1] for x in inputs)
