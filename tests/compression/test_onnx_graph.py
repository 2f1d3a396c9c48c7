"""Rewrites of graphs: what they compute stays the same, with fewer and other operators."""

from __future__ import annotations

from typing import Any

import onnx
from architectures import HIDDEN, POSITIONS
from graphs import ROWS, copy, operators
from onnxscript import ir

from compression.onnx_export import check
from compression.onnx_graph import fuse, pack_attention, select_early, shorten_lookups, simplify, tidy


def test_each_rewrite_computes_the_same(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = tiny_bert_graph
    made = copy(graph)
    for step in (tidy, lambda model: shorten_lookups(model.graph, 64), select_early,
                 lambda model: pack_attention(model.graph), tidy):
        before, changed = operators(made), ir.from_proto(made)
        step(changed)
        made = ir.to_proto(changed)
        assert check(made, model, ROWS) < 1e-5
        assert operators(made) != before or step is tidy
    assert operators(made).count("Attention") == 3 and "MultiHeadAttention" not in operators(made)


def test_what_all_tokens_have_is_not_looked_up(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    names = operators(simplify(tiny_bert_graph[1], 64))
    assert names[: names.index("LayerNormalization")].count("Gather") == 1  # of words: neither of types nor of places
    assert not {"GatherElements", "Expand", "GreaterOrEqual"} & set(names)
    short = simplify(tiny_bert_graph[1], 40)
    sizes = {tuple(tensor.dims) for tensor in short.graph.initializer}
    assert (1, 40, HIDDEN) in sizes and (POSITIONS, HIDDEN) not in sizes
    assert check(short, tiny_bert_graph[0], ROWS) < 1e-5


def test_the_last_layer_is_computed_at_one_position(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    made = simplify(copy(tiny_bert_graph[1]), 64)
    names = operators(made)
    last = len(names) - 1 - names[::-1].index("Attention")
    assert names[last + 1] == "Gather" and names[last:].count("MatMul") >= 3  # its projection, two of the network


def test_what_onnx_runtime_fuses(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    fused = operators(fuse(simplify(copy(tiny_bert_graph[1]), 64)))
    counts = [fused.count(name) for name in ("Attention", "BiasGelu", "LayerNormalization", "SkipLayerNormalization")]
    assert counts == [3, 2, 7, 0]  # after three layers, of which the last is computed at one position
