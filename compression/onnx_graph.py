"""An exported ONNX graph: rewrites that ONNX Runtime does not do itself, its own fusions, and a run.

A graph has the inputs input_ids [batch, length] int64 (0 at pad positions) and attention_mask [batch, length] bool, and
the output logits [batch, labels]. Rewrites change an onnx.GraphProto in place; `simplify` and `fuse` make a new model.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from sentence_classifier.batches import pad
from sentence_classifier.classifier import INPUTS, OUTPUT, make_session

# Operators that compute each position by itself.
ROWWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Not", "Cast", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid",
           "LayerNormalization", "MatMul")
RESHAPING = ("Reshape", "Squeeze", "Unsqueeze")
MOVING = (*RESHAPING, "Expand", "Gather", "GatherElements", "Identity", "Slice")  # operators that compute nothing

# -------------------------------------------------------------------------------------------------------- rewrites


def _shapes(graph: onnx.GraphProto) -> dict[str, list[Any]]:
    """The dimensions of each value by name: a number, the name of a dynamic dimension, or "" if unknown."""
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: [d.dim_param or d.dim_value or "" for d in value.type.tensor_type.shape.dim]
            for value in values if value.type.tensor_type.HasField("shape")}


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _replace_uses(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def tidy(graph: onnx.GraphProto) -> None:
    """Remove reshapes to the same shape, casts of casts of booleans, and what no node reads."""
    shapes, producers = _shapes(graph), _producers(graph)
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}
    outputs = {value.name for value in graph.output}

    def origin(name: str, operators: tuple[str, ...]) -> str:
        while name in producers and producers[name].op_type in operators:
            name = producers[name].input[0]
        return name

    for node in graph.node:
        if node.output[0] in outputs:
            continue
        if node.op_type in RESHAPING:
            first = origin(node.input[0], RESHAPING)
            shape = shapes.get(first, [""])
            if all(shape) and shape == shapes.get(node.output[0]):
                _replace_uses(graph, node.output[0], first)
        elif node.op_type == "Cast" and types.get(first := origin(node.input[0], ("Cast",))) == onnx.TensorProto.BOOL:
            if next(attribute.i for attribute in node.attribute if attribute.name == "to") == onnx.TensorProto.BOOL:
                _replace_uses(graph, node.output[0], first)
            else:
                node.input[0] = first
    used = outputs
    for node in reversed(list(graph.node)):  # nodes stand in the order of computation
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used = used | set(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def select_early(graph: onnx.GraphProto) -> None:
    """Compute the last layers only at the position that the model classifies by.

    A `Gather` of one position of [B, T, D] moves up over operators that compute each position by itself.
    """
    while any(_move_up(graph, node) for node in graph.node if node.op_type == "Gather"):
        _join_gathers(graph)


def _join_gathers(graph: onnx.GraphProto) -> None:
    """Keep one of several equal Gathers, so that it can move on over the node that all of them read."""
    first: dict[bytes, str] = {}
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        alike = onnx.helper.make_node("Gather", node.input, ["joined"])
        alike.attribute.extend(node.attribute)
        kept = first.setdefault(alike.SerializeToString(), node.output[0])
        if kept != node.output[0]:
            _replace_uses(graph, node.output[0], kept)
            graph.node.remove(node)


def _move_up(graph: onnx.GraphProto, gather: onnx.NodeProto) -> bool:
    """Move a Gather of one position over the node that it reads. Returns whether that was possible."""
    shapes, constants = _shapes(graph), {tensor.name: tensor for tensor in graph.initializer}
    place = constants.get(gather.input[1])
    axis = next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)
    source = gather.input[0]
    node = _producers(graph).get(source)
    uses = Counter(name for one in graph.node for name in one.input)
    if (node is None or place is None or len(place.dims) or axis != 1 or node.op_type not in ROWWISE
            or len(shapes.get(source, [])) != 3 or uses[source] != 1):
        return False
    length = shapes[source][1]
    moved = []
    for number, name in enumerate(node.input):
        shape = list(constants[name].dims) if name in constants else shapes.get(name)
        if name and shape is None:
            return False
        if name in constants and (len(shape or []) <= 1 or (node.op_type == "MatMul" and number == 1)):
            continue  # the same at each position
        if not name or shape == []:
            continue
        if len(shape or []) != 3 or (shape or [])[1] != length:
            return False
        moved.append((number, name))
    at = list(graph.node).index(node)
    for number, name in moved:
        selected = f"{name}_at_{gather.input[1]}_for_{node.output[0]}_{number}"
        graph.node.insert(at, onnx.helper.make_node("Gather", [name, gather.input[1]], [selected], axis=1))
        known = next((value for value in graph.value_info if value.name == name), None)
        if known is not None:
            value = graph.value_info.add()
            value.CopyFrom(known)
            value.name = selected
            del value.type.tensor_type.shape.dim[1]
        node.input[number] = selected
    node.output[0] = gather.output[0]
    for value in [value for value in graph.value_info if value.name == source]:
        graph.value_info.remove(value)
    graph.node.remove(gather)
    return True


def _constant_of(graph: onnx.GraphProto, name: str) -> int | None:
    """The integer that all elements of a value equal, None if the graph does not tell."""
    tensor = next((one for one in graph.initializer if one.name == name), None)
    if tensor is not None:
        array = numpy_helper.to_array(tensor)
        same = array.size and array.dtype.kind == "i" and (array == array.flat[0]).all()
        return int(array.flat[0]) if same else None
    node = _producers(graph).get(name)
    return _constant_of(graph, node.input[0]) if node is not None and node.op_type in MOVING else None


def shorten_lookups(graph: onnx.GraphProto, n_ctx: int) -> None:
    """Replace lookups whose rows are known in advance: the same row for all tokens, or rows by position.

    A `Gather` of the same row everywhere becomes that row, if the row is only added; a `Gather` by a slice of
    0, 1, 2 ... becomes a slice of the table, which keeps its first `n_ctx` rows.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    tables = {name: numpy_helper.to_array(tensor) for name, tensor in constants.items() if len(tensor.dims) == 2}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables
                 and not any(attribute.name == "axis" and attribute.i for attribute in node.attribute)]:
        table, shapes = tables[node.input[0]], _shapes(graph)
        row, piece = _constant_of(graph, node.input[1]), _producers(graph).get(node.input[1])
        shape = shapes.get(node.output[0], [""])
        if row is not None and all(shape) and all(
                one.op_type == "Add" and [shapes.get(name) for name in one.input] == [shape] * 2
                for one in graph.node if node.output[0] in one.input):
            graph.initializer.append(numpy_helper.from_array(table[row], f"{node.output[0]}_row"))
            _replace_uses(graph, node.output[0], f"{node.output[0]}_row")
        elif piece is not None and piece.op_type == "Slice":
            counted, start, axes = (numpy_helper.to_array(constants[name]) if name in constants else np.array([])
                                    for name in (piece.input[0], piece.input[1], [*piece.input, "", ""][3]))
            from_first = start.tolist() == [0] and axes.tolist() == [1]
            if not from_first or counted.shape != (1, len(table)) or (counted[0] != np.arange(len(table))).any():
                continue
            graph.initializer.append(numpy_helper.from_array(table[None, :n_ctx], f"{node.output[0]}_table"))
            at = list(graph.node).index(node)
            graph.node.remove(node)
            graph.node.insert(at, onnx.helper.make_node("Slice", [f"{node.output[0]}_table", *piece.input[1:]],
                                                        node.output))


def pack_attention(graph: onnx.GraphProto) -> None:
    """Compute query, key and value of a self-attention in one product: MultiHeadAttention becomes Attention."""
    producers = _producers(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MultiHeadAttention"]:
        products, biases = [], []
        for name in node.input[:3]:
            add = producers.get(name)
            if add is None or add.op_type != "Add":
                break
            bias = next((one for one in add.input if one in constants), None)
            product = next((producers[one] for one in add.input if one in producers), None)
            if bias is None or product is None or product.op_type != "MatMul" or product.input[1] not in constants:
                break
            products.append(product)
            biases.append(constants[bias])
        if len(products) < 3 or len({product.input[0] for product in products}) > 1:
            continue
        weight = np.concatenate([numpy_helper.to_array(constants[one.input[1]]) for one in products], 1)
        bias = np.concatenate([numpy_helper.to_array(one) for one in biases])
        packed = [f"{node.output[0]}_weight", f"{node.output[0]}_bias"]
        graph.initializer.extend(numpy_helper.from_array(array, name)
                                 for array, name in zip((weight, bias), packed, strict=True))
        _, padding, added = [*list(node.input[3:]), "", "", ""][:3]
        del node.input[:]
        node.input.extend([products[0].input[0], *packed, padding, "", added])
        node.op_type = "Attention"


# ---------------------------------------------------------------------------------------------------- whole graphs


def simplify(graph: onnx.ModelProto, n_ctx: int, pack: bool = True) -> onnx.ModelProto:
    """The exported graph with less to compute, still in fp32, before any quantization.

    Args:
        graph: not changed.
        n_ctx: tokens of the longest sentence.
        pack: join the three products of an attention.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    made = onnx.ModelProto()
    made.CopyFrom(graph)
    wrapped = ONNXModel(made)
    wrapped.replace_gemm_with_matmul()
    tidy(wrapped.model.graph)
    shorten_lookups(wrapped.model.graph, n_ctx)
    select_early(wrapped.model.graph)
    if pack:
        pack_attention(wrapped.model.graph)
    tidy(wrapped.model.graph)
    return wrapped.model


def fuse(graph: onnx.ModelProto, int8: bool = False) -> onnx.ModelProto:
    """The graph as ONNX Runtime fuses it for every processor: done once here, not at every start.

    Args:
        int8: the graph's products are quantized. A product that was joined with its bias first would stay in fp32.
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


def run_graph(graph: onnx.ModelProto, batches: Sequence[Sequence[np.ndarray]],
              num_threads: int = 0) -> list[np.ndarray]:
    """Logits [B, C] of each batch of token id rows."""
    session = make_session(graph.SerializeToString(), num_threads)
    return [session.run([OUTPUT], dict(zip(INPUTS, pad(batch), strict=True)))[0] for batch in batches]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporter and the quantizer log about themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
