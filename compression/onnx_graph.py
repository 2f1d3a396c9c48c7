"""Rewrites of an ONNX graph that ONNX Runtime does not do itself, what training knows of it, how much is in int8.

Each rewrite changes a onnx.GraphProto in place.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

# Operators that compute each position by itself.
ROWWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Not", "Cast", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid",
           "LayerNormalization", "MatMul")
RESHAPING = ("Reshape", "Squeeze", "Unsqueeze")
MOVING = (*RESHAPING, "Expand", "Gather", "GatherElements", "Identity", "Slice")  # operators that compute nothing
INTEGER_OPERATORS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QAttention",
                     "QLinearConv", "QLinearMatMul", "QGemm")
FLOAT_OPERATORS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "Attention")
# Elements of a table of convolutions, each a byte: the file holds it, each start reads it, and the export holds several
# at once. With the shipped config 26,000 words have room; 400,000 would need two gigabytes.
TABULATED_LIMIT = 1 << 27


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
    """Remove reshapes that end where they began, casts of casts of truth values, and what nothing reads."""
    shapes, producers = _shapes(graph), _producers(graph)
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}
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
        elif node.op_type == "Cast" and kinds.get(first := origin(node.input[0], ("Cast",))) == onnx.TensorProto.BOOL:
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
    """Compute the last layers only at the position that a model classifies by.

    A `Gather` of one position of [B, T, D] moves up over operators that compute each position by itself.
    """
    while any(_move_up(graph, node) for node in graph.node if node.op_type == "Gather"):
        _join_gathers(graph)


def _join_gathers(graph: onnx.GraphProto) -> None:
    """Keep one of several Gathers that read the same, so that it can move on over what all of them read."""
    first: dict[bytes, str] = {}
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        alike = onnx.helper.make_node("Gather", node.input, ["joined"])
        alike.attribute.extend(node.attribute)
        kept = first.setdefault(alike.SerializeToString(), node.output[0])
        if kept != node.output[0]:
            _replace_uses(graph, node.output[0], kept)
            graph.node.remove(node)


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


def _constant_of(graph: onnx.GraphProto, name: str) -> int | None:
    """The integer that all elements of a value are, None where it is not told by the graph."""
    tensor = next((one for one in graph.initializer if one.name == name), None)
    if tensor is not None:
        array = numpy_helper.to_array(tensor)
        same = array.size and array.dtype.kind == "i" and (array == array.flat[0]).all()
        return int(array.flat[0]) if same else None
    node = _producers(graph).get(name)
    return _constant_of(graph, node.input[0]) if node is not None and node.op_type in MOVING else None


def shorten_lookups(graph: onnx.GraphProto, n_ctx: int) -> None:
    """Look up nothing that is known beforehand: a row that all tokens have, and rows by position.

    A `Gather` of the same row everywhere becomes that row, where it is only added; one by a piece of 0, 1, 2 ...
    becomes a piece of the table, of which no more than `n_ctx` rows stay.
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


def _walk(producers: dict[str, onnx.NodeProto], name: str, path: Sequence[tuple[str, int]]) -> list[onnx.NodeProto]:
    """The nodes of a path up from a value, each an operator and the input to go on from; fewer where it ends early."""
    found: list[onnx.NodeProto] = []
    for operator, number in path:
        node = producers.get(name)
        if node is None or node.op_type != operator:
            break
        found.append(node)
        name = node.input[number]
    return found


class _Convolution(NamedTuple):
    """Of MaxOverTimeConv one width: weight [filters, size, width], bias [filters]; what it reads."""

    lookup: onnx.NodeProto
    mask: str
    weight: np.ndarray
    bias: np.ndarray


def _convolution_of_words(graph: onnx.GraphProto, name: str) -> _Convolution | None:
    """The convolution of looked-up rows, padded by width - 1, of which a value is the maximum as MaxOverTimeConv's."""
    producers = _producers(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    up = (("Relu", 0), ("ReduceMax", 0), ("Where", 2), ("Conv", 0), ("Transpose", 0), ("Gather", 0))
    nodes = _walk(producers, name, up)
    if len(nodes) < len(up):
        return None
    _, most, masked, convolution, transpose, lookup = nodes
    masking = _walk(producers, masked.input[0], (("Not", 0), ("Unsqueeze", 0), ("Pad", 0)))
    read = [most.input[1], masked.input[1], *convolution.input[1:], lookup.input[0]]
    if len(masking) < 3 or len(read) < 5:
        return None
    _, unsqueeze, padding = masking
    read += [unsqueeze.input[1], *padding.input[1:3]]
    if len(read) < 8 or not set(read) <= set(constants):
        return None
    axis, lowest, weight, bias, vectors, place, pads, inside = (numpy_helper.to_array(constants[one]) for one in read)
    attributes = [{one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
                  for node in (most, convolution, transpose, lookup)]
    width = weight.shape[2]
    fits = (axis.tolist() in ([-1], [2]), attributes[0].get("keepdims", 1) == 0, np.isneginf(lowest).all(),
            attributes[1].get("pads") == [width - 1] * 2, attributes[1].get("group", 1) == 1,
            attributes[1].get("strides", [1]) == attributes[1].get("dilations", [1]) == [1],
            attributes[2].get("perm") == [0, 2, 1], attributes[3].get("axis", 0) == 0, vectors.ndim == 2,
            place.tolist() in ([1], 1), pads.tolist() == [0, width - 1, 0, 0], inside.all())
    return _Convolution(lookup, padding.input[0], weight, bias) if all(fits) else None


def tabulate_convolutions(graph: onnx.GraphProto, limit: int = TABULATED_LIMIT) -> bool:
    """Look up what words add to convolutions and maxima over positions that read a table of word vectors.

    A convolution is linear: what a word adds to a window depends on the word and on the tap (one position of one
    kernel) that it meets there, and on nothing else. So a table holds it for each word and tap, [words * taps, filters]
    in int8. Its scales are those of filters, the same for all words and taps of one, so that windows are summed and
    their maxima taken in integers.

    Args:
        limit: elements that the table may have; beyond it, the graph stays as it is.

    Returns:
        Whether the graph has such convolutions, all followed by a maximum, and now looks them up.
    """
    for concat in [node for node in graph.node if node.op_type == "Concat"]:
        found = [_convolution_of_words(graph, name) for name in concat.input]
        convolutions = [one for one in found if one is not None]
        alike = {(one.lookup.output[0], one.mask, len(one.bias)) for one in convolutions}
        if len(convolutions) == len(found) and len(alike) == 1:
            return _tabulate(graph, concat, convolutions, limit)
    return False


def _tabulate(graph: onnx.GraphProto, concat: onnx.NodeProto, convolutions: Sequence[_Convolution], limit: int) -> bool:
    """Put a table in the place of the convolutions that a Concat joins; whether it stays within the limit."""
    lookup, mask = convolutions[0].lookup, convolutions[0].mask
    constants = {tensor.name: tensor for tensor in graph.initializer}
    vectors = numpy_helper.to_array(constants[lookup.input[0]])
    filters, widths = len(convolutions[0].bias), [one.weight.shape[2] for one in convolutions]
    longest, taps = max(widths), sum(widths)
    if len(vectors) * taps * filters > limit or vectors[0].any():  # windows read row 0 beyond a sentence's ends
        return False
    table = np.empty((len(vectors), taps, filters), dtype=np.int8)
    scales = np.empty((len(widths), filters), dtype=np.float32)
    kernel = np.repeat(np.arange(len(widths)), widths)  # of each tap
    for number, one in enumerate(convolutions):
        added = np.stack([vectors @ tap.T for tap in np.moveaxis(one.weight, 2, 0)], 1)  # [words, taps, filters]
        scales[number] = np.maximum(np.abs(added).max((0, 1)) / 127, np.finfo(np.float32).tiny)
        table[:, kernel == number] = np.rint(added / scales[number])

    # Windows of all kernels end at the same words, so that the taps of a narrow one stand `longest - width` later.
    place = np.concatenate([np.arange(longest - width, longest) for width in widths])[:, None]
    first = np.array([longest - width for width in widths])[kernel, None]
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, array: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{concat.output[0]}_{name}"))
        return f"{concat.output[0]}_{name}"

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{concat.output[0]}_tabulated_{len(nodes)}"
        nodes.append(onnx.helper.make_node(operator, inputs, [output], **attributes))
        return output

    beside, before = constant("beside", [0, longest - 1, 0, longest - 1]), constant("before", [0, longest - 1, 0, 0])
    behind = constant("behind", [0, 0, 0, longest - 1])
    # The windows of a sentence of T words start at 0 .. T + longest - 2, counted in words with pads on both sides.
    length = node("Add", node("Shape", lookup.input[1], start=1, end=2), constant("more", [longest - 1]))
    start = node("Range", constant("from", 0), node("Squeeze", length), constant("step", 1))
    words = node("Pad", node("Mul", lookup.input[1], constant("taps", taps)), beside)
    rows = node("Add", node("Gather", words, node("Add", start, constant("place", place)), axis=1),
                constant("tap", np.arange(taps)[:, None]))  # [B, taps, windows]
    # A window that begins behind its sentence reads the first one's words once more, which changes no maximum.
    inside = node("Pad", node("Pad", mask, before, constant("true", True)), behind)
    exists = node("Gather", inside, node("Add", start, constant("first", first)), axis=1)
    axis = constant("axis", [2])
    rows = node("Where", exists, rows, node("Slice", rows, constant("begin", [0]), constant("end", [1]), axis))
    # The windows side by side make one product: [kernels, taps] by [B, taps, windows * filters].
    looked_up = node("Gather", constant("table", table.reshape(-1, filters)), rows)
    looked_up = node("Reshape", looked_up, constant("side_by_side", [0, taps, -1]))
    members = constant("members", (kernel == np.arange(len(widths))[:, None]).astype(np.uint8))
    sums = node("Reshape", node("MatMulInteger", members, looked_up),
                constant("windows", [0, len(widths), -1, filters]))
    most = node("ReduceMax", sums, axis, keepdims=0)  # [B, kernels, filters]
    most = node("Mul", node("Cast", most, to=onnx.TensorProto.FLOAT), constant("scales", scales))
    most = node("Relu", node("Add", most, constant("biases", np.stack([one.bias for one in convolutions]))))
    nodes.append(onnx.helper.make_node("Reshape", [most, constant("flat", [0, len(widths) * filters])],
                                       [concat.output[0]]))
    at = list(graph.node).index(concat)
    graph.node.remove(concat)
    for new in reversed(nodes):
        graph.node.insert(at, new)
    tidy(graph)
    return True


def trained_scales(exported: onnx.ModelProto, graph: onnx.ModelProto,
                   scales: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What quantization-aware training found, for the graph's tensors: of each product its input and its weight.

    Args:
        exported: as torch's exporter made it; its operators know the modules that they come from.
        graph: that one simplified, with each product an operator of its own.
        scales: by module name; see quantization.scales_of.
    """
    modules: dict[str, str] = {}
    for node in exported.graph.node:
        said = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = next((name for name in reversed(ast.literal_eval(said)) if name in scales), None)
        if module and node.op_type in FLOAT_OPERATORS:
            # replace_gemm_with_matmul says so of weights that it transposed.
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


def int8_share(graph: onnx.ModelProto) -> float | None:
    """The share of matrix and convolution weights that integer operators compute with, None where there are none.

    A table of `tabulate_convolutions` counts by its elements: its rows, looked up, are what an integer operator sums.
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
