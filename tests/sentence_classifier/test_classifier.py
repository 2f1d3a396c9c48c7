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
from helpers import ENCODERS, ROOT, make_lines, refusal, snapshot, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import preprocess
import train
from sentence_classifier import load
from sentence_classifier.classifier import METADATA_KEY, VOCABULARY_KEY
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import SubwordTokenizer
from text.labels import read_labels

SENTENCES = [sentence for sentence, _ in make_lines(21, 2)]  # of test.txt


@pytest.fixture(scope="module")
def words(trained_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained CNN and its model.onnx. Not to be changed."""
    place = trained_once.copy(tmp_path_factory.mktemp("words") / "place")
    evaluate.main(onnx_flags(place.root, "--convert_onnx"))
    return place


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny transformer, its model.onnx and int8.onnx. Not to be changed."""
    case = train_case(tmp_path_factory.mktemp("subwords") / "case", "BERT", "cls", 2)
    evaluate.main(onnx_flags(case.root, "--convert_onnx", "--quantize_onnx"))
    return case.root


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


def printed(root: Path, *flags: Any) -> list[dict[str, Any]]:
    """What evaluate.py answers on standard output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", text := io.StringIO())
        evaluate.main(onnx_flags(root, *flags))
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_answers_are_those_of_the_checkpoint(words: Place) -> None:
    (source := words.root / "in.txt").write_text("\n".join([*SENTENCES, "unseen words only", "w " * 300]))
    said = [printed(words.root, f"--input_path={source}", *flags) for flags in (
        [], ["--enable_ort"], ["--enable_ort", "--batch_size=5"], ["--enable_ort", "--enable_inference"])]
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
                 f"from sentence_classifier import load\n"
                 f"load({str(words.root / 'model.onnx')!r}).predict('play some jazz')"):
        modules = loaded(code)
        assert "onnxruntime" in modules and modules.isdisjoint(HEAVY)
        if "enable_ort" not in code or "input_path" in code:
            assert modules.isdisjoint(("sklearn", "matplotlib"))


def test_raw_text_of_a_transformer_loads_no_torch(subwords: Path) -> None:
    for more in ([f"--bert_output_dir={subwords / 'out'}"], ["--input_path=-"]):
        modules = loaded(raw_text(subwords, *more))
        assert {"onnxruntime", "tokenizers"} <= modules and modules.isdisjoint(HEAVY)
    said = refusal(evaluate.main, *onnx_flags(subwords, "--enable_ort", f"--bert_output_dir={subwords / 'model'}"))
    assert "not written by train.py" in said


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
    evaluate.main(onnx_flags(own.root, "--enable_ort", f"--data_dir={raw.data}", "--enable_inference"))
    found = json.loads((own.root / "model.onnx.test.json").read_text())
    assert found["examples"] == 21 and found["per_class"]["PlayVideo"] == {
        "precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 6}


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


# ------------------------------------------------------------------------------------------------ what is no sentence


@pytest.fixture(scope="module", params=[*ENCODERS, "cls"])
def both(request: pytest.FixtureRequest, encoded_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of each encoder, as a checkpoint and as an exported file."""
    if request.param == "cls":
        root = request.getfixturevalue("subwords")
    else:
        place = encoded_once.copy(root := tmp_path_factory.mktemp("both") / "place")
        write_config(place.config, request.param)
        train.main(place.train_flags("--epoch=1"))
        evaluate.main(onnx_flags(root, "--convert_onnx"))
    return root, evaluate.TorchClassifier(root / "model.pt"), load(root / "model.onnx", num_threads=1)


ODD = st.one_of(st.sampled_from(["", " ", " \u3000 ", "play some jazz", "\u200b", "[CLS]", "<pad>"]),
                st.text(st.characters(exclude_categories=["Cs"]), max_size=30))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sentences=st.lists(ODD, max_size=7), batch_size=st.integers(1, 4))
def test_any_text_is_answered(both: Any, sentences: list[str], batch_size: int) -> None:
    _, checkpoint, exported = both
    answers = exported.predict(sentences, batch_size)
    assert len(answers) == len(sentences)
    for sentence, found, other in zip(sentences, answers, checkpoint.predict(tuple(sentences), batch_size),
                                      strict=True):
        numbers = np.array(list(found.probabilities.values()))
        assert np.isfinite(numbers).all() and numbers.sum() == pytest.approx(1.0, abs=1e-5)
        assert found.probabilities == pytest.approx(other.probabilities, abs=1e-4)
        assert exported.predict(sentence).probabilities == pytest.approx(found.probabilities, abs=1e-5)


def test_an_empty_sentence_is_an_unknown_word(both: Any) -> None:
    root, *classifiers = both
    for classifier in classifiers:
        empty, blank, alone, unknown = [answer.probabilities for answer in [
            *classifier.predict(["", " \t "]), classifier.predict(""), classifier.predict("unheard-of")]]
        assert empty == pytest.approx(blank, abs=1e-6) and alone == pytest.approx(empty, abs=1e-6)
        assert isinstance(classifier.tokenizer, SubwordTokenizer) or unknown == pytest.approx(empty, abs=1e-6)
    (source := Path("in.txt")).write_text("\n")
    best = max(empty, key=lambda name: empty[name])
    for flags in ([], ["--enable_ort"]):
        assert printed(root, f"--input_path={source}", *flags)[0]["label"] == best


@pytest.mark.parametrize(("texts", "says"), [
    (None, "texts is of type NoneType"), (5, "texts is of type int"), (b"x", "texts is of type bytes"),
    ([None], "sentence 1 is of type NoneType"), (["a", 5], "sentence 2 is of type int"),
    (["a", b"x"], "sentence 2 is of type bytes"), ([["a"]], "sentence 1 is of type list"),
    ("\ud83d", "sentence 1: .*surrogates not allowed"), (["a", "b \ud83d"], "sentence 2: .*surrogates not allowed")])
def test_what_is_no_text_is_refused(words: Place, texts: Any, says: str) -> None:
    for classifier in (load(words.root / "model.onnx"), evaluate.TorchClassifier(words.model)):
        with pytest.raises(ValueError, match=f"^{says}"):
            classifier.predict(texts)


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "3"])
def test_batch_sizes_below_1_are_refused(words: Place, size: Any) -> None:
    classifier = load(words.root / "model.onnx")
    for texts in (SENTENCES, "jazz", []):
        with pytest.raises(ValueError, match="at least 1"):
            classifier.predict(texts, batch_size=size)


def test_int8_answers_do_not_depend_on_the_sentences_beside_them(subwords: Path) -> None:
    classifier = load(subwords / "int8.onnx", num_threads=1)
    rows = [row for row, _ in classifier.tokenizer.tokenize_batch(["play jazz", *SENTENCES])]
    alone = np.concatenate([classifier.logits([row]) for row in rows])
    np.testing.assert_array_equal(classifier.logits(rows), alone)
    np.testing.assert_array_equal(classifier.logits(rows[:2]), alone[:2])
