"""Products: the modules of a model that multiply by a matrix, in fp32, fake-quantized, and in int8.

A product is a Linear, GPT-2's Conv1D (a Linear with a transposed weight), or a convolution, which is a Linear over
windows. It becomes fake-quantized or int8 in place (its class changes), so that names, hooks and parameters stay the
same.

Weights are rounded to -64..64 with a scale for each output channel, activations to 0..255 with one scale and zero
point for the whole tensor. Processors without VNNI add pairs of products in 16 bits. These hold 2 * 255 * 64 but not
2 * 255 * 127, so one bit has to go. PyTorch's default takes it from the activations, where it costs most: the last
hidden states of MiniLM-L6 on Snips were off by 13 % with 7-bit weights, and by 24 % with 7-bit activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GaussianDecoder, WordEmbedding
from sentence_classifier.errors import InputError

WEIGHT_MAX = 64  # weights are rounded to -64..64, see above
ACTIVATION_MAX = 255
MOMENTUM = 0.05  # of the moving average of the activations' ranges, which covers about twenty batches

# --------------------------------------------------------------------------------------------------------- products


def kind_of(module: nn.Module) -> str | None:
    """"linear", "transposed" (GPT-2's Conv1D) or "convolution"; None for other modules and unsupported convolutions."""
    if isinstance(module, FakeProduct | Int8Product):
        return module.kind
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D":  # by name: GloVe models do without importing transformers
        return "transposed"
    # A depthwise convolution has a row and no matrix for each channel.
    if (type(module) is nn.Conv1d and module.in_channels > module.groups and module.padding_mode == "zeros"
            and module.dilation == (1,)):
        return "convolution"
    return None


def products(model: nn.Module) -> dict[str, nn.Module]:
    """The model's products by name."""
    return {name: module for name, module in model.named_modules() if kind_of(module)}


def matrix_weights(model: nn.Module, tables: bool = False) -> dict[str, Tensor]:
    """All weights of matrices and convolutions by name, of modules that are no products, too; with tables if asked.

    Raises:
        InputError: there are no matrices.
    """
    without = (GaussianDecoder,) if tables else (GaussianDecoder, nn.Embedding, WordEmbedding)
    found = {f"{prefix}.{name}": weight for prefix, module in model.named_modules() if not isinstance(module, without)
             for name, weight in module.named_parameters(recurse=False) if weight.ndim > 1 and name != "bias"}
    if not found:
        raise InputError("this model has no matrices to quantize: Gaussian naive Bayes on word vectors is means, "
                         "variances and a table.")
    return found


def channel_axis(module: nn.Module) -> int:
    """The axis of a product's weight that counts its output channels."""
    return 1 if kind_of(module) == "transposed" else 0


def weight_scale(module: nn.Module) -> Tensor:
    """A product's weight scales: [output channels]."""
    weight, axis = module.weight, channel_axis(module)
    assert isinstance(weight, Tensor)
    return weight.detach().abs().transpose(0, axis).flatten(1).amax(1).float().clamp(min=1e-8) / WEIGHT_MAX


# ---------------------------------------------------------------------------------------------------- fake and int8


class FakeProduct(nn.Module):
    """A product that computes in fp32 what its int8 form will compute: input and weight are rounded to their grids.

    The gradient passes the rounding unchanged, and is 0 where a value was clipped (Jacob et al. 2018, arXiv
    1712.05877). The range of the input follows the batches in training and is fixed in evaluation.
    """

    kind: str
    low: Tensor
    high: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def turn(cls, module: Any) -> Self:
        """Turn a product into this form and return it. Its state dict does not hold the ranges."""
        module.kind = kind_of(module)
        module.__class__ = cls
        for name in ("low", "high"):
            module.register_buffer(name, torch.tensor(float("nan")), persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] (of a convolution [B, inputs, T]) -> [..., outputs] ([B, outputs, T])."""
        x = x.float()  # in autocast the product itself is computed in bfloat16
        if self.training and not in_backward_pass():  # gradient checkpointing computes a layer twice
            self._observe(x.detach())
        scale, zero_point = self.input_grid()
        x = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, ACTIVATION_MAX)
        scales = weight_scale(self)
        weight = torch.fake_quantize_per_channel_affine(
            self.weight.float(), scales, torch.zeros_like(scales, dtype=torch.int32), channel_axis(self),
            -WEIGHT_MAX, WEIGHT_MAX)
        if self.kind == "convolution":
            settings: Any = self
            return F.conv1d(x, weight, self.bias, settings.stride, settings.padding, 1, settings.groups)
        return F.linear(x, weight.t() if self.kind == "transposed" else weight, self.bias)

    def _observe(self, x: Tensor) -> None:
        for own, seen in ((self.low, x.amin()), (self.high, x.amax())):
            own.copy_(torch.where(own.isnan(), seen, own.lerp(seen, MOMENTUM)))

    def input_grid(self) -> tuple[Tensor, Tensor]:
        """The input's scale and zero point; 0 lies on the grid."""
        low, high = self.low.clamp(max=0.0), self.high.clamp(min=0.0)
        scale = ((high - low) / ACTIVATION_MAX).clamp(min=1e-8)
        return scale, (-low / scale).round().clamp(0, ACTIVATION_MAX).int()


class Int8Product(nn.Module):
    """A product with an int8 weight, whose fp32 input is rounded to 8 bits, and whose output is fp32."""

    kind: str
    parts: list[Callable[[Tensor], Tensor]]  # one for each group of a convolution: [..., inputs] -> [..., outputs]
    size: int  # outputs
    geometry: tuple[int, int, list[int]]  # of a convolution: width, stride, zeros at both ends

    @classmethod
    def turn(cls, module: nn.Module, entry: dict[str, Any] | None = None) -> None:
        """Turn a product on the CPU into this form by its scales; None: each input's range is measured (dynamic)."""
        kind, weight, bias = kind_of(module), module.weight, module.bias
        assert kind and isinstance(weight, Tensor)
        scales = weight_scale(module) if entry is None else entry["weight_scale"]
        groups = 1
        if isinstance(module, nn.Conv1d):
            groups, width = module.groups, module.kernel_size[0]
            named = {"same": width - 1, "valid": 0}  # zeros at both ends together
            zeros = named[module.padding] if isinstance(module.padding, str) else 2 * module.padding[0]
            padding = [zeros // 2, zeros - zeros // 2]
            module.geometry = width, module.stride[0], padding  # type: ignore[assignment]
            weight = weight.transpose(1, 2).flatten(1)  # [outputs, width * inputs], in the order of windows
        matrix = (weight.t() if kind == "transposed" else weight).detach().float().contiguous()
        biases = bias.detach().float().chunk(groups) if isinstance(bias, Tensor) else [None] * groups
        pieces = list(zip(matrix.chunk(groups), biases, scales.chunk(groups), strict=True))
        module.__class__ = cls
        module.kind = kind  # type: ignore[assignment]
        module.parts = [_kernel(*piece, entry) for piece in pieces]  # type: ignore[assignment]
        module.size = len(matrix)  # type: ignore[assignment]
        module.register_parameter("weight", None)
        module.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] (of a convolution [B, inputs, T]) -> [..., outputs] ([B, outputs, T])."""
        outputs = self.multiply(x)
        return outputs.transpose(1, 2) if self.kind == "convolution" else outputs

    def multiply(self, x: Tensor) -> Tensor:
        """As forward, except that a convolution's outputs are [B, T, outputs]."""
        if self.kind != "convolution":
            return self.parts[0](x.contiguous())
        width, stride, padding = self.geometry
        outputs = []
        for group, part in zip(x.transpose(1, 2).chunk(len(self.parts), dim=2), self.parts, strict=True):
            if width > 1 or stride > 1:  # [B, T, inputs] -> windows [B, T', width * inputs]
                group = F.pad(group, (0, 0, *padding)).unfold(1, width, stride).transpose(2, 3).flatten(2)
            outputs.append(part(group.contiguous()))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def shape(self, x: Tensor) -> list[Any]:
        """The shape that `multiply` returns."""
        if self.kind != "convolution":
            return [*x.shape[:-1], self.size]
        width, stride, padding = self.geometry
        return [x.shape[0], (x.shape[2] + sum(padding) - width) // stride + 1, self.size]


def _kernel(matrix: Tensor, bias: Tensor | None, scales: Tensor,
            entry: dict[str, Any] | None) -> Callable[[Tensor], Tensor]:
    """Multiplication by an int8 matrix [outputs, inputs]: [..., inputs] -> [..., outputs].

    FBGEMM's kernels are twice as fast as oneDNN's without VNNI. "x86" chooses between the two; only FBGEMM's take a
    fixed scale and return fp32.
    """
    known = torch.backends.quantized.supported_engines
    engine = "fbgemm" if entry else "x86" if "x86" in known else "qnnpack"
    if engine not in known:
        raise InputError(f"this build of PyTorch has no int8 kernels for fixed scales ({engine}) on this processor; "
                         "evaluate without the flag, or through ONNX Runtime.")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(action="ignore"):  # such tensors are deprecated, without a successor
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantized = torch.quantize_per_channel(matrix, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
    finally:
        torch.backends.quantized.engine = before  # type: ignore[assignment]
    if entry is None:
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return lambda x: multiply(x, entry["scale"], entry["zero_point"], packed)


def in_backward_pass() -> bool:
    """Whether autograd computes gradients right now. torch has no public name for this."""
    return torch._C._current_graph_task_id() != -1
