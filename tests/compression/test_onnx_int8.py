"""The int8 form of a graph: what is quantized, which candidate is chosen, and answers that no batch changes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import Case, make_case, onnx_flags
from conftest import Place
from graphs import ROWS, copy, make_words, operators
from helpers import refusal, write_config
from onnxscript import ir

import evaluate
import preprocess
import train
from compression import onnx_int8
from compression.onnx_export import export_graph
from compression.onnx_graph import fuse, run_graph, simplify
from compression.onnx_int8 import Setting, int8_fraction, is_batch_invariant, quantize, quantize_tables
from sentence_classifier import classifier as runtime
from sentence_classifier.classifier import load
from util import load_checkpoint

# -------------------------------------------------------------------------------------------------------- quantize


def test_tables_in_int8(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = tiny_bert_graph
    changed = ir.from_proto(graph)
    quantize_tables(changed.graph, least=1000)
    made = ir.to_proto(changed)
    stored = {tensor.name for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert stored
    found = np.concatenate(run_graph(made, [[row] for row in ROWS]))
    with torch.inference_mode():
        expected = torch.cat([model(torch.as_tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool))
                              for row in ROWS]).numpy()
    assert 0 < np.abs(found - expected).max() < 0.05


def test_integer_operators_and_their_fraction(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    graph = simplify(copy(tiny_bert_graph[1]), 64)
    assert int8_fraction(graph) == 0.0
    made = fuse(quantize(graph, Setting((), 8), ROWS))
    assert int8_fraction(made) == 1.0 and {"QAttention", "DynamicQuantizeMatMul"} & set(operators(made))


def test_a_weight_that_is_only_stored_in_int8_is_none(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), dtype=np.int8), "weight")
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "scale")
    nodes = [onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["exact"]),
             onnx.helper.make_node("MatMul", ["x", "exact"], ["y"])]
    made = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [weight, scale]))
    assert int8_fraction(made) == 0.0


def test_a_tabulated_graph_in_int8() -> None:
    graph = simplify(export_graph(make_words(num_filters=32), tabulated=True), 64)
    made = fuse(quantize(graph, Setting(("MatMul",), 8, tabulated=True), ROWS), int8=True)
    assert int8_fraction(made) == 1.0 and not any(name in operators(made) for name in onnx_int8.FLOAT_OPERATORS)
    assert is_batch_invariant(made, ROWS)


def test_a_file_with_convolutions_tabulated_by_word(trained: Place, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)
    monkeypatch.setattr(onnx_int8, "_time", lambda graphs, *_: [float(2**-number) for number in range(len(graphs))])
    with caplog.at_level("INFO"):
        evaluate.main(onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx"))
    figures = load(trained.root / "int8.onnx").metadata["int8"]
    assert figures["setting"].startswith("convolutions tabulated by word") and figures["share"] >= 0.9
    assert "[int8: convolutions tabulated by word, " in caplog.text
    evaluate.main(onnx_flags(trained.root, "--enable_ort", "--quantize_onnx", "--device=cpu"))
    flags = onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx", "--quantized_onnx_mb=0.001")
    assert "at most 0.001 MB" in refusal(evaluate.main, *flags)
    check_labelling(trained)


def check_labelling(place: Place) -> None:
    """A teacher in ONNX writes the logits that PyTorch writes."""
    shutil.copy(place.data / "valid.txt", place.data / "augmented.raw")
    preprocess.main(place.preprocess_flags("--augmented"))
    said = []
    for flags in ([], ["--enable_ort"]):
        evaluate.main(onnx_flags(place.root, "--device=cpu", "--augmented", "--batch_size=7", *flags))
        lines = (place.data / "augmented.raw.pred").read_text(encoding="utf-8").splitlines()
        said.append(np.array([line.split("\t")[1].split() for line in lines], np.float32))
    np.testing.assert_allclose(*said, atol=1e-4)
    files = {json.loads(path.read_text())["teacher"]["model_path"].split("/")[-1]
             for path in place.data.glob("logits-*.json")}
    assert "model.onnx" in files


def check_trained_scales(root: Path) -> None:
    """The int8 file of a model of QAT holds the scales of training, and answers as PyTorch's int8 does."""
    flags = onnx_flags(root, "--device=cpu")
    evaluate.main([*flags, "--enable_qat"])
    expected = (root / "data/test.txt.pred").read_text(encoding="utf-8").splitlines()
    evaluate.main([*flags, "--convert_onnx", "--quantize_onnx"])
    figures = load(root / "int8.onnx").metadata["int8"]
    assert figures["setting"].startswith("the scales of training") and figures["share"] >= 0.9
    evaluate.main([*flags, "--enable_ort", "--quantize_onnx"])
    answered = (root / "data/test.txt.pred").read_text(encoding="utf-8").splitlines()
    changed = sum(one != other for one, other in zip(expected, answered, strict=True))
    assert changed <= max(1, len(expected) // 20)  # near ties: what a convolution answers is rounded as well
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(root / "int8.onnx").graph.initializer]
    held = {array.astype(np.float32).tobytes() for array in tensors if array.ndim == 1}
    scales = load_checkpoint(root / "model.pt").quantization["scales"]
    missing = [name for name, entry in scales.items() if len(entry["weight_scale"]) > 1
               and "pooler" not in name and entry["weight_scale"].numpy().tobytes() not in held]  # nobody reads it
    assert not missing


@pytest.mark.parametrize("encoder", ["cnn", "densenet-cnn", "densenet-dsa"])
def test_scales_of_training_on_words(encoded: Place, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)
    write_config(encoded.config, encoder)
    train.main(encoded.train_flags("--epoch=2", "--enable_qat"))
    check_trained_scales(encoded.root)


@pytest.mark.parametrize("name", ["BERT", *(pytest.param(name, marks=pytest.mark.matrix)
                                           for name in ("GPT-2", "ALBERT", "SqueezeBERT"))])
def test_scales_of_training_in_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)
    case = make_case(tmp_path / "case", name)
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=12", "--enable_qat"))
    check_trained_scales(case.root)


# --------------------------------------------------------------------------------------- neighbours in a batch


def check_neighbours(path: Path, invariant: bool) -> None:
    """Logits and predictions of an int8 file are the same in batches of every size."""
    classifier = load(path, 1)
    assert classifier.metadata["int8"]["batch_invariant"] == invariant
    generator = np.random.default_rng(5)
    rows = [generator.integers(4, 40, generator.integers(1, 30)) for _ in range(200)]
    alone = np.concatenate([classifier.logits([row]) for row in rows])
    for size in (7, 32, 200):
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        together = np.concatenate([classifier.logits(batch) for batch in batches])
        assert np.abs(together - alone).max() <= 1e-5
        assert (together.argmax(1) == alone.argmax(1)).all()
    if not invariant:  # else there is nothing that the file's entry guards against
        graph = onnx.load(path)
        assert np.abs(run_graph(graph, [rows])[0] - alone).max() > 1e-5


def test_neighbours_of_a_transformer_do_not_matter(tiny_bert: Case, tmp_path: Path) -> None:
    evaluate.main(onnx_flags(tiny_bert.root, "--convert_onnx", "--quantize_onnx", f"--onnx_path={tmp_path / 'fp32'}",
                             f"--quantized_onnx_path={tmp_path / 'int8.onnx'}"))
    check_neighbours(tmp_path / "int8.onnx", invariant=False)


@pytest.mark.parametrize(("encoder", "last"), [("cnn", True), ("densenet-dsa", False)])
def test_neighbours_of_a_word_model_do_not_matter(encoded: Place, encoder: str, last: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(encoded.config, encoder)
    train.main(encoded.train_flags("--epoch=1"))
    # The tabulated candidates come last, those that measure scales on arrival first.
    monkeypatch.setattr(onnx_int8, "_time", lambda graphs, *_: [float(2.0 ** (-n if last else n))
                                                               for n in range(len(graphs))])
    evaluate.main(onnx_flags(encoded.root, "--convert_onnx", "--quantize_onnx"))
    check_neighbours(encoded.root / "int8.onnx", invariant=last)


def test_rounding_that_a_batch_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = simplify(export_graph(make_words(), tabulated=True), 64)
    assert is_batch_invariant(graph, ROWS)

    def disturbed(graph: onnx.ModelProto, batches: Any, num_threads: int = 0) -> list[np.ndarray]:
        return [logits + 1e-4 * (len(logits) > 1) for logits in run_graph(graph, batches, num_threads)]

    monkeypatch.setattr(onnx_int8, "run_graph", disturbed)
    assert not is_batch_invariant(graph, ROWS)


# ---------------------------------------------------------------------------------------------------- processors


def test_without_vnni_weights_have_7_bits(trained: Place, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path, flags = trained.root / "int8.onnx", onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx")
    monkeypatch.setattr(onnx_int8, "has_vnni", lambda: False)
    evaluate.main(flags)
    assert load(path).metadata["int8"]["weight_bits"] == 7 and "8-bit" not in caplog.text
    for vnni in (True, None):
        caplog.clear()
        monkeypatch.setattr(onnx_int8, "has_vnni", lambda vnni=vnni: vnni)
        monkeypatch.setattr(onnx_int8, "_time", lambda graphs, *_: [1.0, *[2.0 ** n for n in range(len(graphs) - 1)]])
        evaluate.main(flags)
        assert load(path).metadata["int8"]["weight_bits"] == 8 and "7-bit" in caplog.text
    for vnni, warned in ((False, 1), (True, 0), (None, 0)):
        caplog.clear()
        monkeypatch.setattr(runtime, "has_vnni", lambda vnni=vnni: vnni)
        load(path)
        load(trained.root / "model.onnx")
        assert sum("VNNI" in record.message for record in caplog.records) == warned


# --------------------------------------------------------------------------------------------------------- refused


def test_int8_that_loses_too_much(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx"))
    monkeypatch.setattr(onnx_int8, "FRACTION_LIMIT", 1.1)
    said = refusal(evaluate.main, *onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx"))
    assert "no int8 form" in said and not (trained.root / "int8.onnx").exists()


def test_nothing_to_quantize(encoded: Place) -> None:
    write_config(encoded.config, "gnb")
    train.main(encoded.train_flags("--epoch=1"))
    said = refusal(evaluate.main, *onnx_flags(encoded.root, "--convert_onnx", "--quantize_onnx"))
    assert "no matrices" in said and not (encoded.root / "int8.onnx").exists()
