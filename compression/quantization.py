"""int8 in PyTorch: dynamic, quantization-aware training (QAT), graph mode on torch.export, and DiffQ.

A *product* is a module that multiplies by a matrix: a Linear, GPT-2's Conv1D (a Linear whose weight lies transposed)
or a convolution, which is a Linear over windows. A product turns into its fake-quantized or its int8 form in place
(its class changes), so that names, hooks and parameters stay what they were.

Weights are rounded to -64..64 with a scale for each output channel, activations to 0..255 with one scale and zero
point for the whole tensor. Processors without VNNI add pairs of products in 16 bits, which holds 2 * 255 * 64 and not
2 * 255 * 127, so that a bit has to go. PyTorch takes it from the activations, where it costs most: the last hidden
states of MiniLM-L6 on Snips were off by 13 % with weights of 7 bits, and by 24 % with activations of 7.

--enable_qat and --enable_qat_fx train the same, by fake quantization of the modules: a graph of torch.export holds for
one mode, training or evaluation, and specializes on what training changes. Graph mode is a way of evaluation: the int8
model as one exported graph, compiled by inductor, with the same int8 kernels as nodes of their own. (Inductor's own
int8 pattern, which torchao's pt2e leads to, ends in oneDNN's kernels, half as fast without VNNI; and where torchao is
installed, transformers imports it at every start.)
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Classifier, GaussianDecoder, WordEmbedding
from sentence_classifier.errors import InputError
from util import Checkpoint

logger = logging.getLogger(__name__)

WEIGHT_MAX = 64  # weights are rounded to -64..64, see above
ACTIVATION_MAX = 255
MOMENTUM = 0.05  # of the moving average of the activations' ranges: of some twenty batches
BITS_LR = 1e-2  # DiffQ's own, 1e-3, moves the bits by less than one in the few hundred steps that runs here often have
DIFFQ_SUFFIX = "_diffq"  # of the parameters that DiffQ adds

# --------------------------------------------------------------------------------------------------------- products


def kind_of(module: nn.Module) -> str | None:
    """"linear", "transposed" (GPT-2's Conv1D) or "convolution"; None for what is no product or none we can turn."""
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
    """All weights of matrices and convolutions by name, those outside of products too.

    Args:
        tables: embedding tables as well.

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
    """A product that computes in fp32 what its int8 form will: input and weight are rounded to their grids.

    The gradient passes the rounding unchanged, and is 0 where a value was clipped (Jacob et al. 2018, arXiv
    1712.05877). In training the range of the input follows the batches; in evaluation it stands.
    """

    kind: str
    low: Tensor
    high: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def turn(cls, module: nn.Module) -> None:
        """Turn a product into this form. The ranges are no part of its state dict."""
        module.kind = kind_of(module)  # type: ignore[assignment]
        module.__class__ = cls
        for name in ("low", "high"):
            module.register_buffer(name, torch.tensor(float("nan")), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] (of a convolution [B, inputs, T]) -> [..., outputs] ([B, outputs, T])."""
        x = x.float()  # in autocast the product itself is computed in bfloat16
        # Gradient checkpointing computes a layer again in the backward pass, on a batch that has been seen.
        if self.training and torch._C._current_graph_task_id() == -1:
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
    """A product whose weight is int8 and whose input is rounded to 8 bits as it comes; the output is fp32."""

    kind: str
    parts: list[Callable[[Tensor], Tensor]]  # one for each group of a convolution: [..., inputs] -> [..., outputs]
    size: int  # outputs
    geometry: tuple[int, int, list[int]]  # of a convolution: width, stride, zeros at both ends

    @classmethod
    def turn(cls, module: nn.Module, entry: dict[str, Any] | None = None) -> None:
        """Turn a product on the CPU into this form.

        Args:
            entry: what `scales_of` says of it; None: the input's range is taken from each input (dynamic).
        """
        kind, weight, bias = kind_of(module), module.weight, module.bias
        assert kind and isinstance(weight, Tensor)
        scales = weight_scale(module) if entry is None else entry["weight_scale"]
        groups = 1
        if isinstance(module, nn.Conv1d):
            groups, padding = module.groups, module._reversed_padding_repeated_twice
            module.geometry = module.kernel_size[0], module.stride[0], padding  # type: ignore[assignment]
            weight = weight.transpose(1, 2).flatten(1)  # [outputs, width * inputs], as windows lie
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
        """As forward, but that a convolution's outputs lie [B, T, outputs]."""
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
        """The shape of `multiply`'s answer."""
        if self.kind != "convolution":
            return [*x.shape[:-1], self.size]
        width, stride, padding = self.geometry
        return [x.shape[0], (x.shape[2] + sum(padding) - width) // stride + 1, self.size]


def _kernel(matrix: Tensor, bias: Tensor | None, scales: Tensor,
            entry: dict[str, Any] | None) -> Callable[[Tensor], Tensor]:
    """Multiplication by an int8 matrix [outputs, inputs]: [..., inputs] -> [..., outputs].

    FBGEMM's kernels were the fastest here, twice as fast as oneDNN's without VNNI; "x86" chooses between the two, and
    only FBGEMM's take a fixed scale and answer in fp32.
    """
    known = torch.backends.quantized.supported_engines
    engine = "fbgemm" if entry else "x86" if "x86" in known else "qnnpack"
    if engine not in known:
        raise InputError(f"this build of PyTorch has no int8 kernels for fixed scales ({engine}) on this processor; "
                         "evaluate without the flag, or through ONNX Runtime.")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # int8 tensors of this kind are deprecated, their kernels have no heir yet
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantized = torch.quantize_per_channel(matrix, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
    finally:
        torch.backends.quantized.engine = before  # type: ignore[assignment]
    if entry is None:
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return lambda x: multiply(x, entry["scale"], entry["zero_point"], packed)


# --------------------------------------------------------------------------------------------------------- training


class Quantization:
    """What the training loop asks of a way of quantization, made from a model, its optimizer and flags."""

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of the quantization: plain data and tensors."""
        return {}

    def penalty(self) -> Tensor | float:
        """Added to the mean loss of an example."""
        return 0.0

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of the model's state dict that an fp32 model has."""
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """For --resume: what is no parameter of the model."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From --resume."""


class FakeQuantization(Quantization):
    """QAT: all products of the model in training are fake-quantized."""

    def __init__(self, model: Classifier, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
        matrix_weights(model)
        self.way = "qat_fx" if args.enable_qat_fx else "qat"
        self.products = products(model)
        for module in self.products.values():
            FakeProduct.turn(module)
        model.register_forward_pre_hook(self._as_the_model)

    def _as_the_model(self, model: nn.Module, inputs: Any) -> None:
        for module in self.products.values():  # a frozen transformer's ranges have to be found in training, too
            module.training = model.training

    def metadata(self) -> dict[str, Any]:
        scales = {}
        for name, module in self.products.items():
            assert isinstance(module, FakeProduct)
            if not module.low.isnan():  # else no forward pass comes by
                scale, zero_point = module.input_grid()
                scales[name] = {"weight_scale": weight_scale(module).cpu(), "scale": scale.item(),
                                "zero_point": int(zero_point)}
        return {"way": self.way, "scales": scales}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.stack((module.low, module.high)) for name, module in self.products.items()}  # type: ignore

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, module in self.products.items():
            assert isinstance(module, FakeProduct)
            module.low.copy_(state[name][0])
            module.high.copy_(state[name][1])


class DiffQuantization(Quantization):
    """DiffQ: noise in place of rounding, and a learned number of bits for each group of weights.

    Défossez, Adi and Synnaeve 2021 (arXiv 2104.09987). The authors' package is used, whose licence is CC BY-NC 4.0: no
    commercial use. What it learns is stored as plain tensors and read without the package. The model gets a parameter
    beside each table and matrix, and the optimizer a group of these.

    Raises:
        InputError: the package is not installed.
    """

    def __init__(self, model: Classifier, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
        try:
            from diffq import DiffQuantizer
        except ImportError:
            raise InputError("--enable_diffq needs the package diffq, whose licence is CC BY-NC 4.0 (no commercial "
                             "use): pip install diffq==0.2.4, if that suits you.") from None
        matrix_weights(model)
        chosen = {name: weight for name, weight in matrix_weights(model, tables=True).items() if weight.requires_grad}
        if not chosen:
            raise InputError("--enable_diffq: all matrices are frozen, and nothing says how many bits they need.")
        self.names = {id(weight): name for name, weight in chosen.items()}
        everything = model.named_parameters(remove_duplicate=False)
        others = [name for name, weight in everything if id(weight) not in self.names]
        # A group must divide every tensor.
        size = next(size for size in (8, 4, 2, 1) if all(weight.numel() % size == 0 for weight in chosen.values()))
        self.weight = args.diffq_penalty
        self.quantizer = DiffQuantizer(model, min_size=0, group_size=size, exclude=others, suffix=DIFFQ_SUFFIX)
        self.quantizer.setup_optimizer(optimizer, lr=BITS_LR)

    def penalty(self) -> Tensor | float:
        return self.weight * self.quantizer.model_size() if self.weight else 0.0

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if not name.endswith(DIFFQ_SUFFIX)}

    @torch.no_grad()
    def metadata(self) -> dict[str, Any]:
        tensors = {}
        for own in self.quantizer._qparams:
            if own.other is None:
                levels, (low, high), bits = self.quantizer._quantize_param(own)
                tensors[self.names[id(own.param)]] = {"levels": levels.cpu(), "bits": bits.cpu(), "low": low,
                                                      "high": high}
        return {"way": "diffq", "size_mb": self.quantizer.true_model_size(), "tensors": tensors}


def start_quantization(model: Classifier, optimizer: torch.optim.Optimizer,
                       args: argparse.Namespace) -> Quantization | None:
    """Prepare a model for training in the way that the flags ask for, if any."""
    if args.enable_diffq:
        return DiffQuantization(model, optimizer, args)
    if args.enable_qat or args.enable_qat_fx:
        return FakeQuantization(model, optimizer, args)
    return None


# ------------------------------------------------------------------------------------------------------- evaluation


def scales_of(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The scales of each product of a model trained with --enable_qat or --enable_qat_fx, by module name.

    Returns:
        weight_scale [output channels] float32: weights are round(w / weight_scale), in -64..64, zero point 0, the
        channels along axis 0 of the weight (along 1 for GPT-2's Conv1D, see `channel_axis`); scale and zero_point:
        the product's input is round(x / scale) + zero_point, clipped to 0..255 (uint8). A product that no forward
        pass comes by is left out.

    Raises:
        InputError: the checkpoint was not trained so.
    """
    return _trained_in(checkpoint, "qat", "qat_fx")["scales"]


def _trained_in(checkpoint: Checkpoint, *ways: str) -> dict[str, Any]:
    trained = checkpoint.quantization or {"way": None}
    if trained["way"] not in ways:
        said = f", but with --enable_{trained['way']}" if trained["way"] else ""
        raise InputError(f"the model was not trained with {' or '.join(f'--enable_{way}' for way in ways)}{said}.")
    return trained


def quantize(model: Classifier, way: str, checkpoint: Checkpoint, batch_size: int) -> Any:
    """A trained model with the weights that a way of quantization gives it, for evaluation on the CPU.

    Args:
        model: as load_classifier made it, in evaluation mode; it is changed.
        way: "dqm", "qat", "qat_fx" or "diffq".
        batch_size: of the batches to come; matters in graph mode.

    Returns:
        What takes (input_ids, attention_mask) as the model does.

    Raises:
        InputError: the checkpoint was trained in another way, or the model has no matrices.
    """
    weights = matrix_weights(model)
    if way == "diffq":
        restore_diffq(model, checkpoint)
        return model
    found = products(model)
    entries: dict[str, Any] = dict.fromkeys(found) if way == "dqm" else scales_of(checkpoint)
    before = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    total = sum(weight.numel() for weight in weights.values())
    covered = sum(weights[f"{name}.weight"].numel() for name in entries)
    for name, entry in entries.items():
        Int8Product.turn(found[name], entry)
    logger.info("[int8] %.1f %% of the %d weights of matrices and convolutions, in %d products; model %.2f MB, in fp32 "
                "%.2f MB", 100 * covered / total, total, len(entries), (before - 3 * covered) / 1e6, before / 1e6)
    if way == "qat_fx":
        return CompiledGraph(model, batch_size, checkpoint.run.encoding.n_ctx)
    return model


def restore_diffq(model: Classifier, checkpoint: Checkpoint) -> None:
    """Put the weights in that DiffQ's levels and bits stand for: low + (high - low) level / (2^bits - 1).

    Raises:
        InputError: the model was not trained with --enable_diffq.
    """
    trained = _trained_in(checkpoint, "diffq")
    own = dict(model.named_parameters(remove_duplicate=False))  # a tied table has several names
    bits = torch.cat([entry["bits"] for entry in trained["tensors"].values()]).float()
    with torch.no_grad():
        for name, entry in trained["tensors"].items():
            unit = (entry["high"] - entry["low"]) / (2.0 ** entry["bits"].float().unsqueeze(1) - 1.0)
            own[name].copy_((entry["low"] + unit * entry["levels"].float()).view_as(own[name]))
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    logger.info("[DiffQ] %.3f MB compressed, in fp32 %.3f MB; %.2f bits a weight on average, %.1f %% of the groups "
                "with 8 or fewer", trained["size_mb"], size / 2**20, bits.mean(), 100 * (bits <= 8).float().mean())


# ------------------------------------------------------------------------------------------------------- graph mode

SHORTEST = 4  # positions: shorter sentences are padded, since graphs specialize on sizes such as 1


class CompiledGraph:
    """A classifier with int8 products, exported as one graph and compiled by inductor; called as the model is.

    The products stay calls of the same int8 kernels; what lies between them is fused. Without a C++ compiler the graph
    runs uncompiled, and the log says so.

    Args:
        model: with int8 products, in evaluation mode.
        batch_size: of the largest batch to come.
        n_ctx: the longest sentence to come.
    """

    def __init__(self, model: Classifier, batch_size: int, n_ctx: int) -> None:
        for module in model.modules():
            if isinstance(module, Int8Product):
                _PRODUCTS.append(copy.copy(module))
                module.multiply = functools.partial(_operator(), place=len(_PRODUCTS) - 1)  # type: ignore
        self.fewest = min(2, batch_size)
        n_ctx = max(n_ctx, SHORTEST + 1)
        ids = torch.full((batch_size, n_ctx), 3)
        example = (ids, torch.ones_like(ids, dtype=torch.bool))
        length = torch.export.Dim("length", min=SHORTEST, max=n_ctx)
        sizes = {1: length} if batch_size == 1 else {0: torch.export.Dim("batch", min=2, max=batch_size), 1: length}
        begin = time.perf_counter()
        with torch.no_grad():
            exported: Any = torch.export.export(model, example, dynamic_shapes=(sizes, sizes)).module()
        between = time.perf_counter()
        self.graph: Any = torch.compile(exported, dynamic=True)
        try:
            with torch.inference_mode():  # as evaluation runs; of two lengths, so that the second is not compiled for
                for end in (n_ctx, max(SHORTEST, n_ctx // 2)):
                    self.graph(*(tensor[:, :end] for tensor in example))
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or one that fails
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("[graph] not compiled, and so slower (%s)", reason)
            self.graph = exported
        logger.info("[graph] exported in %.1f s, compiled in %.1f s", between - begin, time.perf_counter() - between)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids [B, T], attention_mask [B, T] bool -> logits [B, C]."""
        count, length = input_ids.shape
        more = (0, max(0, SHORTEST - length), 0, max(0, self.fewest - count))
        if any(more):  # an empty sentence would be 0 / 0
            input_ids = F.pad(input_ids, more)
            attention_mask = F.pad(attention_mask, more)
            attention_mask[count:, 0] = True
        return self.graph(input_ids, attention_mask)[:count]


_PRODUCTS: list[Int8Product] = []  # what the operator's numbers stand for, as long as the process lives


@functools.cache
def _operator() -> Callable[..., Tensor]:
    """An int8 product as a call that stands in an exported graph as one node."""

    @torch.library.custom_op("toolkit::int8_product", mutates_args=())
    def int8_product(x: Tensor, place: int) -> Tensor:
        return _PRODUCTS[place].multiply(x)

    @int8_product.register_fake
    def _(x: Tensor, place: int) -> Tensor:
        return x.new_empty(_PRODUCTS[place].shape(x))

    return int8_product
