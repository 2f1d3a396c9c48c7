"""Dropout with fewer random numbers, for training on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16  # of a random number of 16 bits


class FastDropout(nn.Dropout):
    """nn.Dropout that lets 16 random bits decide on an element of a CPU tensor, in place of a number of its own.

    torch's generator, which the seed sets and a resumed run goes on with, is asked for a quarter as many numbers. The
    probability is rounded to a multiple of 2^-16: 0.1 becomes 0.100006, by which what stays is scaled, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x and the answer of any shape."""
        dropped = round(self.p * _LEVELS)
        if not (self.training and 0 < dropped < _LEVELS and x.device.type == "cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
        return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def quicken_dropout(model: nn.Module) -> None:
    """Make every nn.Dropout within a model a FastDropout."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
