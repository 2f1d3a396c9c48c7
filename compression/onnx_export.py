"""From a trained classifier to .onnx files: export, optimize, quantize, check, write; each step is a function.

A file gets its final name only after its graph agrees with PyTorch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.onnx_graph import fuse, quiet, run_graph, simplify
from compression.onnx_int8 import choose_int8, trained_scales
from dataset import EncodedData, check_same_data, pad
from model import Classifier, MaxOverTimeConv, WordEmbedding
from pretrained.loading import attention_of, can_choose_attention
from sentence_classifier.classifier import INPUTS, METADATA_KEY, ONNX_FORMAT, OUTPUT, VOCABULARY_KEY
from sentence_classifier.decisions import ONE_LABEL, Decision, differing
from sentence_classifier.errors import InputError
from util import Checkpoint, RunInfo, atomic_write

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 20  # the first one with GELU as an operator
SIZE_LIMIT = 2_000_000_000  # bytes; protobuf ends at 2 GiB
TOLERANCE = 1e-4  # on logits; relative if they are larger than 1, as a Gaussian's are
# Elements of a table of convolutions, each a byte: the file holds it, each start reads it, and the export holds several
# at once. With the shipped config 26,000 words have room; 400,000 would need two gigabytes.
TABULATED_LIMIT = 1 << 27

# ------------------------------------------------------------------------------------- modules that replace others


class TableLookup(nn.Module):
    """A word embedding as one table, whose row of <pad> is zero: a lookup needs no mask then."""

    def __init__(self, embedding: WordEmbedding) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.cat((embedding.trainable.detach(), embedding.frozen)), requires_grad=False)
        self.table[0] = 0.0

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T], 0 where mask [B, T] is False -> [B, T, D]."""
        return F.embedding(input_ids, self.table)


class TabulatedConvolutions(nn.Module):
    """A MaxOverTimeConv on word vectors in int8, computed by looking up and adding.

    A convolution is linear: what a word adds to a window depends only on the word and on the tap (one position of one
    kernel) that it meets. So a table holds it for each word and tap, [words * taps, filters] in int8. A filter has one
    scale for all words and taps, so that windows are summed, and their maxima are taken, in integers.

    Args:
        vectors: [words, D], whose row 0 is zero: windows read it beyond a sentence's ends.
    """

    def __init__(self, vectors: Tensor, cnn: MaxOverTimeConv) -> None:
        super().__init__()
        widths = torch.tensor(cnn.kernel_sizes)
        self.longest, self.taps = int(widths.max()), int(widths.sum())
        tables, scales = [], []
        for convolution in cnn.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            added = torch.stack([vectors @ tap.t() for tap in convolution.weight.detach().unbind(2)], dim=1)
            scales.append((added.abs().amax((0, 1)) / 127).clamp(min=torch.finfo(torch.float32).tiny))
            tables.append((added / scales[-1]).round().to(torch.int8))  # [words, taps of the kernel, filters]
        kernel = torch.arange(len(widths)).repeat_interleave(widths)  # of each tap
        # Windows of all kernels end at the same words, so that the taps of a narrow one stand `longest - width` later.
        first = (self.longest - widths)[kernel].view(-1, 1)
        offset = torch.cat([torch.arange(int(width)) for width in widths]).view(-1, 1)
        self.table = nn.Buffer(torch.cat(tables, dim=1).flatten(0, 1))
        self.tap = nn.Buffer(torch.arange(self.taps).view(-1, 1))
        self.place, self.first = nn.Buffer(first + offset), nn.Buffer(first)
        self.scales = nn.Buffer(torch.stack(scales))
        self.members = nn.Buffer((kernel == torch.arange(len(widths)).view(-1, 1)).to(torch.uint8))  # of each kernel
        self.biases = nn.Buffer(torch.stack([one.bias.detach() for one in cnn.convolutions]))  # type: ignore

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T], 0 where mask [B, T] is False -> [B, kernels * filters]."""
        batch, length = input_ids.shape
        beside, (kernels, filters) = self.longest - 1, self.scales.shape
        start = torch.arange(length + beside, device=input_ids.device)  # of each window, pads included
        words = F.pad(input_ids * self.taps, (beside, beside))
        inside = F.pad(F.pad(mask, (beside, 0), value=True), (0, beside))
        rows = at_positions(words, start + self.place) + self.tap  # [B, taps, windows]
        # A window that begins behind its sentence reads the first window's rows again, which changes no maximum.
        rows = torch.where(at_positions(inside, start + self.first), rows, rows[..., :1])
        # The windows side by side make one product: [kernels, taps] by [B, taps, windows * filters].
        sums = integer_product(self.members, F.embedding(rows, self.table).view(batch, self.taps, -1))
        most = sums.view(batch, kernels, -1, filters).amax(2)  # [B, kernels, filters]
        return F.relu(most * self.scales + self.biases).view(-1, kernels * filters)


# The exporter has no direct form of these two: it makes several operators of the first, and of the second one on int32.


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T], positions [M, N] -> [B, M, N]."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic("Gather", (x, positions), {"axis": 1}, dtype=x.dtype,
                                       shape=(x.shape[0], *positions.shape))
    return x[:, positions]


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] uint8 times b [B, K, N] int8 -> [B, M, N] int32."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic("MatMulInteger", (a, b), dtype=torch.int32,
                                       shape=(b.shape[0], a.shape[0], b.shape[2]))
    return a.int() @ b.int()


def fused_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    scaling: float | None = None, position_bias: Tensor | None = None,
                    **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, as one operator of ONNX Runtime.

    Args:
        query, key, value: [B, heads, T, size].
        attention_mask: added to the scores, or True at real tokens; [B, 1, 1, T] if it only masks padding.
        position_bias: added as well.
    """
    batch, heads, length, size = query.shape

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], heads * size)

    padding = None
    if attention_mask is not None and attention_mask.dtype is not torch.bool and attention_mask.shape[2] == 1:
        attention_mask = attention_mask >= 0  # of a model that makes its own
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        if position_bias is None:
            padding, attention_mask = attention_mask.squeeze((1, 2)).to(torch.int32), None
        else:
            attention_mask = torch.where(attention_mask, 0.0, torch.finfo(torch.float32).min)
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    if key.shape[1] != heads:  # several query heads share a key
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    inputs = (flat(query), flat(key), flat(value), None, padding, attention_mask)
    out = torch.onnx.ops.symbolic("com.microsoft::MultiHeadAttention", inputs,
                                  {"num_heads": heads, "scale": float(size**-0.5 if scaling is None else scaling)},
                                  dtype=query.dtype, shape=inputs[0].shape, version=1)
    return out.reshape(batch, length, heads, size), None


def attention_mask_for_onnx(*, mask_function: Any = None, attention_mask: Tensor | None = None,
                            **kwargs: Any) -> Tensor | None:
    """The mask of transformers' eager attention; True at real tokens if it is the same for all queries."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if mask_function is bidirectional_mask_function and attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, None, None, :]
    return eager_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


# ---------------------------------------------------------------------------------------------------------- export


def word_convolutions(model: Classifier) -> MaxOverTimeConv | None:
    """The convolutions of a model that TabulatedConvolutions can replace: they read word vectors, and few enough."""
    cnn = next(model.encoder.children(), None)
    if not (isinstance(model.embedding, WordEmbedding) and isinstance(cnn, MaxOverTimeConv)):
        return None
    words = len(model.embedding.trainable) + len(model.embedding.frozen)
    filters = cnn.output_size // len(cnn.kernel_sizes)
    return cnn if words * sum(cnn.kernel_sizes) * filters <= TABULATED_LIMIT else None


@contextlib.contextmanager
def ready_for_export(model: Classifier, tabulated: bool = False) -> Iterator[nn.Module]:
    """A view of the classifier that exports well, if `tabulated` with TabulatedConvolutions; then it is as before."""
    if isinstance(model.embedding, WordEmbedding):
        words: Any = TableLookup(model.embedding)
        if tabulated and (cnn := word_convolutions(model)):
            convolutions = TabulatedConvolutions(words.table, cnn)
            yield Classifier(cast(Any, lambda input_ids, mask: input_ids), convolutions, model.decoder).eval()
        else:
            yield Classifier(words, model.encoder, model.decoder).eval()
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("onnx", fused_attention)
    AttentionMaskInterface.register("onnx", attention_mask_for_onnx)
    subwords = model.embedding
    transformer, reads, attention = subwords.transformer, subwords.reads, attention_of(subwords.transformer)
    # Models whose attention is their own (DeBERTa, ConvBERT, MPNet ...) keep it; their graphs are plain operators.
    transformer.set_attn_implementation("onnx" if can_choose_attention(transformer) else "eager")
    subwords.reads = "all"  # the whole graph is fused first; select_early narrows it
    try:
        yield model
    finally:
        transformer.set_attn_implementation(attention)
        subwords.reads = reads


def export_graph(model: Classifier, opset: int = DEFAULT_OPSET, tabulated: bool = False) -> onnx.ModelProto:
    """The classifier's graph for any batch size and length, weights inside; `tabulated` as in ready_for_export.

    Raises:
        InputError: it is larger than an ONNX file can be.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > SIZE_LIMIT:
        raise InputError(f"the model has {size / 1e9:.1f} GB of weights, and one ONNX file holds at most 2 GB.")
    ids = torch.arange(1, 22).view(3, 7)  # sizes that torch.export does not take for constants
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]])
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with ready_for_export(model, tabulated) as exportable, torch.no_grad(), quiet():
        program = torch.onnx.export(exportable, (ids * mask, mask), dynamo=True, opset_version=opset, verbose=False,
                                    input_names=list(INPUTS), output_names=[OUTPUT], external_data=False,
                                    dynamic_shapes=(dynamic, dynamic))
    assert program is not None
    return program.model_proto


# ----------------------------------------------------------------------------------------------------------- check


def check_rows(data: EncodedData, n_ctx: int, limit: int = 2000) -> list[np.ndarray]:
    """Up to `limit` sentences spread over the file, and made ones of n_ctx tokens and of one token."""
    places = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).astype(np.int64))
    rows = [np.asarray(row, dtype=np.int64) for row in data.rows(places)]
    longest = np.concatenate(rows)
    return [longest[:1], *rows, np.resize(longest, n_ctx)]


def varied_batches(rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """All rows in batches of several sizes, in each of which long and short ones stand side by side."""
    waiting = iter(rows)
    batches = (list(itertools.islice(waiting, size)) for size in itertools.cycle((1, 2, 7, 32)))
    return list(itertools.takewhile(len, batches))


def check(graph: onnx.ModelProto, model: Classifier, rows: Sequence[np.ndarray], num_threads: int = 0,
          decision: Decision = ONE_LABEL) -> float:
    """The largest difference of a logit between a graph and PyTorch (relative if logits are larger than 1).

    Raises:
        InputError: a difference above 1e-4, or another prediction.
    """
    batches = varied_batches(rows)
    worst, changed = 0.0, 0
    with torch.inference_mode():
        for batch, found in zip(batches, run_graph(graph, batches, num_threads), strict=True):
            padded = pad(batch)
            expected = model(padded.input_ids, padded.attention_mask).numpy()
            apart = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
            worst = max(worst, float(np.nan_to_num(apart, nan=np.inf)))
            answers = (decision.decide(decision.probabilities(logits)) for logits in (found, expected))
            changed += int(differing(*answers).sum())
    if worst > TOLERANCE or changed:
        raise InputError(f"the exported graph does not agree with PyTorch (logits differ by up to {worst:.1g}, "
                         f"{changed} of {len(rows)} predictions), so that no file was written.")
    return worst


# ----------------------------------------------------------------------------------------------------------- write


def write(graph: onnx.ModelProto, run: RunInfo, path: str, **more: Any) -> int:
    """Write a graph with its run and `more` as its metadata, whole or not at all. Returns the file's size in bytes."""
    said = {key: value for key, value in run.to_json().items() if key != "vocabulary"}
    metadata = json.dumps({"format": ONNX_FORMAT, "run": said, **more})  # in ASCII: a path may hold bytes, no text
    onnx.helper.set_model_props(graph, {METADATA_KEY: metadata, VOCABULARY_KEY: run.vocabulary})
    content = graph.SerializeToString()
    with atomic_write(path, "wb") as file:
        file.write(content)
    return len(content)


def convert(model: Classifier, checkpoint: Checkpoint, folder: Path, path: str, int8_path: str | None,
            opset: int = DEFAULT_OPSET, num_threads: int = 0, int8_mb: float | None = None) -> None:
    """Write a classifier as a .onnx file and, if `int8_path` is given, as an int8 one.

    Args:
        model: on the CPU, in evaluation mode.
        folder: the data folder; its valid sentences check both files, its training sentences calibrate.

    Raises:
        InputError: a check fails; the file is not written.
    """
    run = checkpoint.run
    kind, n_ctx = run.encoding.kind, run.encoding.n_ctx
    valid = EncodedData(folder / f"valid.txt.{kind}")
    check_same_data(valid, run, run.flags["save_path"])
    rows = check_rows(valid, n_ctx)
    exported = export_graph(model, opset)
    graph = simplify(exported, n_ctx)
    fused = fuse(graph)
    worst = check(fused, model, rows, num_threads, run.decision)
    size = write(fused, run, path, opset=opset, difference=worst)
    logger.info("[ONNX] %d valid sentences as in PyTorch, logits within %.1g, %.1f MB -> %s", len(rows), worst,
                size / 1e6, path)
    if int8_path:
        train = EncodedData(folder / f"train.txt.{kind}")
        trained, tabulated = {}, None
        if checkpoint.quantization and checkpoint.quantization["way"] in ("qat", "qat_fx"):
            graph = simplify(exported, n_ctx, pack=False)
            trained = trained_scales(exported, graph, checkpoint.quantization["scales"])
        elif word_convolutions(model):
            tabulated = simplify(export_graph(model, opset, tabulated=True), n_ctx)
        made, measured = choose_int8(graph, fused, train, valid, num_threads, tabulated=tabulated, trained=trained,
                                     int8_mb=int8_mb, decision=run.decision)
        size = write(made, run, int8_path, opset=opset, int8=measured)
        logger.info("[ONNX int8] %s: the fastest that passes, %.1f MB -> %s", measured["setting"], size / 1e6,
                    int8_path)
