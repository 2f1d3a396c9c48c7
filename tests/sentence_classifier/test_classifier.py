"""The exported file as a library: answers, what it loads, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import onnx_flags, train_case
from conftest import Place
from helpers import ROOT, make_lines, refusal, snapshot

import evaluate
import preprocess
from sentence_classifier.classifier import METADATA_KEY, VOCABULARY_KEY, load
from sentence_classifier.errors import InputError
from text.labels import read_labels

SENTENCES = [sentence for sentence, _ in make_lines(21, 2)]  # of test.txt


@pytest.fixture(scope="module")
def words(trained_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained CNN and its model.onnx. Not to be changed."""
    place = trained_once.copy(tmp_path_factory.mktemp("words") / "place")
    evaluate.main(onnx_flags(place.root, "--convert_onnx"))
    return place


@pytest.fixture
def own(words: Place, tmp_path: Path) -> Place:
    """The same, of the test's own."""
    return words.copy(tmp_path / "own")


# --------------------------------------------------------------------------------------------------------- answers


def test_one_sentence_and_many(words: Place) -> None:
    classifier = load(words.root / "model.onnx", num_threads=1)
    many = classifier.predict([*SENTENCES, "jazz"], batch_size=4)
    for sentence, found in zip([*SENTENCES, "jazz"], many, strict=True):
        alone = classifier.predict(sentence)
        assert alone.label == found.label and alone.probability == max(alone.probabilities.values())
        assert alone.probabilities == pytest.approx(found.probabilities, abs=1e-6)
        assert sum(alone.probabilities.values()) == pytest.approx(1.0, abs=1e-6)
        assert list(alone.probabilities) == list(read_labels(words.data / "label.txt").names)
    assert classifier.predict([]) == []


def test_answers_are_those_of_the_checkpoint(words: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (source := words.root / "in.txt").write_text("\n".join([*SENTENCES, "unseen words only", "w " * 300]))
    said = []
    for flags in ([], ["--enable_ort"], ["--enable_ort", "--batch_size=5"], ["--enable_ort", "--enable_inference"]):
        monkeypatch.setattr(sys, "stdout", text := io.StringIO())
        evaluate.main(onnx_flags(words.root, f"--input_path={source}", *flags))
        said.append([json.loads(line) for line in text.getvalue().splitlines()])
    for other in said[1:]:
        for one, same in zip(said[0], other, strict=True):
            assert (one["sentence"], one["label"]) == (same["sentence"], same["label"])
            assert one["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)


def test_longer_than_n_ctx(words: Place) -> None:
    """Rows that somebody else tokenized."""
    classifier = load(words.root / "model.onnx")
    row = np.full(classifier.metadata["run"]["encoding"]["n_ctx"] + 20, 3)
    assert classifier.logits([row]).shape == (1, 4)


def test_nothing_else_is_needed(own: Place, tmp_path: Path) -> None:
    for path in [*own.data.iterdir(), own.model]:
        path.unlink()
    assert load(own.root / "model.onnx").predict("play some jazz").label


# ------------------------------------------------------------------------------------------------- what it loads


HEAVY = ("torch", "transformers", "accelerate", "onnx", "tensorboardX")
PROGRAM = "import sys\n{}\nprint('loaded:', *sorted(sys.modules))"


def loaded(code: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    process = subprocess.run([sys.executable, "-c", PROGRAM.format(code)], cwd=ROOT, capture_output=True, text=True,
                             input="play some jazz\n", check=False)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split("loaded:")[1].split())


def raw_text(root: Path, *more: str) -> str:
    return f"import evaluate\nevaluate.main({onnx_flags(root, '--enable_ort', '--enable_inference', *more)!r})"


def test_raw_text_loads_no_torch(words: Place) -> None:
    for code in (raw_text(words.root, "--bert_output_dir="), raw_text(words.root, "--input_path=-"),
                 f"from sentence_classifier.classifier import load\n"
                 f"load({str(words.root / 'model.onnx')!r}).predict('play some jazz')"):
        modules = loaded(code)
        assert "onnxruntime" in modules and modules.isdisjoint(HEAVY)
        if "enable_ort" not in code or "input_path" in code:
            assert modules.isdisjoint(("sklearn", "matplotlib"))


def test_raw_text_of_a_transformer_loads_no_torch(tmp_path: Path) -> None:
    case = train_case(tmp_path / "case", "BERT", "cls", 1)
    evaluate.main(onnx_flags(case.root, "--convert_onnx"))
    for more in ([f"--bert_output_dir={case.root / 'out'}"], ["--input_path=-"]):
        modules = loaded(raw_text(case.root, *more))
        assert {"onnxruntime", "tokenizers"} <= modules and modules.isdisjoint(HEAVY)
    said = refusal(evaluate.main, *onnx_flags(case.root, "--enable_ort", f"--bert_output_dir={case.root / 'model'}"))
    assert "not written by train.py" in said
    classifier = load(case.root / "model.onnx")
    with pytest.raises(ValueError, match=r"sentence 2: .* surrogates not allowed"):
        classifier.predict(["play", "half a pair: \ud83d"])
    with pytest.raises(ValueError, match="sentence 1: "):
        classifier.predict("\ud83d")


# --------------------------------------------------------------------------------------------------------- refused


def refused(place: Place, *flags: Any) -> str:
    before = snapshot(place.root)
    said = refusal(evaluate.main, *onnx_flags(place.root, "--enable_ort", *flags))
    assert snapshot(place.root) == before
    return said


def rewrite(path: Path, **metadata: str) -> None:
    """Write an .onnx file's graph again with other metadata."""
    graph = onnx.load(path)
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_a_truncated_file(own: Place, share: float) -> None:
    path = own.root / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for flags in ([], ["--enable_inference"], ["--input_path=-"]):
        assert "model.onnx: " in refused(own, *flags)


@pytest.mark.parametrize(("content", "says"), [(b"\x89PNG\r\n", "not a whole ONNX file"), (None, "no such file")])
def test_a_foreign_file(own: Place, content: bytes | None, says: str) -> None:
    (own.root / "model.onnx").unlink()
    if content:
        (own.root / "model.onnx").write_bytes(content)
    assert says in refused(own)


def test_a_checkpoint_in_the_place_of_an_onnx_file(own: Place) -> None:
    assert "not a whole ONNX file" in refused(own, f"--onnx_path={own.model}")


def test_no_metadata(own: Place) -> None:
    rewrite(own.root / "model.onnx")
    assert "without this toolkit's metadata" in refused(own)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"format": 99}', '{"format": 1, "labels": 3}'])
def test_unusable_metadata(own: Place, record: str) -> None:
    rewrite(own.root / "model.onnx", **{METADATA_KEY: record, VOCABULARY_KEY: "<pad>\n<unk>\n"})
    assert "its metadata cannot be used" in refused(own)


def test_labels_of_other_data(own: Place, raw: Place) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        path = raw.data / name
        path.write_text(path.read_text(encoding="utf-8").replace("PlayMusic", "PlayVideo"), encoding="utf-8")
    preprocess.main(raw.preprocess_flags())
    assert "PlayVideo" in refused(own, f"--data_dir={raw.data}")
    assert "unknown label 'PlayVideo'" in refused(own, f"--data_dir={raw.data}", "--enable_inference")


def test_the_config_of_another_model(own: Place) -> None:
    config = json.loads(own.config.read_text())
    (own.root / "other.json").write_text(json.dumps({**config, "num_filters": 3}))
    assert "num_filters" in refused(own, f"--config={own.root / 'other.json'}")


def test_an_int8_file_that_is_not_there(own: Place) -> None:
    assert "int8.onnx: no such file" in refused(own, "--quantize_onnx")


def test_load_raises(own: Place) -> None:
    (own.root / "model.onnx").write_bytes(b"no")
    with pytest.raises(InputError):
        load(own.root / "model.onnx")


def test_predict_raises(words: Place) -> None:
    classifier = load(words.root / "model.onnx")
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            classifier.predict(SENTENCES, batch_size=size)
