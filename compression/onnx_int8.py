"""The int8 form of an exported graph: candidates are quantized, measured on the valid sentences, and one is chosen."""

from __future__ import annotations

import ast
import itertools
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnxscript import ir

from compression.onnx_graph import add_constant, array_of, axis_of, fuse, make_inputs, quiet, replace_node, run_graph
from dataset import EncodedData
from sentence_classifier.classifier import BUSY_WAIT, OUTPUT, make_session
from sentence_classifier.decisions import ONE_LABEL, Decision, differing
from sentence_classifier.errors import InputError
from sentence_classifier.processor import has_vnni

logger = logging.getLogger(__name__)

INTEGER_OPERATORS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QAttention",
                     "QLinearConv", "QLinearMatMul", "QGemm")
FLOAT_OPERATORS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "Attention")
LOSS_LIMIT = 0.005  # of the valid sentences: how many int8 may answer wrongly that fp32 answers rightly
FRACTION_LIMIT = 0.9  # of the matrix and convolution weights must be int8
BATCH_SIZES = (7, 32, 200)  # with which the chosen graph is checked
BATCH_TOLERANCE = 1e-5  # by which a logit may depend on its batch; relative if the logit is larger than 1

# -------------------------------------------------------------------------------------------------------- quantize


@dataclass(frozen=True)
class Setting:
    """How a graph is quantized.

    Attributes:
        calibrated: operators whose input scales are fixed, found on training sentences; the others measure the scale
            of each input when it arrives.
        bits: of a weight. Processors without VNNI add two products in 16 bits, which 8-bit weights can exceed.
        tabulated: the graph is one of onnx_export.TabulatedConvolutions.
        trained: the scales that quantization-aware training found; see `trained_scales`.
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


def quantize(graph: onnx.ModelProto, setting: Setting, rows: Sequence[np.ndarray]) -> onnx.ModelProto:
    """A copy of a simplified graph with matrices, convolutions and tables in int8; `rows` of token ids calibrate."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    common = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": setting.bits == 7}
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "graph.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        # Products answer in fp32, as they do in training: the last one's answers are the logits.
        constant: dict[str, Any] = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"],
                                    "TensorQuantOverrides": setting.trained}
        if setting.calibrated:
            sentences: Any = SimpleNamespace(get_next=partial(next, (make_inputs([row]) for row in rows), None))
            quantize_static(source, target, sentences, quant_format=QuantFormat.QDQ, extra_options=constant,
                            op_types_to_quantize=list(setting.calibrated), activation_type=QuantType.QUInt8, **common)
            source, target = target, source
        measured = [name for name in ("MatMul", "Attention") if name not in setting.calibrated]
        quantize_dynamic(source, target, op_types_to_quantize=measured, extra_options=constant, **common)
        made = ir.from_proto(onnx.load(target))
    quantize_tables(made.graph)
    return ir.to_proto(made)


def quantize_tables(graph: ir.Graph, least: int = 1 << 16) -> None:
    """Store tables of at least so many elements from which rows are looked up in int8, with a scale for each row."""
    for name, value in list(graph.initializers.items()):
        table, readers = array_of(value), value.consumers()
        if (table is None or table.ndim != 2 or table.dtype != np.float32 or table.size < least
                or any(node.op_type != "Gather" or axis_of(node) for node in readers)):
            continue
        scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        rows = add_constant(graph, np.rint(table / scale).astype(np.int8), f"{name}_int8")
        scales = add_constant(graph, scale, f"{name}_scale")
        for node in readers:
            row = ir.node("Gather", [rows, node.inputs[1]])
            cast = ir.node("Cast", row.outputs, {"to": ir.DataType.FLOAT})
            factor = ir.node("Gather", [scales, node.inputs[1]])
            node.prepend([row, cast, factor])
            replace_node(node, ir.node("Mul", [cast.outputs[0], factor.outputs[0]]))
        del graph.initializers[name]


def trained_scales(exported: onnx.ModelProto, graph: onnx.ModelProto,
                   scales: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The scales that quantization-aware training found, by the graph's tensors: each product's input and weight.

    Args:
        exported: as torch's exporter made it; its operators know the modules that they come from.
        graph: the same, simplified, with each product as its own operator.
        scales: by module name; see quantization.scales_of.
    """
    modules: dict[str, str] = {}
    for node in exported.graph.node:
        scopes = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = next((name for name in reversed(ast.literal_eval(scopes)) if name in scales), None)
        if module and node.op_type in FLOAT_OPERATORS:
            # replace_gemm_with_matmul adds this suffix to weights that it transposes.
            modules |= {node.input[1]: module, f"{node.input[1]}_Transposed": module}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in graph.graph.node:
        if node.op_type in FLOAT_OPERATORS and node.input[1] in modules:
            entry = scales[modules[node.input[1]]]
            found[node.input[0]] = [{"scale": np.array(entry["scale"], dtype=np.float32),
                                     "zero_point": np.array(entry["zero_point"], dtype=np.uint8)}]
            found[node.input[1]] = [{"scale": np.array(scale), "zero_point": np.array(0, dtype=np.int8),
                                     "axis": int(node.op_type != "Conv")} for scale in entry["weight_scale"].numpy()]
    return found


# --------------------------------------------------------------------------------------------------------- measure


def int8_fraction(graph: onnx.ModelProto) -> float | None:
    """The fraction of matrix and convolution weights that integer operators compute with, None if there are none.

    A table of TabulatedConvolutions counts by its elements: an integer operator sums the rows that are looked up.
    """
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if len(tensor.dims) > 1}
    for node in graph.graph.node:
        weight = weights.get(node.input[0]) if node.input else None
        # Stored in int8 and computed with in fp32, or looked up in int8.
        if weight is not None and (node.op_type in ("DequantizeLinear", "Reshape") or (
                node.op_type == "Gather" and weight.data_type == onnx.TensorProto.INT8)):
            weights[node.output[0]] = weight
    sizes = {"int8": 0, "fp32": 0}
    seen: set[str] = set()
    for node in graph.graph.node:
        kind = "int8" if node.op_type in INTEGER_OPERATORS else "fp32" if node.op_type in FLOAT_OPERATORS else None
        for name in set(node.input) & set(weights) - seen if kind else ():
            seen.add(name)
            sizes[kind] += int(np.prod(weights[name].dims))  # type: ignore[index]
    total = sum(sizes.values())
    return sizes["int8"] / total if total else None


def is_batch_invariant(graph: onnx.ModelProto, rows: Sequence[np.ndarray], num_threads: int = 0) -> bool:
    """Whether an int8 graph answers sentences in batches of several sizes as it answers each of them alone.

    An activation scale that is measured on arrival depends on the whole batch. With fixed scales, too, an activation
    can be rounded the other way in a batch, since fp32 operators differ there by their last bit.
    """
    if any(node.op_type.startswith("DynamicQuantize") for node in graph.graph.node):
        return False
    alone = np.concatenate(run_graph(graph, [[row] for row in rows], num_threads))
    allowed = BATCH_TOLERANCE * np.maximum(1.0, np.abs(alone))
    for size in BATCH_SIZES:
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        if (np.abs(np.concatenate(run_graph(graph, batches, num_threads)) - alone) > allowed).any():
            return False
    return True


@dataclass
class Candidate:
    """An int8 graph and its measurements."""

    setting: Setting
    graph: onnx.ModelProto
    fraction: float
    score: float
    changed: int
    milliseconds: float


def choose_int8(graph: onnx.ModelProto, fused: onnx.ModelProto, train: EncodedData, valid: EncodedData,
                num_threads: int = 0, tabulated: onnx.ModelProto | None = None,
                trained: dict[str, Any] | None = None, int8_mb: float | None = None,
                decision: Decision = ONE_LABEL) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The fastest int8 form of a graph that keeps its accuracy on the valid sentences, found by measuring.

    Args:
        graph, fused: in fp32, as `simplify` and `fuse` made them.
        tabulated: as `simplify` made it of an export with TabulatedConvolutions.
        trained: the scales of quantization-aware training, which leave one candidate.
        int8_mb: the largest int8 graph allowed; None: no limit.
        decision: how logits become labels, and what is counted: accuracy, or with several labels micro F1.

    Returns:
        The int8 graph, and the entry "int8" of its metadata.

    Raises:
        InputError: there is nothing to quantize, or no candidate passes.
    """
    places = np.unique(np.linspace(0, len(valid) - 1, min(2000, len(valid))).astype(np.int64))
    rows, targets = valid.rows(places), valid.class_ids()[places]
    calibration = train.rows(np.unique(np.linspace(0, len(train) - 1, 256).astype(np.int64)))
    if int8_fraction(fused) is None:
        raise InputError("the model has no matrices and no convolutions, so that there is nothing to quantize.")

    def predictions(candidate: onnx.ModelProto) -> np.ndarray:  # one sentence at a time, as the runtime answers
        logits = np.concatenate(run_graph(candidate, [[row] for row in rows], num_threads))
        return decision.decide(decision.probabilities(logits))

    expected = predictions(fused)
    score = decision.score(expected, targets)
    allowed = max(1 / len(rows), LOSS_LIMIT) + 1e-9  # one sentence of a small file is more than half a point
    convolves = ("Conv",) if any(node.op_type == "Conv" for node in graph.graph.node) else ()
    settings = _settings(convolves, tabulated is not None, trained or {})
    graphs = [fuse(quantize(tabulated if setting.tabulated and tabulated is not None else graph, setting, calibration),
                   int8=True) for setting in settings]
    fp32_milliseconds, *times = _time([fused, *graphs], rows[:100], num_threads)
    candidates = []
    for setting, made, milliseconds in zip(settings, graphs, times, strict=True):
        found = predictions(made)
        candidate = Candidate(setting, made, int8_fraction(made) or 0.0, decision.score(found, targets),
                              int(differing(found, expected).sum()), milliseconds)
        candidates.append(candidate)
        logger.info("[int8: %s] %.1f %% of the weights, %s %.4f (fp32 %.4f), %d of %d predictions changed "
                    "(%.2f %%), %.3f ms a sentence (fp32 %.3f), %.1f MB", candidate.setting, 100 * candidate.fraction,
                    decision.measure, candidate.score, score, candidate.changed, len(rows),
                    100 * candidate.changed / len(rows), milliseconds, fp32_milliseconds, made.ByteSize() / 1e6)
    passing = [c for c in candidates if c.fraction >= FRACTION_LIMIT and score - c.score <= allowed
               and (int8_mb is None or c.graph.ByteSize() <= int8_mb * 1e6)]
    if not passing:
        raise InputError(f"no int8 form of the model passes (at least {FRACTION_LIMIT:.0%} of the weights, at most "
                         f"{LOSS_LIMIT:.1%} of {len(rows)} valid sentences lost"
                         f"{f', at most {int8_mb:g} MB' if int8_mb else ''}); use the fp32 file.")
    fastest = min(c.milliseconds for c in passing)
    # Times within a twentieth are equal; of these, the candidate that changes least is chosen.
    best = min((c for c in passing if c.milliseconds <= 1.05 * fastest), key=lambda c: (c.changed, c.milliseconds))
    return best.graph, {"setting": str(best.setting), "share": best.fraction, "accuracy": best.score,
                        "accuracy_fp32": score, "changed": best.changed / len(rows),
                        "examples": len(rows), "weight_bits": best.setting.bits,
                        "batch_invariant": is_batch_invariant(best.graph, rows, num_threads)}


def _settings(convolves: tuple[str, ...], tabulated: bool, trained: dict[str, Any]) -> list[Setting]:
    """The candidates' settings. Without VNNI, 8-bit weights saturate on some sentences, if not on the valid ones."""
    if trained:
        return [Setting((*convolves, "MatMul"), 7, trained=trained)]
    all_bits = (7,) if has_vnni() is False else (8, 7)
    calibrated = (convolves, (*convolves, "MatMul"))
    return [*(Setting(operators, bits) for operators, bits in itertools.product(calibrated, all_bits)),
            *(Setting(("MatMul",), bits, tabulated=True) for bits in all_bits if tabulated)]  # fixed: batch-invariant


def _time(graphs: Sequence[onnx.ModelProto], rows: Sequence[np.ndarray], num_threads: int) -> list[float]:
    """The median milliseconds a sentence of each graph.

    The graphs take turns of 20 sentences, so that other work on the machine slows all of them. Before each turn, the
    threads of the previous session get time to fall asleep, and five sentences warm up.
    """
    sessions = [make_session(graph.SerializeToString(), num_threads) for graph in graphs]
    feeds = [make_inputs([row]) for row in rows]
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
