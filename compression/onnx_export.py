"""From a trained classifier to .onnx files: export, optimize, quantize, check, write; each step a function of its own.

A graph is an onnx.ModelProto with the inputs input_ids [batch, length] int64 (0 at pad positions) and attention_mask
[batch, length] bool, and the output logits [batch, labels]. Nothing gets its final name before it agrees with PyTorch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.onnx_graph import (
    int8_share,
    pack_attention,
    quantize_tables,
    select_early,
    shorten_lookups,
    tabulate_convolutions,
    tidy,
    trained_scales,
)
from dataset import EncodedData, check_same_data, pad
from model import Classifier, WordEmbedding
from pretrained.loading import attention_of, can_choose_attention
from sentence_classifier.classifier import (
    BUSY_WAIT,
    INPUTS,
    METADATA_KEY,
    ONNX_FORMAT,
    OUTPUT,
    VOCABULARY_KEY,
    make_session,
)
from sentence_classifier.errors import InputError
from util import Checkpoint, RunInfo, atomic_write

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 20  # the first one that has GELU as an operator
SIZE_LIMIT = 2_000_000_000  # bytes; protobuf ends at 2 GiB
TOLERANCE = 1e-4  # on logits; relative where they are larger than 1, as a Gaussian's are
LOSS_LIMIT = 0.005  # share of the valid sentences that int8 may answer wrongly and fp32 does not
SHARE_LIMIT = 0.9  # of the matrix and convolution weights must be int8

# ---------------------------------------------------------------------------------------------------------- export


class TableLookup(nn.Module):
    """A word embedding as one table, whose row of <pad> is zero: a lookup needs no mask then."""

    def __init__(self, embedding: WordEmbedding) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.cat((embedding.trainable.detach(), embedding.frozen)), requires_grad=False)
        self.table[0] = 0.0

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T], 0 where mask [B, T] is False -> [B, T, D]."""
        return F.embedding(input_ids, self.table)


def fused_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    scaling: float | None = None, position_bias: Tensor | None = None,
                    **kwargs: Any) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, as one operator of ONNX Runtime.

    Args:
        query, key, value: [B, heads, T, size].
        attention_mask: what is added to the scores, or True at real tokens; [B, 1, 1, T] where it only masks padding.
        position_bias: what is added beside it.
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
    """The mask of transformers' eager attention; where it is the same for all queries, True at real tokens."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if mask_function is bidirectional_mask_function and attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, None, None, :]
    return eager_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


@contextlib.contextmanager
def ready_for_export(model: Classifier) -> Iterator[nn.Module]:
    """A view of the classifier that exports well; the classifier itself is as before after the block."""
    if isinstance(model.embedding, WordEmbedding):
        yield Classifier(TableLookup(model.embedding), model.encoder, model.decoder).eval()  # type: ignore[arg-type]
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("onnx", fused_attention)
    AttentionMaskInterface.register("onnx", attention_mask_for_onnx)
    embedding = model.embedding
    transformer, reads = embedding.transformer, embedding.reads
    before = attention_of(transformer)
    # Models whose attention is their own (DeBERTa, ConvBERT, MPNet ...) keep it: their graphs are plain operators.
    transformer.set_attn_implementation("onnx" if can_choose_attention(transformer) else "eager")
    embedding.reads = "all"  # the graph is fused as a whole first, and narrowed then: see select_early
    try:
        yield model
    finally:
        transformer.set_attn_implementation(before)
        embedding.reads = reads


def export_graph(model: Classifier, opset: int = DEFAULT_OPSET) -> onnx.ModelProto:
    """The classifier's graph for any batch size and length, weights inside.

    Raises:
        InputError: it is larger than an ONNX file can be.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(model.parameters(),
                                                                                    model.buffers()))
    if size > SIZE_LIMIT:
        raise InputError(f"the model has {size / 1e9:.1f} GB of weights, and one ONNX file holds at most 2 GB.")
    ids = torch.arange(1, 22).view(3, 7)  # sizes that torch.export does not take for constants
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]])
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with ready_for_export(model) as exportable, torch.no_grad(), _quiet():
        program = torch.onnx.export(exportable, (ids * mask, mask), dynamo=True, opset_version=opset, verbose=False,
                                    input_names=list(INPUTS), output_names=[OUTPUT], external_data=False,
                                    dynamic_shapes=(dynamic, dynamic))
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantizer's remarks on themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# -------------------------------------------------------------------------------------------------------- optimize


def simplify(graph: onnx.ModelProto, n_ctx: int, pack: bool = True) -> onnx.ModelProto:
    """The exported graph with less to compute, still in fp32 and open to quantization.

    Args:
        graph: left as it is.
        n_ctx: tokens of the longest sentence.
        pack: several products into one, where that is quicker.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(_copy(graph))
    wrapped.replace_gemm_with_matmul()
    tidy(wrapped.model.graph)
    shorten_lookups(wrapped.model.graph, n_ctx)
    select_early(wrapped.model.graph)
    if pack:
        pack_attention(wrapped.model.graph)
    tidy(wrapped.model.graph)
    return wrapped.model


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    return made


def fuse(graph: onnx.ModelProto, int8: bool = False) -> onnx.ModelProto:
    """The graph as ONNX Runtime itself fuses it, on any processor: done once here, not at every start.

    Args:
        int8: the graph's products are quantized; a product joined with its bias first would stay in fp32.
    """
    import onnxruntime

    # A sum and a layer norm are together twice as fast as ONNX Runtime's operator for both.
    left_out = ["SkipLayerNormFusion", *(["MatMulAddFusion"] if int8 else [])]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"],
                                     disabled_optimizers=left_out)
        return onnx.load(options.optimized_model_filepath)


# -------------------------------------------------------------------------------------------------------- quantize


@dataclass(frozen=True)
class Setting:
    """A way to int8.

    Attributes:
        calibrated: operators whose inputs have fixed scales, found on training sentences; those of the others are
            measured as they come.
        bits: of a weight. Seven keep processors without VNNI from saturating sums of two products.
        tabulated: convolutions of words are looked up; see graph.tabulate_convolutions.
        trained: scales that quantization-aware training found, by the graph's names; see graph.trained_scales.
    """

    calibrated: tuple[str, ...]
    bits: int
    tabulated: bool = False
    trained: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.trained:
            return f"the scales of training, {self.bits}-bit weights per channel"
        said = f"{' and '.join(self.calibrated) or 'nothing'} calibrated, {self.bits}-bit weights per channel"
        return f"convolutions tabulated by word, {said}" if self.tabulated else said


class _Sentences:
    """Calibration sentences, one at a time, as the quantizer asks for them."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next sentence, None after the last."""
        row = next(self.rows, None)
        if row is None:
            return None
        return {INPUTS[0]: np.asarray(row, dtype=np.int64)[None], INPUTS[1]: np.ones((1, len(row)), dtype=bool)}


def quantize(graph: onnx.ModelProto, setting: Setting, rows: Sequence[np.ndarray]) -> onnx.ModelProto:
    """A simplified graph with its matrices, convolutions and tables of vectors in int8.

    Args:
        graph: as `simplify` made it, its convolutions tabulated where the setting says so; left as it is.
        rows: token ids of the calibration sentences.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    common = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": setting.bits == 7}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "graph.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        constant: dict[str, Any] = {"MatMulConstBOnly": True}
        if setting.trained:  # with products that answer in fp32, as in training
            constant |= {"TensorQuantOverrides": setting.trained, "OpTypesToExcludeOutputQuantization": ["MatMul"]}
        if setting.calibrated:
            quantize_static(source, target, _Sentences(rows), quant_format=QuantFormat.QDQ, extra_options=constant,
                            op_types_to_quantize=list(setting.calibrated), activation_type=QuantType.QUInt8, **common)
            source, target = target, source
        measured = [name for name in ("MatMul", "Attention") if name not in setting.calibrated]
        quantize_dynamic(source, target, op_types_to_quantize=measured, extra_options=constant, **common)
        made = onnx.load(target)
    quantize_tables(made.graph)
    return made


# ----------------------------------------------------------------------------------------------------------- check


def run_graph(graph: onnx.ModelProto, batches: Sequence[Sequence[np.ndarray]],
              num_threads: int = 0) -> list[np.ndarray]:
    """Logits [B, C] of each batch of token id rows."""
    session = make_session(graph.SerializeToString(), num_threads)
    return [_logits(session, batch) for batch in batches]


def _logits(session: Any, rows: Sequence[np.ndarray]) -> np.ndarray:
    batch = pad(rows)
    return session.run([OUTPUT], {INPUTS[0]: batch.input_ids.numpy(), INPUTS[1]: batch.attention_mask.numpy()})[0]


def varied_batches(rows: Sequence[np.ndarray], sizes: Sequence[int] = (1, 2, 7, 32)) -> list[list[np.ndarray]]:
    """All rows, in batches of several sizes, in each of which long and short ones stand side by side."""
    batches: list[list[np.ndarray]] = []
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(rows):
            return batches
        batches.append(list(rows[start : start + size]))
        start += size
    return batches


def check(graph: onnx.ModelProto, model: Classifier, rows: Sequence[np.ndarray], num_threads: int = 0) -> float:
    """Compare a graph with PyTorch, sentence by sentence.

    Returns:
        The largest difference of a logit (relative where logits are larger than 1).

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
            changed += int((found.argmax(1) != expected.argmax(1)).sum())
    if worst > TOLERANCE or changed:
        raise InputError(f"the exported graph does not agree with PyTorch (logits differ by up to {worst:.1g}, "
                         f"{changed} of {len(rows)} predictions), so that no file was written.")
    return worst


# ----------------------------------------------------------------------------------------------------------- write


def make_metadata(run: RunInfo, **more: Any) -> dict[str, Any]:
    """What a .onnx file says of itself beside the vocabulary."""
    said = run.to_json()
    del said["vocabulary"]
    return {"format": ONNX_FORMAT, "run": said, **more}


def write(graph: onnx.ModelProto, metadata: dict[str, Any], vocabulary: str, path: str | Path) -> int:
    """Write a graph with its metadata, whole or not at all. Returns the file's size in bytes."""
    import json

    made = _copy(graph)
    del made.metadata_props[:]
    said = json.dumps(metadata)  # in ASCII: a path may hold bytes that are no text
    onnx.helper.set_model_props(made, {METADATA_KEY: said, VOCABULARY_KEY: vocabulary})
    content = made.SerializeToString()
    with atomic_write(path, "wb") as file:
        file.write(content)
    return len(content)


# --------------------------------------------------------------------------------------------------------- convert


def convert(model: Classifier, checkpoint: Checkpoint, folder: Path, path: str, int8_path: str | None,
            opset: int = DEFAULT_OPSET, num_threads: int = 0, int8_mb: float | None = None) -> None:
    """Write a classifier as a .onnx file and, where `int8_path` is given, as an int8 one.

    Args:
        model: on the CPU, in evaluation mode.
        checkpoint: its checkpoint.
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
    worst = check(fused, model, rows, num_threads)
    size = write(fused, make_metadata(run, opset=opset, difference=worst), run.vocabulary, path)
    logger.info("[ONNX] %d valid sentences as in PyTorch, logits within %.1g, %.1f MB -> %s", len(rows), worst,
                size / 1e6, path)
    if int8_path:
        train = EncodedData(folder / f"train.txt.{kind}")
        trained = {}
        if checkpoint.quantization and checkpoint.quantization["way"] in ("qat", "qat_fx"):
            graph = simplify(exported, n_ctx, pack=False)
            trained = trained_scales(exported, graph, checkpoint.quantization["scales"])
        made, figures = choose_int8(graph, fused, train, valid, num_threads, trained=trained, int8_mb=int8_mb)
        size = write(made, make_metadata(run, opset=opset, int8=figures), run.vocabulary, int8_path)
        logger.info("[ONNX int8] %s: the fastest that passes, %.1f MB -> %s", figures["setting"], size / 1e6, int8_path)


def check_rows(data: EncodedData, n_ctx: int, limit: int = 2000) -> list[np.ndarray]:
    """Up to `limit` sentences from all over the file, and ones of n_ctx tokens and of one."""
    places = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).astype(np.int64))
    rows = [np.asarray(row, dtype=np.int64) for row in data.rows(places)]
    longest = np.concatenate(rows)
    return [longest[:1], *rows, np.resize(longest, n_ctx)]


@dataclass
class Candidate:
    """An int8 graph and what was measured of it."""

    setting: Setting
    graph: onnx.ModelProto
    share: float
    correct: int
    changed: int
    milliseconds: float = 0.0


def choose_int8(graph: onnx.ModelProto, fused: onnx.ModelProto, train: EncodedData, valid: EncodedData,
                num_threads: int = 0, limit: int = 2000,
                trained: dict[str, Any] | None = None,
                int8_mb: float | None = None) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The fastest int8 form of a graph that keeps its accuracy on the valid sentences, found by measuring.

    Args:
        graph, fused: in fp32, as `simplify` and `fuse` made them.
        trained: scales of quantization-aware training, which leave no choice.
        int8_mb: how large the int8 graph may be; None: as large as the fastest is.

    Returns:
        The int8 graph, and the figures for its metadata.

    Raises:
        InputError: there is nothing to quantize, or no setting passes.
    """
    places = np.unique(np.linspace(0, len(valid) - 1, min(limit, len(valid))).astype(np.int64))
    rows, targets = valid.rows(places), valid.class_ids()[places]
    calibration = train.rows(np.unique(np.linspace(0, len(train) - 1, 256).astype(np.int64)))
    if int8_share(fused) is None:
        raise InputError("the model has no matrices and no convolutions, so that there is nothing to quantize.")

    def predictions(candidate: onnx.ModelProto) -> np.ndarray:
        # One at a time: how inputs that are measured as they come are rounded depends on the batch.
        return np.concatenate(run_graph(candidate, [[row] for row in rows], num_threads)).argmax(1)

    expected = predictions(fused)
    correct = int((expected == targets).sum())
    allowed = max(1.0, LOSS_LIMIT * len(rows))  # one sentence of a small file is more than half a point
    convolves = ("Conv",) if any(node.op_type == "Conv" for node in graph.graph.node) else ()
    candidates = []
    settings = [Setting(calibrated, bits)
                for calibrated, bits in itertools.product((convolves, (*convolves, "MatMul")), (8, 7))]
    tabulated = _copy(graph)
    if not trained and tabulate_convolutions(tabulated.graph):
        settings += [Setting((), bits, tabulated=True) for bits in (8, 7)]
    for setting in [Setting((*convolves, "MatMul"), 7, trained=trained)] if trained else settings:
        made = fuse(quantize(tabulated if setting.tabulated else graph, setting, calibration), int8=True)
        found = predictions(made)
        candidates.append(Candidate(setting, made, int8_share(made) or 0.0, int((found == targets).sum()),
                                    int((found != expected).sum())))
    times = _time([fused, *(candidate.graph for candidate in candidates)], rows[:100], num_threads)
    for candidate, milliseconds in zip(candidates, times[1:], strict=True):
        candidate.milliseconds = milliseconds
        logger.info("[int8: %s] %.1f %% of the weights, accuracy %.4f (fp32 %.4f), %d of %d predictions changed "
                    "(%.2f %%), %.3f ms a sentence (fp32 %.3f), %.1f MB", candidate.setting, 100 * candidate.share,
                    candidate.correct / len(rows), correct / len(rows), candidate.changed, len(rows),
                    100 * candidate.changed / len(rows), milliseconds, times[0], candidate.graph.ByteSize() / 1e6)
    passing = [c for c in candidates if c.share >= SHARE_LIMIT and correct - c.correct <= allowed
               and (int8_mb is None or c.graph.ByteSize() <= int8_mb * 1e6)]
    if not passing:
        raise InputError(f"no int8 form of the model passes (at least {SHARE_LIMIT:.0%} of the weights, at most "
                         f"{LOSS_LIMIT:.1%} of {len(rows)} valid sentences lost"
                         f"{f', at most {int8_mb:g} MB' if int8_mb else ''}); use the fp32 file.")
    fastest = min(c.milliseconds for c in passing)
    # Times within a twentieth are equal; then the one that changes least.
    best = min((c for c in passing if c.milliseconds <= 1.05 * fastest), key=lambda c: (c.changed, c.milliseconds))
    return best.graph, {"setting": str(best.setting), "share": best.share, "accuracy": best.correct / len(rows),
                        "accuracy_fp32": correct / len(rows), "changed": best.changed / len(rows),
                        "examples": len(rows)}


def _time(graphs: Sequence[onnx.ModelProto], rows: Sequence[np.ndarray], num_threads: int) -> list[float]:
    """Median milliseconds a sentence of each graph, taken in turns, so that what else the machine does hits all.

    A turn is some sentences long, the first of which do not count, and begins when the threads of the session before,
    which wait busily for a while, have gone to sleep.
    """
    sessions = [make_session(graph.SerializeToString(), num_threads) for graph in graphs]
    feeds = [{INPUTS[0]: np.asarray(row, dtype=np.int64)[None], INPUTS[1]: np.ones((1, len(row)), dtype=bool)}
             for row in rows]
    seconds: list[list[float]] = [[] for _ in graphs]
    for start in range(0, len(feeds), 20):
        turn = feeds[start : start + 20]
        for session, spent in zip(sessions, seconds, strict=True):
            time.sleep(BUSY_WAIT)
            for number, feed in enumerate([*turn[:5], *turn]):
                begin = time.perf_counter()
                session.run([OUTPUT], feed)
                if number >= 5:
                    spent.append(time.perf_counter() - begin)
    return [1000 * float(np.median(spent)) for spent in seconds]
