"""An exported ONNX graph: rewrites that ONNX Runtime does not do itself, its own fusions, and a run.

A graph has the inputs input_ids [batch, length] int64 (0 at pad positions) and attention_mask [batch, length] bool, and
the output logits [batch, labels]. Rewrites change it in place, in onnxscript's form; `simplify` and `fuse` make a new
one.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxscript import ir

from sentence_classifier.batches import pad
from sentence_classifier.classifier import INPUTS, OUTPUT, make_session

# Operators that compute each position by itself.
ROWWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Not", "Cast", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid",
           "LayerNormalization", "MatMul")
RESHAPING = ("Reshape", "Squeeze", "Unsqueeze")
MOVING = (*RESHAPING, "Expand", "Gather", "GatherElements", "Identity", "Slice")  # operators that compute nothing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporter, the quantizer and others' rewrites log about themselves; also a decorator."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# -------------------------------------------------------------------------------------------------------- rewrites


def _origin(value: ir.Value, operators: tuple[str, ...]) -> ir.Value:
    """What a value is made of, before these operators changed its form."""
    while (node := value.producer()) is not None and node.op_type in operators and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, None for other values."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def add_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """Add a constant to the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def replace_node(old: ir.Node, new: ir.Node) -> None:
    """Put a node in the place of another, whose output it gives."""
    assert old.graph is not None
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], [new], old.outputs, new.outputs)


def axis_of(gather: ir.Node) -> int:
    """The axis along which a Gather looks up."""
    return gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0


def _known(shape: ir.Shape | None) -> bool:
    """Whether each dimension has a number or a name."""
    return shape is not None and not shape.has_unknown_dim()


def tidy(model: ir.Model) -> None:
    """Remove reshapes to the same shape, casts of casts of booleans, and what no node reads."""
    for node in model.graph:
        out = node.outputs[0]
        if out.is_graph_output():
            continue
        if node.op_type in RESHAPING:
            first = _origin(out, RESHAPING)
            if _known(first.shape) and first.shape == out.shape:
                out.replace_all_uses_with(first)
        elif node.op_type == "Cast" and (first := _origin(out, ("Cast",))).dtype == ir.DataType.BOOL:
            if node.attributes["to"].as_int() == ir.DataType.BOOL:
                out.replace_all_uses_with(first)
            else:
                node.replace_input_with(0, first)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def select_early(model: ir.Model) -> None:
    """Compute the last layers only at the position that the model classifies by.

    A `Gather` of one position of [B, T, D] moves up over operators that compute each position by itself. Equal ones
    become one, so that it can move on over the node that all of them read.
    """
    while any(_move_up(node) for node in model.graph if node.op_type == "Gather"):
        ir.passes.common.CommonSubexpressionEliminationPass()(model)


def _move_up(gather: ir.Node) -> bool:
    """Move a Gather of one position over the node that it reads. Returns whether that was possible."""
    source, place = gather.inputs
    assert source is not None and gather.graph is not None
    node, position = source.producer(), array_of(place)
    if (node is None or position is None or position.ndim or axis_of(gather) != 1
            or node.op_type not in ROWWISE or source.shape is None or len(source.shape) != 3
            or len(source.uses()) != 1):
        return False
    moved = []
    for number, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.shape is None:
            return False
        rank, fixed = len(value.shape), value.const_value is not None
        if rank == 0 or (fixed and (rank == 1 or (node.op_type == "MatMul" and number == 1))):
            continue  # the same at each position
        if rank != 3 or value.shape[1] != source.shape[1]:
            return False
        moved.append((number, value))
    for number, value in moved:
        selected = ir.node("Gather", [value, place], {"axis": 1})
        selected.outputs[0].type = value.type
        selected.outputs[0].shape = ir.Shape([value.shape[0], value.shape[2]]) if value.shape else None
        node.prepend(selected)
        node.replace_input_with(number, selected.outputs[0])
    source.shape = gather.outputs[0].shape
    gather.outputs[0].replace_all_uses_with(source)
    gather.graph.remove(gather, safe=True)
    return True


def shorten_lookups(graph: ir.Graph, n_ctx: int) -> None:
    """Replace lookups whose rows are known in advance: the same row for all tokens, or rows by position.

    A `Gather` of the same row everywhere becomes that row, if the row is only added; a `Gather` by a slice of
    0, 1, 2 ... becomes a slice of the table, which keeps its first `n_ctx` rows.
    """
    for node in graph:
        if node.op_type != "Gather" or axis_of(node):
            continue
        table, ids, found = array_of(node.inputs[0]), node.inputs[1], node.outputs[0]
        if table is None or table.ndim != 2 or ids is None:
            continue
        row, piece = array_of(_origin(ids, MOVING)), ids.producer()
        if row is not None and row.size and (row == row.flat[0]).all() and _known(found.shape) and all(
                user.op_type == "Add" and all(value is not None and value.shape == found.shape for value in user.inputs)
                for user in found.consumers()):
            found.replace_all_uses_with(add_constant(graph, table[row.flat[0]], f"{found.name}_row"))
        elif piece is not None and piece.op_type == "Slice":
            counted, start, _, axes = map(array_of, (*piece.inputs, None)[:4])
            if (counted is not None and np.array_equal(counted, np.arange(len(table))[None])
                    and start is not None and start.tolist() == [0] and axes is not None and axes.tolist() == [1]):
                short = add_constant(graph, table[None, :n_ctx], f"{found.name}_table")
                replace_node(node, ir.node("Slice", [short, *piece.inputs[1:]]))


def pack_attention(graph: ir.Graph) -> None:
    """Compute query, key and value of a self-attention in one product: MultiHeadAttention becomes Attention."""
    for node in graph:
        if node.op_type != "MultiHeadAttention":
            continue
        parts = [part for value in node.inputs[:3] if value is not None and (part := _affine(value))]
        if len(parts) < 3 or len({x for x, _, _ in parts}) > 1:
            continue
        out = node.outputs[0]
        weight, bias = (add_constant(graph, np.concatenate([part[place] for part in parts], -1), f"{out.name}_{name}")
                        for place, name in ((1, "weight"), (2, "bias")))
        padding, added = (*node.inputs[4:], None, None)[:2]
        replace_node(node, ir.node("Attention", [parts[0][0], weight, bias, padding, None, added], node.attributes,
                               domain=node.domain))


def _affine(value: ir.Value) -> tuple[ir.Value | None, np.ndarray, np.ndarray] | None:
    """What a product with a bias reads, its weight and its bias; None for other values."""
    add = value.producer()
    if add is None or add.op_type != "Add":
        return None
    bias = next((array for one in add.inputs if (array := array_of(one)) is not None), None)
    product = next((node for one in add.inputs if one is not None and (node := one.producer())), None)
    if bias is None or product is None or product.op_type != "MatMul":
        return None
    weight = array_of(product.inputs[1])
    return None if weight is None else (product.inputs[0], weight, bias)


# ---------------------------------------------------------------------------------------------------- whole graphs


@quiet()
def simplify(graph: onnx.ModelProto, n_ctx: int, pack: bool = True) -> onnx.ModelProto:
    """A copy of the exported graph with less to compute, still in fp32, before any quantization.

    Args:
        n_ctx: tokens of the longest sentence.
        pack: join the three products of an attention.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    wrapped = ONNXModel(copied)
    wrapped.replace_gemm_with_matmul()
    made = ir.from_proto(wrapped.model)
    tidy(made)
    shorten_lookups(made.graph, n_ctx)
    select_early(made)
    if pack:
        pack_attention(made.graph)
    tidy(made)
    return ir.to_proto(made)


def fuse(graph: onnx.ModelProto, int8: bool = False) -> onnx.ModelProto:
    """The graph, or an int8 one, as ONNX Runtime fuses it for every processor: done once here, not at every start."""
    import onnxruntime

    # A sum and a layer norm are together twice as fast as ONNX Runtime's operator for both. A quantized product that
    # is joined with its bias first would stay in fp32.
    left_out = ["SkipLayerNormFusion", *(["MatMulAddFusion"] if int8 else [])]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"],
                                     disabled_optimizers=left_out)
        return onnx.load(options.optimized_model_filepath)


def run_graph(graph: onnx.ModelProto, batches: Sequence[Sequence[np.ndarray]],
              num_threads: int = 0) -> list[np.ndarray]:
    """Logits [B, C] of each batch of token id rows."""
    session = make_session(graph.SerializeToString(), num_threads)
    return [session.run([OUTPUT], make_inputs(batch))[0] for batch in batches]


def make_inputs(batch: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """A graph's inputs for a batch of token id rows."""
    return dict(zip(INPUTS, pad(batch), strict=True))
