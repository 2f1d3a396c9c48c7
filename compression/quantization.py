"""int8 in PyTorch: dynamic, quantization-aware training (QAT), graph mode on torch.export, and DiffQ.

--enable_qat and --enable_qat_fx train alike, by fake quantization of the model's products (see products.py). (A graph
of torch.export is for one mode, training or evaluation, and specializes on what training changes.) Graph mode concerns
evaluation: the int8 model is exported as one graph with the same int8 kernels as nodes, and inductor compiles it.
(Inductor's own int8 pattern, which torchao's pt2e leads to, ends in oneDNN's kernels, half as fast without VNNI. Where
torchao is installed, transformers imports it at every start.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.products import FakeProduct, Int8Product, matrix_weights, products, weight_scale
from model import Classifier
from sentence_classifier.errors import InputError
from util import Checkpoint

logger = logging.getLogger(__name__)

BITS_LR = 1e-2  # DiffQ's default, 1e-3, moves the bits by less than one in a run of a few hundred steps
DIFFQ_SUFFIX = "_diffq"  # of the parameters that DiffQ adds

# --------------------------------------------------------------------------------------------------------- training


class Quantization:
    """Quantization-aware training, as the training loop sees it; made from a model, its optimizer and the flags."""

    def metadata(self) -> dict[str, Any]:
        """A checkpoint's entry "quantization": plain data and tensors."""
        return {}

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the weights do not change, so that they are rounded once."""
        return contextlib.nullcontext()

    def penalty(self) -> Tensor | float:
        """A term added to the mean loss of an example."""
        return 0.0

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of the model's state dict that an fp32 model has."""
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """For --resume: tensors that are no parameters of the model."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From --resume."""


class FakeQuantization(Quantization):
    """QAT: all products of the model that is trained are fake-quantized."""

    def __init__(self, model: Classifier, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
        matrix_weights(model)
        self.int8_mode = "qat_fx" if args.enable_qat_fx else "qat"
        self.products = {name: FakeProduct.turn(module) for name, module in products(model).items()}
        model.register_forward_pre_hook(self._follow_mode)

    def _follow_mode(self, model: nn.Module, inputs: Any) -> None:
        for module in self.products.values():  # training finds the ranges of a frozen transformer, too
            module.training = model.training

    def metadata(self) -> dict[str, Any]:
        scales = {}
        for name, module in self.products.items():
            if not module.low.isnan():  # else no forward pass uses it
                scale, zero_point = module.input_grid()
                scales[name] = {"weight_scale": weight_scale(module).cpu(), "scale": scale.item(),
                                "zero_point": int(zero_point)}
        return {"way": self.int8_mode, "scales": scales}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.stack((module.low, module.high)) for name, module in self.products.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, module in self.products.items():
            module.low.copy_(state[name][0])
            module.high.copy_(state[name][1])


class DiffQuantization(Quantization):
    """DiffQ: noise in place of rounding, and a learned number of bits for each group of weights.

    Défossez, Adi and Synnaeve 2021 (arXiv 2104.09987). The authors' package does it, whose licence, CC BY-NC 4.0,
    excludes commercial use. Checkpoints hold plain tensors, which are read without the package. The model gets a
    parameter beside each table and matrix, and the optimizer a group of these.

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

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad(), self.quantizer.enter_quantize():
            self.quantizer.quantize = lambda: None  # which the package calls for every batch
            try:
                yield
            finally:
                del self.quantizer.quantize

    def penalty(self) -> Tensor | float:
        return self.weight * self.quantizer.model_size() if self.weight else 0.0

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if not name.endswith(DIFFQ_SUFFIX)}

    @torch.no_grad()
    def metadata(self) -> dict[str, Any]:
        tensors = {self.names[id(weight)]: {"levels": levels.cpu(), "bits": bits.cpu(), "low": low, "high": high}
                   for weight, levels, bits, low, high in diffq_levels(self.quantizer)}
        return {"way": "diffq", "size_mb": self.quantizer.true_model_size(), "tensors": tensors}


def diffq_levels(quantizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, float, float]]:
    """Each weight of a DiffQuantizer: the weight, its levels, the bits of its groups, the lowest and highest value.

    The package's public names give these only together with a class object, which no checkpoint may hold.
    """
    for own in quantizer._qparams:
        if own.other is None:  # a tied weight counts once
            levels, (low, high), bits = quantizer._quantize_param(own)
            yield own.param, levels, bits, low, high


def start_quantization(model: Classifier, optimizer: torch.optim.Optimizer,
                       args: argparse.Namespace) -> Quantization | None:
    """Prepare a model for the quantization-aware training that the flags ask for, if any."""
    if args.enable_diffq:
        return DiffQuantization(model, optimizer, args)
    if args.enable_qat or args.enable_qat_fx:
        return FakeQuantization(model, optimizer, args)
    return None


# ------------------------------------------------------------------------------------------------------- evaluation


def scales_of(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The scales of each product of a model trained with --enable_qat or --enable_qat_fx, by module name.

    Returns:
        weight_scale [output channels] float32: weights are round(w / weight_scale), in -64..64, with zero point 0; the
        channels lie along axis 0 of the weight (1 for GPT-2's Conv1D, see `channel_axis`). scale and zero_point: the
        product's input is round(x / scale) + zero_point, clipped to 0..255 (uint8). A product that no forward pass
        uses is left out.

    Raises:
        InputError: the checkpoint was trained without these flags.
    """
    return _trained_in(checkpoint, "qat", "qat_fx")["scales"]


def _trained_in(checkpoint: Checkpoint, *int8_modes: str) -> dict[str, Any]:
    trained = checkpoint.quantization or {"way": None}
    if trained["way"] not in int8_modes:
        other = f", but with --enable_{trained['way']}" if trained["way"] else ""
        flags = " or ".join(f"--enable_{int8_mode}" for int8_mode in int8_modes)
        raise InputError(f"the model was not trained with {flags}{other}.")
    return trained


def quantize(model: Classifier, int8_mode: str, checkpoint: Checkpoint, batch_size: int) -> Any:
    """A trained model in int8 (in DiffQ's bits: in fp32, with rounded weights), for evaluation on the CPU.

    Args:
        model: as load_classifier made it, in evaluation mode; it is changed.
        int8_mode: "dqm", "qat", "qat_fx" (which returns a CompiledGraph) or "diffq".
        batch_size: of the largest batch to come; graph mode needs it.

    Raises:
        InputError: the checkpoint was trained in another mode, or the model has no matrices.
    """
    weights = matrix_weights(model)
    if int8_mode == "diffq":
        restore_diffq(model, checkpoint)
        return model
    found = products(model)
    entries: dict[str, Any] = dict.fromkeys(found) if int8_mode == "dqm" else scales_of(checkpoint)
    before = sum(value.nbytes for value in model.state_dict().values())
    total = sum(weight.numel() for weight in weights.values())
    covered = sum(weights[f"{name}.weight"].numel() for name in entries)
    for name, entry in entries.items():
        Int8Product.turn(found[name], entry)
    logger.info("[int8] %.1f %% of the %d weights of matrices and convolutions, in %d products; model %.2f MB, in fp32 "
                "%.2f MB", 100 * covered / total, total, len(entries), (before - 3 * covered) / 1e6, before / 1e6)
    if int8_mode == "qat_fx":
        return CompiledGraph(model, batch_size, checkpoint.run.encoding.n_ctx)
    return model


def restore_diffq(model: Classifier, checkpoint: Checkpoint) -> None:
    """Set the weights to those that DiffQ's levels and bits stand for: low + (high - low) level / (2^bits - 1).

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
    size = sum(value.nbytes for value in model.parameters())
    logger.info("[DiffQ] %.3f MB compressed, in fp32 %.3f MB; %.2f bits a weight on average, %.1f %% of the groups "
                "with 8 or fewer", trained["size_mb"], size / 2**20, bits.mean(), 100 * (bits <= 8).float().mean())


# ------------------------------------------------------------------------------------------------------- graph mode

SHORTEST = 4  # positions; shorter sentences are padded, since graphs specialize on sizes such as 1


class CompiledGraph:
    """A classifier with int8 products, exported as one graph and compiled by inductor; called as the model is.

    The products remain calls of the same int8 kernels; inductor fuses the operators between them. Without a C++
    compiler the graph runs uncompiled, and the log says so.

    Args:
        model: with int8 products, in evaluation mode; not changed.
        batch_size: of the largest batch to come.
        n_ctx: tokens of the longest sentence to come.
    """

    def __init__(self, model: Classifier, batch_size: int, n_ctx: int) -> None:
        replaced = [module for module in model.modules() if isinstance(module, Int8Product)]
        self.products = [copy.copy(module) for module in replaced]  # what the graph calls
        for module, product in zip(replaced, self.products, strict=True):
            number = next(_NUMBERS)
            _PRODUCTS[number] = product
            module.multiply = functools.partial(_operator(), place=number)  # type: ignore[method-assign]
        self.fewest = min(2, batch_size)
        batch_size = batch_size if batch_size == 1 else max(3, batch_size)  # a dynamic size has a range
        n_ctx = max(n_ctx, SHORTEST + 1)
        ids = torch.full((batch_size, n_ctx), 3)
        example = (ids, torch.ones_like(ids, dtype=torch.bool))
        length = torch.export.Dim("length", min=SHORTEST, max=n_ctx)
        sizes = {1: length} if batch_size == 1 else {0: torch.export.Dim("batch", min=2, max=batch_size), 1: length}
        begin = time.perf_counter()
        with torch.no_grad():
            exported: Any = torch.export.export(model, example, dynamic_shapes=(sizes, sizes)).module()
        for module in replaced:
            del module.multiply  # the class's own again
        between = time.perf_counter()
        self.graph: Any = torch.compile(exported, dynamic=True)
        try:
            with torch.inference_mode():  # as in evaluation; two lengths, so that the second needs no compilation
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


# The operator names a product by its number, in the order of making: inductor keeps what it compiled for such numbers
# on disk. Each CompiledGraph keeps its own products alive.
_NUMBERS = itertools.count()
_PRODUCTS: weakref.WeakValueDictionary[int, Int8Product] = weakref.WeakValueDictionary()


@functools.cache
def _operator() -> Callable[..., Tensor]:
    """An int8 product as a call that an exported graph holds as one node."""

    @torch.library.custom_op("toolkit::int8_product", mutates_args=())
    def int8_product(x: Tensor, place: int) -> Tensor:
        return _PRODUCTS[place].multiply(x)

    @int8_product.register_fake
    def _(x: Tensor, place: int) -> Tensor:
        return x.new_empty(_PRODUCTS[place].shape(x))

    return int8_product
