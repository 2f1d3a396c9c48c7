"""Export to ONNX and int8: every architecture through evaluate.py, the rewrites of graphs, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES, HIDDEN, POSITIONS
from cases import Case, make_case, onnx_flags, train_case
from conftest import Place
from helpers import DIM, ENCODERS, ROOT, code_hash, make_config, refusal, snapshot, write_config

import evaluate
import preprocess
import train
from compression import onnx_export as export
from compression.onnx_graph import (
    pack_attention,
    quantize_tables,
    select_early,
    shorten_lookups,
    tabulate_convolutions,
    tidy,
)
from dataset import pad
from model import Classifier, WordEmbedding, build_model, load_classifier
from sentence_classifier.classifier import RECORD_KEY, load
from sentence_classifier.errors import InputError
from util import load_checkpoint

# Attention that is fused, a model all of convolutions, and one that looks back only. The matrix has them all.
SLICE = [("BERT", "cls"), ("SqueezeBERT", "cls"), ("GPT-2", "cnn")]
MATRIX = [(name, encoder) for name in ARCHITECTURES for encoder in ("cls", "cnn")]
WAYS = {"PyTorch": [], "ONNX": ["--enable_ort"], "ONNX int8": ["--enable_ort", "--quantize_onnx"]}
MODES = {"pred": [], "inference": ["--enable_inference"]}


def run_ways(root: Path, ways: dict[str, list[str]] = WAYS) -> dict[str, Any]:
    """Convert a trained model and evaluate it in every way and mode; the figures for the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "draw_confusion", lambda *_: None)
        evaluate.main(onnx_flags(root, "--convert_onnx", *(["--quantize_onnx"] if "ONNX int8" in ways else [])))
        said: dict[str, dict[str, str]] = {}
        for way, flags in ways.items():
            for mode, more in MODES.items():
                evaluate.main(onnx_flags(root, "--device=cpu", *flags, *more))
                said.setdefault(way, {})[mode] = (root / f"data/test.txt.{mode}").read_text(encoding="utf-8")
    rows = {way: [line.split("\t") for line in texts["pred"].splitlines()] for way, texts in said.items()}
    assert all(texts["pred"] == texts["inference"] for texts in said.values())  # tokenized and raw
    assert said["ONNX"] == said["PyTorch"]
    figures = {way: sum(label == answer for _, label, answer in rows[way]) / len(rows[way]) for way in rows}
    record = load(root / "model.onnx").record
    int8 = load(root / "int8.onnx").record["int8"] if "ONNX int8" in ways else {}
    return {"accuracy": figures, "difference": record["difference"], "int8": int8}


def check_ways(figures: dict[str, Any]) -> None:
    """What the matrix asks of every model."""
    assert figures["difference"] <= 1e-4, figures
    if int8 := figures["int8"]:
        assert int8["share"] >= 0.9, figures
        allowed = max(0.005, 1 / int8["examples"])  # a sentence of a small file is more than half a point
        assert int8["accuracy"] >= int8["accuracy_fp32"] - allowed - 1e-9, figures


@pytest.mark.parametrize(("name", "encoder"), SLICE)
def test_slice(tmp_path: Path, name: str, encoder: str) -> None:
    check_ways(run_ways(train_case(tmp_path / "case", name, encoder).root))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_words(encoded: Place, encoder: str) -> None:
    write_config(encoded.config, encoder)
    train.main(encoded.train_flags("--epoch=6"))
    ways = {way: flags for way, flags in WAYS.items() if encoder != "gnb" or way != "ONNX int8"}
    check_ways(run_ways(encoded.root, ways))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "encoder"), MATRIX)
def test_matrix(tmp_path: Path, name: str, encoder: str) -> None:
    """Figures go to .matrix/onnx/; what stands there already, by the same code, is not run again."""
    sources = (ROOT / "compression" / file for file in ("onnx_export.py", "onnx_graph.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    kept = ROOT / ".matrix/onnx" / f"{name}-{encoder}-{code_hash()}-{code}.json"
    if not kept.exists():
        figures = run_ways(train_case(tmp_path / "case", name, encoder).root)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"architecture": name, "encoder": encoder, **figures}))
    check_ways(json.loads(kept.read_text()))


# ---------------------------------------------------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny BERT, hardly trained. Not to be changed."""
    return train_case(tmp_path_factory.mktemp("bert") / "case", "BERT", "cls", 1)


@pytest.fixture(scope="module")
def bert_graph(bert: Case) -> tuple[Any, onnx.ModelProto]:
    """The classifier and its graph as the exporter leaves it. Not to be changed."""
    model = load_classifier(load_checkpoint(bert.root / "model.pt"), []).eval()
    return model, export.export_graph(model)


def copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    return made


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


ROWS = [np.array(row) for row in ([5, 6, 7, 8, 9, 10, 11], [5], [6, 7], [9] * 40, [12, 5, 6])]


def test_the_model_is_as_before_after_an_export(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = bert_graph
    assert model.embedding.transformer.config._attn_implementation != "onnx"
    export.check(graph, model, ROWS)


def test_each_rewrite_computes_the_same(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = bert_graph
    made = copy(graph)
    for step in (tidy, lambda graph: shorten_lookups(graph, 64), select_early, pack_attention, tidy):
        before = operators(made)
        step(made.graph)
        assert export.check(made, model, ROWS) < 1e-5
        assert operators(made) != before or step is tidy
    assert operators(made).count("Attention") == 3 and "MultiHeadAttention" not in operators(made)


def test_what_all_tokens_have_is_not_looked_up(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    names = operators(export.simplify(bert_graph[1], 64))
    assert names[: names.index("LayerNormalization")].count("Gather") == 1  # of words: neither of types nor of places
    assert not {"GatherElements", "Expand", "GreaterOrEqual"} & set(names)
    short = export.simplify(bert_graph[1], 40)
    sizes = {tuple(tensor.dims) for tensor in short.graph.initializer}
    assert (1, 40, HIDDEN) in sizes and (POSITIONS, HIDDEN) not in sizes
    assert export.check(short, bert_graph[0], ROWS) < 1e-5


def test_the_last_layer_is_computed_at_one_position(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    made = export.simplify(copy(bert_graph[1]), 64)
    names = operators(made)
    last = len(names) - 1 - names[::-1].index("Attention")
    assert names[last + 1] == "Gather" and names[last:].count("MatMul") >= 3  # its projection, two of the network


def test_what_onnx_runtime_fuses(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    fused = operators(export.fuse(export.simplify(copy(bert_graph[1]), 64)))
    counts = [fused.count(name) for name in ("Attention", "BiasGelu", "LayerNormalization", "SkipLayerNormalization")]
    assert counts == [3, 2, 7, 0]  # after three layers, of which the last is computed at one position


def test_tables_in_int8(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = bert_graph
    made = copy(graph)
    quantize_tables(made.graph, least=1000)
    stored = {tensor.name for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert stored
    found = np.concatenate(export.run_graph(made, [[row] for row in ROWS]))
    with torch.inference_mode():
        expected = torch.cat([model(torch.as_tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool))
                              for row in ROWS]).numpy()
    assert 0 < np.abs(found - expected).max() < 0.05


def test_integer_operators_and_their_share(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    graph = export.simplify(copy(bert_graph[1]), 64)
    assert export.int8_share(graph) == 0.0
    made = export.fuse(export.quantize(graph, export.Setting((), 8), ROWS))
    assert export.int8_share(made) == 1.0 and {"QAttention", "DynamicQuantizeMatMul"} & set(operators(made))


def make_words(encoder: str = "cnn", /, **changes: Any) -> tuple[Classifier, onnx.ModelProto]:
    """A random model of word vectors, and its graph."""
    torch.manual_seed(3)
    model = build_model(make_config(encoder, **changes), 4, WordEmbedding(torch.randn(50, DIM), 30)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, export.simplify(export.export_graph(model), 64)


@pytest.mark.parametrize("sizes", [[2, 3, 4, 5, 6], [5, 1]])
def test_convolutions_tabulated_by_word(sizes: list[int]) -> None:
    model, graph = make_words(kernel_sizes=sizes, num_filters=32)
    made = copy(graph)
    assert tabulate_convolutions(made.graph) and "Conv" not in operators(made)
    assert {tuple(tensor.dims) for tensor in made.graph.initializer} >= {(50 * sum(sizes), 32)}
    assert (50, DIM) not in {tuple(tensor.dims) for tensor in made.graph.initializer}  # nobody reads the vectors
    batch = pad(ROWS)
    with torch.inference_mode():
        expected = model(batch.input_ids, batch.attention_mask).numpy()
    together = export.run_graph(made, [ROWS])[0]
    alone = np.concatenate(export.run_graph(made, [[row] for row in ROWS]))
    assert 0 < np.abs(together - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(together - alone).max() < 1e-5
    int8 = export.fuse(export.quantize(made, export.Setting((), 8, tabulated=True), ROWS), int8=True)
    assert export.int8_share(int8) == 1.0 and export.int8_share(graph) == 0.0


@pytest.mark.parametrize(("encoder", "limit"), [("cnn", 50 * 20 * 5 - 1), ("densenet-cnn", 1 << 27)])
def test_convolutions_that_are_not_tabulated(encoder: str, limit: int) -> None:
    graph = make_words(encoder)[1]
    before = graph.SerializeToString()
    assert not tabulate_convolutions(graph.graph, limit) and graph.SerializeToString() == before


def test_a_file_with_convolutions_tabulated_by_word(trained: Place, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)
    monkeypatch.setattr(export, "_time", lambda graphs, *_: [float(2**-number) for number in range(len(graphs))])
    with caplog.at_level("INFO"):
        evaluate.main(onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx"))
    figures = load(trained.root / "int8.onnx").record["int8"]
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
    figures = load(root / "int8.onnx").record["int8"]
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


def test_a_weight_that_is_only_stored_in_int8_is_none(bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), dtype=np.int8), "weight")
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "scale")
    nodes = [onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["exact"]),
             onnx.helper.make_node("MatMul", ["x", "exact"], ["y"])]
    made = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [weight, scale]))
    assert export.int8_share(made) == 0.0


def test_pad_rows_and_unseen_words_of_a_table(trained: Place) -> None:
    model = load_classifier(load_checkpoint(trained.model), [str(trained.data)]).eval()
    rows = [np.array([2, 3, 40, 41, 42]), np.array([1]), np.array([len(model.embedding.frozen) + 3, 2])]
    assert export.check(export.fuse(export.simplify(export.export_graph(model), 64)), model, rows) < 1e-5


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(trained: Place, opset: int) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx", f"--onnx_opset={opset}"))
    versions = {one.domain: one.version for one in onnx.load(trained.root / "model.onnx").opset_import}
    assert versions[""] == opset


def test_one_file(bert: Case, tmp_path: Path) -> None:
    before = set(snapshot(bert.root))
    evaluate.main(onnx_flags(bert.root, "--convert_onnx", f"--onnx_path={tmp_path / 'one.onnx'}"))
    assert set(snapshot(bert.root)) == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".onnx", ".data", ".tmp")] == ["one.onnx"]


# --------------------------------------------------------------------------------------------------------- refused


def refused_without_a_trace(place: Place, *flags: Any) -> str:
    before = snapshot(place.root)
    said = refusal(evaluate.main, *onnx_flags(place.root, *flags))
    assert snapshot(place.root) == before
    return said


def test_a_failing_check_leaves_no_file(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(graph: onnx.ModelProto) -> onnx.ModelProto:
        made = fuse(graph)
        for tensor in made.graph.initializer:
            if len(tensor.dims) > 1:
                array = onnx.numpy_helper.to_array(tensor) + 0.01
                tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
        return made

    fuse = export.fuse
    monkeypatch.setattr(export, "fuse", disturbed)
    assert "does not agree with PyTorch" in refused_without_a_trace(trained, "--convert_onnx")


def test_a_failing_check_leaves_the_old_file(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained.root / "model.onnx").write_bytes(b"old")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    refused_without_a_trace(trained, "--convert_onnx")


def test_int8_that_loses_too_much(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx"))
    monkeypatch.setattr(export, "SHARE_LIMIT", 1.1)
    said = refusal(evaluate.main, *onnx_flags(trained.root, "--convert_onnx", "--quantize_onnx"))
    assert "no int8 form" in said and not (trained.root / "int8.onnx").exists()


def test_nothing_to_quantize(encoded: Place) -> None:
    write_config(encoded.config, "gnb")
    train.main(encoded.train_flags("--epoch=1"))
    said = refusal(evaluate.main, *onnx_flags(encoded.root, "--convert_onnx", "--quantize_onnx"))
    assert "no matrices" in said and not (encoded.root / "int8.onnx").exists()


def test_too_large_for_one_file(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SIZE_LIMIT", 100)
    assert "at most 2 GB" in refused_without_a_trace(trained, "--convert_onnx")


def test_data_that_are_not_there(trained: Place) -> None:
    (trained.data / "valid.txt.ids").unlink()
    assert "valid.txt.ids: no such file" in refused_without_a_trace(trained, "--convert_onnx")


def test_flags_that_go_together(trained: Place) -> None:
    assert "--convert_onnx" in refused_without_a_trace(trained, "--quantize_onnx")
    assert "cpu" in refused_without_a_trace(trained, "--enable_ort", "--device=cuda")


def test_the_record(trained: Place) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx"))
    checkpoint = load_checkpoint(trained.model)
    metadata = onnxruntime.InferenceSession(str(trained.root / "model.onnx")).get_modelmeta().custom_metadata_map
    record = json.loads(metadata[RECORD_KEY])
    assert all(record[key] == checkpoint[key] for key in ("run_id", "labels", "facts", "config"))
    with pytest.raises(InputError, match="no such file"):
        load(trained.root / "other.onnx")


def test_padding_is_of_no_consequence(bert: Case, tmp_path: Path) -> None:
    """Law 1 of the exported file."""
    evaluate.main(onnx_flags(bert.root, "--convert_onnx", f"--onnx_path={tmp_path / 'one.onnx'}"))
    classifier = load(tmp_path / "one.onnx", 1)
    together = classifier.logits(ROWS)
    alone = np.concatenate([classifier.logits([row]) for row in ROWS])
    assert np.abs(together - alone).max() < 1e-5
    assert pad(ROWS).input_ids.shape == (5, 40)
