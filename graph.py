"""Rewrites of an ONNX graph that ONNX Runtime does not do itself. Each changes a onnx.GraphProto in place."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Operators that compute each position by itself.
ROWWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Not", "Cast", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid",
           "LayerNormalization", "MatMul")


def _shapes(graph: onnx.GraphProto) -> dict[str, list[Any]]:
    """The dimensions of each value by name: numbers, names of dynamic ones, "" where unknown."""
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
    """Remove reshapes that end where they began, and what nothing reads."""
    shapes, producers = _shapes(graph), _producers(graph)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type != "Reshape" or node.output[0] in outputs:
            continue
        origin = node.input[0]
        while origin in producers and producers[origin].op_type == "Reshape":
            origin = producers[origin].input[0]
        shape = shapes.get(origin, [""])
        if all(shape) and shape == shapes.get(node.output[0]):
            _replace_uses(graph, node.output[0], origin)
    used = outputs
    for node in reversed(list(graph.node)):  # nodes stand in the order of computation
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used = used | set(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def select_early(graph: onnx.GraphProto) -> None:
    """Compute the last layers only at the position that a model classifies by.

    A `Gather` of one position of [B, T, D] moves up over operators that compute each position by itself.
    """
    while any(_move_up(graph, node) for node in graph.node if node.op_type == "Gather"):
        pass


def _move_up(graph: onnx.GraphProto, gather: onnx.NodeProto) -> bool:
    """Move a Gather of one position over the node that it reads; whether it could be."""
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


def quantize_tables(graph: onnx.GraphProto, least: int = 1 << 16) -> None:
    """Store tables of vectors, from which rows are looked up, in int8 with a scale for each row.

    Args:
        least: elements that a table must have for this to pay.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer
              if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= least}
    readers = {name: [node for node in graph.node if name in node.input] for name in tables}
    for name, nodes in readers.items():
        if not all(node.op_type == "Gather" and not any(a.name == "axis" and a.i for a in node.attribute)
                   for node in nodes):
            continue
        table = numpy_helper.to_array(tables[name])
        scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        graph.initializer.remove(tables[name])
        graph.initializer.append(numpy_helper.from_array(np.rint(table / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        for node in nodes:
            at, out = list(graph.node).index(node), node.output[0]
            for new in reversed([
                onnx.helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{out}_int8"]),
                onnx.helper.make_node("Cast", [f"{out}_int8"], [f"{out}_cast"], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{out}_scale"]),
                onnx.helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
            ]):
                graph.node.insert(at, new)
            graph.node.remove(node)
