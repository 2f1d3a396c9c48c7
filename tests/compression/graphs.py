"""Graphs and rows of token ids that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from helpers import DIM, make_config

from model import Classifier, WordEmbedding, build_model

ROWS = [np.array(row) for row in ([5, 6, 7, 8, 9, 10, 11], [5], [6, 7], [9] * 40, [12, 5, 6])]


def copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, to be changed."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    return made


def operators(graph: onnx.ModelProto) -> list[str]:
    """The operators of a graph, in its order."""
    return [node.op_type for node in graph.graph.node]


def make_words(encoder: str = "cnn", /, **changes: Any) -> Classifier:
    """A random model on word vectors."""
    torch.manual_seed(3)
    model = build_model(make_config(encoder, **changes), 4, WordEmbedding(torch.randn(50, DIM), 30)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
