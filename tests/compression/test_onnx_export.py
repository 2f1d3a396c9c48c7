"""Export to ONNX: every architecture through evaluate.py, the modules that replace others, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES
from cases import Case, onnx_flags, train_case
from conftest import Place
from graphs import ROWS, make_words, operators
from helpers import DIM, ENCODERS, ROOT, code_hash, refusal, snapshot, write_config

import evaluate
import train
from compression import onnx_export as export
from dataset import pad
from model import Classifier, StackedEncoder, WordEmbedding, load_classifier
from sentence_classifier.classifier import METADATA_KEY, VOCABULARY_KEY, load
from sentence_classifier.errors import InputError
from util import RunInfo, load_checkpoint

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
    metadata = load(root / "model.onnx").metadata
    int8 = load(root / "int8.onnx").metadata["int8"] if "ONNX int8" in ways else {}
    return {"accuracy": figures, "difference": metadata["difference"], "int8": int8}


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
    sources = (ROOT / "compression" / file for file in ("onnx_export.py", "onnx_graph.py", "onnx_int8.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    kept = ROOT / ".matrix/onnx" / f"{name}-{encoder}-{code_hash()}-{code}.json"
    if not kept.exists():
        figures = run_ways(train_case(tmp_path / "case", name, encoder).root)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"architecture": name, "encoder": encoder, **figures}))
    check_ways(json.loads(kept.read_text()))


# ---------------------------------------------------------------------------------------------------------- graphs


def test_the_model_is_as_before_after_an_export(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    model, graph = tiny_bert_graph
    assert model.embedding.transformer.config._attn_implementation != "onnx"
    export.check(graph, model, ROWS)


def summed_windows(words: torch.Tensor, made: export.TabulatedConvolutions, width: int, first: int) -> torch.Tensor:
    """A kernel's windows, tap by tap: words [T] -> [windows, filters] int64. `first` is its first tap's number."""
    padded = torch.cat((torch.zeros(width - 1), words, torch.zeros(width - 1))).long()
    table = made.table.view(-1, made.taps, made.table.shape[1]).long()
    return torch.stack([sum(table[padded[at + tap], first + tap] for tap in range(width))
                        for at in range(len(words) + width - 1)])


@pytest.mark.parametrize("sizes", [[2, 3, 4, 5, 6], [5, 1], [1]])
def test_tabulated_convolutions(sizes: list[int]) -> None:
    model = make_words(kernel_sizes=sizes, num_filters=32)
    batch = pad(ROWS)
    with export.ready_for_export(model, tabulated=True) as view, torch.inference_mode():
        made = view.encoder
        found = made(batch.input_ids, batch.attention_mask)
        vectors = export.TableLookup(model.embedding).table
        close = model.encode(batch.input_ids, batch.attention_mask)
    assert made.table.shape == (50 * sum(sizes), 32) and made.table.dtype == torch.int8
    # By hand: the table holds each filter's int8 levels; the answer is the maximum of integer sums, times the scale.
    expected, first = [], 0
    for kernel, (size, convolution) in enumerate(zip(sizes, model.encoder.cnn.convolutions, strict=True)):
        added = torch.einsum("vd,fdk->vkf", vectors, convolution.weight.detach())
        scale = added.abs().amax((0, 1)) / 127
        torch.testing.assert_close(made.scales[kernel], scale)
        levels = made.table.view(50, made.taps, 32)[:, first : first + size]
        assert (levels * scale - added).abs().max() <= 0.501 * scale.max()
        most = torch.stack([summed_windows(torch.tensor(row), made, size, first).amax(0) for row in ROWS])
        expected.append((most * made.scales[kernel] + convolution.bias.detach()).relu())
        first += size
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert 0 < (found - close).abs().max() < 0.02 * close.abs().max()


def test_the_graph_of_tabulated_convolutions() -> None:
    model = make_words(num_filters=32)
    graph = export.export_graph(model, tabulated=True)
    assert export.check(graph, ready(model), ROWS) < 1e-5
    assert operators(graph).count("MatMulInteger") == 1 and "Conv" not in operators(graph)
    assert (50, DIM) not in {tuple(tensor.dims) for tensor in graph.graph.initializer}  # nobody reads the vectors
    assert isinstance(model.embedding, WordEmbedding) and isinstance(model.encoder, StackedEncoder)


def ready(model: Classifier) -> Any:
    """The view that is exported, in PyTorch."""
    with export.ready_for_export(model, tabulated=True) as view:
        return view


@pytest.mark.parametrize(("encoder", "limit", "fits"), [
    ("cnn", 50 * 9 * 8, True), ("cnn", 50 * 9 * 8 - 1, False), ("densenet-cnn", 1 << 27, False)])
def test_what_can_be_tabulated(encoder: str, limit: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TABULATED_LIMIT", limit)
    changes = {"kernel_sizes": [2, 3, 4], "num_filters": 8} if encoder == "cnn" else {}
    model = make_words(encoder, **changes)
    assert export.word_convolutions(model) is (model.encoder.cnn if fits else None)


def test_transformers_are_not_tabulated(tiny_bert_graph: tuple[Any, onnx.ModelProto]) -> None:
    assert export.word_convolutions(tiny_bert_graph[0]) is None


def test_pad_rows_and_unseen_words_of_a_table(trained: Place) -> None:
    model = load_classifier(load_checkpoint(trained.model), [str(trained.data)]).eval()
    rows = [np.array([2, 3, 40, 41, 42]), np.array([1]), np.array([len(model.embedding.frozen) + 3, 2])]
    assert export.check(export.fuse(export.simplify(export.export_graph(model), 64)), model, rows) < 1e-5


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(trained: Place, opset: int) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx", f"--onnx_opset={opset}"))
    versions = {one.domain: one.version for one in onnx.load(trained.root / "model.onnx").opset_import}
    assert versions[""] == opset


def test_one_file(tiny_bert: Case, tmp_path: Path) -> None:
    before = set(snapshot(tiny_bert.root))
    evaluate.main(onnx_flags(tiny_bert.root, "--convert_onnx", f"--onnx_path={tmp_path / 'one.onnx'}"))
    assert set(snapshot(tiny_bert.root)) == before
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


def test_too_large_for_one_file(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SIZE_LIMIT", 100)
    assert "at most 2 GB" in refused_without_a_trace(trained, "--convert_onnx")


def test_data_that_are_not_there(trained: Place) -> None:
    (trained.data / "valid.txt.ids").unlink()
    assert "valid.txt.ids: no such file" in refused_without_a_trace(trained, "--convert_onnx")


def test_flags_that_go_together(trained: Place) -> None:
    assert "--convert_onnx" in refused_without_a_trace(trained, "--quantize_onnx")
    assert "CPU" in refused_without_a_trace(trained, "--enable_ort", "--device=cuda")


def test_the_metadata(trained: Place) -> None:
    evaluate.main(onnx_flags(trained.root, "--convert_onnx"))
    run = load_checkpoint(trained.model).run
    held = onnxruntime.InferenceSession(str(trained.root / "model.onnx")).get_modelmeta().custom_metadata_map
    found = RunInfo.from_json(json.loads(held[METADATA_KEY])["run"], vocabulary=held[VOCABULARY_KEY])
    assert found.to_json() == run.to_json()
    with pytest.raises(InputError, match="no such file"):
        load(trained.root / "other.onnx")


def test_padding_is_of_no_consequence(tiny_bert: Case, tmp_path: Path) -> None:
    """Law 1 of the exported file."""
    evaluate.main(onnx_flags(tiny_bert.root, "--convert_onnx", f"--onnx_path={tmp_path / 'one.onnx'}"))
    classifier = load(tmp_path / "one.onnx", 1)
    together = classifier.logits(ROWS)
    alone = np.concatenate([classifier.logits([row]) for row in ROWS])
    assert np.abs(together - alone).max() < 1e-5
    assert pad(ROWS).input_ids.shape == (5, 40)
