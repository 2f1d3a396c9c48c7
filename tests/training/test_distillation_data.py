"""From a teacher's logits to a student: labelling, the record beside the labelled file, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Place
from helpers import make_lines, refusal, snapshot, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import augment_data
import evaluate
import preprocess
import train
from dataset import EncodedData
from model import load_classifier
from sentence_classifier import load
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from sentence_classifier.tokenizers import MASK, WORDS, TokenizerInfo, WordTokenizer
from text import labels as labelling
from text.labels import (
    NO_LABEL,
    LabelParser,
    column_order,
    find_logits_info,
    read_labels,
    write_labels,
    write_logits_info,
)
from training.distillation import Teacher, answer, labelled_by
from util import load_checkpoint, save_checkpoint

NAMES = ("PlayMusic", "GetWeather", "book a table", "none of these")
TEXT = [f"{sentence} {number}" for number, (sentence, _) in enumerate(make_lines(23, 7))] + [f"play {MASK} by {MASK}"]


def rows(path: Path) -> list[list[str]]:
    """The lines of a TSV file."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def label(place: Place, *flags: str) -> Path:
    """Have augmented.raw labelled."""
    evaluate.main(place.evaluate_flags("--augmented", *flags))
    return place.data / "augmented.raw.pred"


@pytest.fixture(scope="session")
def labelled_once(trained_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained CNN that has labelled augmented.raw. Not to be changed."""
    place = trained_once.copy(tmp_path_factory.mktemp("labelled") / "place")
    write_lines(place.data / "augmented.raw", [(sentence, "dummy") for sentence in TEXT])
    preprocess.main(place.preprocess_flags("--augmented"))
    label(place, "--batch_size=7")
    return place


@pytest.fixture
def labelled(labelled_once: Place, tmp_path: Path) -> Place:
    """The same of the test's own."""
    return labelled_once.copy(tmp_path / "labelled")


def encode_student(place: Place, *flags: Any) -> EncodedData:
    """What the user does next: cp, then preprocess.py."""
    shutil.copy(place.data / "augmented.raw.pred", place.data / "augmented.txt")
    preprocess.main(place.preprocess_flags("--augmented", "--augmented_filename=augmented.txt", *flags))
    return EncodedData(place.data / "augmented.txt.ids")


def expected_logits(place: Place, path: Path | None = None) -> np.ndarray:
    """The teacher's logits, a sentence at a time."""
    checkpoint = load_checkpoint(path or place.model)
    model = load_classifier(checkpoint, [str(place.data)]).eval()
    tokenizer = WordTokenizer(checkpoint.run.vocabulary, replace(checkpoint.run.encoding, augmented=True))
    with torch.inference_mode():
        return np.concatenate([model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)).numpy()
                               for ids, _ in tokenizer.tokenize_batch(TEXT)])


# -------------------------------------------------------------------------------------------------------- the course


def test_what_a_teacher_writes(labelled: Place) -> None:
    found = rows(labelled.data / "augmented.raw.pred")
    assert [sentence for sentence, _ in found] == TEXT
    numbers = np.array([[float(part) for part in row.split(" ")] for _, row in found])
    np.testing.assert_allclose(numbers, expected_logits(labelled), atol=1e-5)
    assert EncodedData(labelled.data / "augmented.raw.ids").targets.tolist() == [NO_LABEL] * len(TEXT)
    record = find_logits_info(labelled.data / "augmented.raw.pred")
    assert record is not None and tuple(record["labels"]) == NAMES
    assert record["teacher"]["run_id"] == load_checkpoint(labelled.model).run.run_id
    assert record["teacher"]["model_path"].endswith("model.pt")
    assert record["source"]["file"] == "augmented.raw"


def test_the_shortest_numbers_that_read_back_the_same(labelled: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = np.array([[0.1, 1 / 3, -2e-38, 16777217.0], [1e-45, -0.0, 3e38, np.pi]], np.float32)
    monkeypatch.setattr(evaluate.TorchClassifier, "logits", lambda self, given: hard[: len(given)])
    label(labelled, "--num_examples=2", "--batch_size=2")
    written = [row.split(" ") for _, row in rows(labelled.data / "augmented.raw.pred")]
    read = np.array(sorted(written), np.float64).astype(np.float32)
    assert read.tobytes() == hard.tobytes() and sorted(written)[0][:2] == ["0.1", "0.33333334"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_some_lines_at_a_time(labelled: Place, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    whole = rows(labelled.data / "augmented.raw.pred")
    sizes = []
    chunks = evaluate.chunks
    monkeypatch.setattr(evaluate, "chunks", lambda examples, *_: (
        sizes.append(len(chunk)) or chunk for chunk in chunks(examples, 5)))
    found = rows(label(labelled, f"--batch_size={batch_size}"))
    assert sizes == [5, 5, 5, 5, 4] and [row[0] for row in found] == TEXT
    np.testing.assert_allclose(*(np.array([row[1].split() for row in each], np.float64) for each in (found, whole)),
                               atol=1e-5)


@pytest.mark.parametrize("flags", [["--criterion=MSELoss"], ["--criterion=KLDivLoss", "--kd_temperature=4"]])
def test_from_raw_text_to_a_student(trained: Place, flags: list[str]) -> None:
    augment_data.main([f"--input={trained.data / 'train.txt'}", f"--output={trained.data / 'augmented.raw'}",
                       "--no_analyzer", "--n_iter=4"])
    preprocess.main(trained.preprocess_flags("--augmented"))
    label(trained, "--batch_size=32")
    data = encode_student(trained)
    assert len(data) > 100 and data.has_logits
    student = trained.root / "student.pt"
    train.main(trained.train_flags("--augmented", f"--save_path={student}", "--epoch=4", *flags))
    results = json.loads(Path(f"{student}.train.json").read_text())
    assert results["best"]["valid_accuracy"] > 0.6
    assert results["history"][-1]["train_loss"] < results["history"][0]["train_loss"]


def test_several_teachers_label_with_the_mean_of_their_logits(labelled: Place) -> None:
    place = labelled
    own = np.array([row[1].split() for row in rows(place.data / "augmented.raw.pred")], np.float64)
    checkpoint = load_checkpoint(place.model)
    other = place.root / "other.pt"
    doubled = {name: 2 * value if name.startswith("decoder") else value for name, value in checkpoint.model.items()}
    save_checkpoint(replace(checkpoint, model=doubled, run=replace(checkpoint.run, run_id="another")), other)
    expected = expected_logits(place) + expected_logits(place, other)
    np.testing.assert_allclose([[float(x) for x in row[1].split()] for row in
                                rows(label(place, f"--more_teachers={other}"))], expected / 2, atol=1e-5)
    assert np.abs(expected / 2 - own).max() > 1e-3
    record = find_logits_info(place.data / "augmented.raw.pred")
    assert record and record["teacher"]["run_ids"] == [checkpoint.run.run_id, "another"]
    data = encode_student(place)
    assert data.has_logits and labelled_by(data) is None  # no one teacher's

    before, flags = snapshot(place.data), place.evaluate_flags("--augmented")
    turned = replace(checkpoint.run.encoding, labels=checkpoint.run.labels.names[::-1])
    save_checkpoint(replace(checkpoint, run=replace(checkpoint.run, encoding=turned, run_id="a third")), other)
    assert "its labels" in refusal(evaluate.main, *flags, f"--more_teachers={other}")
    assert "of the same run" in refusal(evaluate.main, *flags, f"--more_teachers={place.model}")
    assert "goes with --augmented" in refusal(evaluate.main, *place.evaluate_flags(f"--more_teachers={other}"))
    assert snapshot(place.data) == before


def test_teachers_answer_in_fp32(labelled: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = labelled.root / "model.onnx"
    evaluate.main(labelled.evaluate_flags("--convert_onnx", f"--onnx_path={path}"))
    classifier = load(path)
    classifier.metadata["int8"] = {"setting": "dynamic"}
    monkeypatch.setattr(evaluate, "load", lambda *_: classifier)
    before = snapshot(labelled.data)
    assert "an int8 file" in refusal(evaluate.main, *labelled.evaluate_flags("--augmented", "--enable_ort"))
    assert snapshot(labelled.data) == before


def test_a_teacher_need_not_answer_again_what_it_labelled(labelled: Place) -> None:
    """fastformers.py --do_distill --augmented takes its logits from the file; another teacher answers for itself."""
    checkpoint = load_checkpoint(labelled.model)
    data = encode_student(labelled)
    own, other = (Teacher(replace(checkpoint, run=replace(checkpoint.run, run_id=run_id)), str(labelled.model),
                          [str(labelled.data)], data.labels) for run_id in (checkpoint.run.run_id, "another"))
    answered = labelled.data / "augmented.txt.teacher"
    for teacher, asked in ((own, False), (other, True)):
        np.testing.assert_allclose(answer(teacher, data, True, 7, torch.device("cpu")), expected_logits(labelled),
                                   atol=1e-5)
        assert answered.exists() == asked
    next(labelled.data.glob("logits-*.json")).unlink()
    assert labelled_by(data) is None


# --------------------------------------------------------------------------------------------------------- the record


@settings(max_examples=30)
@given(order=st.permutations(range(4)))
def test_logits_of_the_same_labels_in_another_order(labelled_once: Place, order: list[int]) -> None:
    path = labelled_once.data / "augmented.raw.pred"
    labels = Labels(tuple(NAMES[place] for place in order))
    assert column_order(path, labels, required=True) == list(order)
    parser = labelling.label_parser(path, labels)
    assert parser("0 1 2 3") == [float(place) for place in order] and parser("4 5 6 7")[0] == 4.0 + order[0]


def test_columns_are_put_into_the_order_of_label_txt(labelled: Place) -> None:
    before = np.array(encode_student(labelled).targets)
    train_path = labelled.data / "train.txt"
    turned = list(reversed(rows(train_path)))  # so that the labels first appear in another order
    write_lines(train_path, [(sentence, label) for sentence, label in turned])
    preprocess.main(labelled.preprocess_flags())
    names = read_labels(labelled.data / "label.txt").names
    assert names != NAMES
    after = encode_student(labelled).targets
    np.testing.assert_array_equal(after, before[:, [NAMES.index(name) for name in names]])


def refused(place: Place, *flags: Any) -> str:
    """preprocess.py of augmented.txt says no and leaves everything as it was."""
    before = snapshot(place.data)
    said = refusal(preprocess.main, *place.preprocess_flags("--augmented", "--augmented_filename=augmented.txt",
                                                            *flags))
    assert snapshot(place.data) == before
    return said


def test_an_edited_file_has_no_record(labelled: Place) -> None:
    target = labelled.data / "augmented.txt"
    write_lines(target, [(sentence, row) for sentence, row in rows(labelled.data / "augmented.raw.pred")[1:]])
    said = refused(labelled)
    assert said.startswith(f"{target}: ") and "no record" in said and "--logits_order" in said
    names = labelled.root / "names.txt"
    write_labels(Labels(NAMES[::-1]), names)
    preprocess.main(labelled.preprocess_flags("--augmented", "--augmented_filename=augmented.txt",
                                              f"--logits_order={names}"))
    numbers = np.array([row.split() for _, row in rows(target)], np.float32)
    np.testing.assert_array_equal(EncodedData(labelled.data / "augmented.txt.ids").targets, numbers[:, ::-1])
    write_labels(Labels((*NAMES[:3], "other")), names)
    assert "are of the labels" in refused(labelled, f"--logits_order={names}")
    assert "no such file" in refused(labelled, f"--logits_order={names}x")


def test_logits_of_other_labels(labelled: Place) -> None:
    shutil.copy(labelled.data / "augmented.raw.pred", labelled.data / "augmented.txt")
    for name in ("train.txt", "valid.txt", "test.txt"):
        path = labelled.data / name
        path.write_text(path.read_text(encoding="utf-8").replace("PlayMusic", "PlayVideo"), encoding="utf-8")
    preprocess.main(labelled.preprocess_flags())
    said = refused(labelled)
    assert "PlayMusic" in said and "PlayVideo" in said and said.startswith(f"{labelled.data / 'augmented.txt'}: ")


def test_an_order_that_contradicts_the_record(labelled: Place) -> None:
    shutil.copy(labelled.data / "augmented.raw.pred", labelled.data / "augmented.txt")
    names = labelled.root / "names.txt"
    write_labels(Labels(NAMES[::-1]), names)
    assert "contradicts" in refused(labelled, f"--logits_order={names}")
    write_labels(Labels(NAMES), names)
    encode_student(labelled, f"--logits_order={names}")


@pytest.mark.parametrize("damage", [
    lambda content: content[:-20], lambda content: content.replace(b"logits-1", b"logits-0"), lambda content: b"[]",
    lambda content: content.replace(b"PlayMusic", b"GetWeather"), lambda content: b"\xff",
    lambda content: content.replace(b'"sha256": "', b'"sha256": "0', 1)])
def test_a_damaged_record(labelled: Place, damage: Callable[[bytes], bytes]) -> None:
    shutil.copy(labelled.data / "augmented.raw.pred", labelled.data / "augmented.txt")
    record = next(labelled.data.glob("logits-*.json"))
    record.write_bytes(damage(record.read_bytes()))
    assert refused(labelled).startswith(f"{record}: not a whole record")


def test_training_data_with_a_record_are_reordered_too(labelled: Place) -> None:
    path = labelled.data / "train.txt"
    shutil.copy(labelled.data / "augmented.raw.pred", path)
    write_labels(Labels(NAMES[::-1]), labelled.data / "label.txt")
    preprocess.main(labelled.preprocess_flags())
    numbers = np.array([row.split() for _, row in rows(path)], np.float32)
    np.testing.assert_array_equal(EncodedData(labelled.data / "train.txt.ids").targets, numbers[:, ::-1])


@pytest.mark.parametrize(("wrong", "says"), [
    ("1 2 3", "3 logits where label.txt names 4"), ("1 2 3 nan", "not finite"), ("1 inf 3 4", "not finite"),
    ("PlayMusic", "not a row of logits"), ("dummy", "which")])
def test_bad_logits_name_file_and_line(labelled: Place, wrong: str, says: str) -> None:
    lines = rows(labelled.data / "augmented.raw.pred")
    lines[4][1] = wrong
    target = labelled.data / "augmented.txt"
    write_lines(target, [(sentence, row) for sentence, row in lines])
    write_logits_info(target, list(NAMES))
    said = refused(labelled)
    assert said.startswith(f"{target}:5: ")
    assert says in said or wrong == "dummy" and "says that there is none" in said


# ---------------------------------------------------------------------------------------------------- text, no label


def test_kinds_of_labels_do_not_mix() -> None:
    labels = Labels(("no", "yes"))
    for first, second in (("dummy", "yes"), ("yes", "dummy"), ("dummy", "1 2"), ("1 2", "dummy"), ("yes", "1 2")):
        parser = LabelParser(labels, "dummy")
        parser(first)
        with pytest.raises(ValueError):
            parser(second)
    assert LabelParser(labels, "dummy")("dummy") == NO_LABEL
    assert LabelParser(labels, "yes")("yes") == 1  # a label of this name is a label
    with pytest.raises(ValueError, match="unknown label"):
        LabelParser(labels)("dummy")


@pytest.mark.parametrize("tokenizer", ["whitespace", "punctuation"])
def test_the_mask_is_an_unknown_word(tokenizer: str) -> None:
    info = TokenizerInfo(kind=WORDS, tokenizer=tokenizer, lowercase=True, n_ctx=5)
    vocabulary = "<pad>\n<unk>\nplay\nmask\n[mask]\n[\n]\n"
    augmented = WordTokenizer(vocabulary, replace(info, augmented=True))
    assert augmented.tokenize_batch(["play [MASK] play", MASK, f"{MASK} {MASK} play play play play", "play"]) == [
        ([2, 1, 2], 3), ([1], 1), ([1, 1, 2, 2, 2], 6), ([2], 1)]
    assert 1 not in WordTokenizer(vocabulary, info)("play [MASK]")


def test_a_student_needs_labels(labelled: Place) -> None:
    shutil.copy(labelled.data / "augmented.raw", labelled.data / "augmented.txt")
    preprocess.main(labelled.preprocess_flags("--augmented", "--augmented_filename=augmented.txt"))
    before = snapshot(labelled.root)
    said = refusal(train.main, *labelled.train_flags("--augmented"))
    assert "have no labels" in said and "evaluate.py --augmented" in said
    (labelled.root / "train.log").unlink()
    assert snapshot(labelled.root) == {name: content for name, content in before.items() if name != "train.log"}


# ------------------------------------------------------------------------------------------------------ refused flags


@pytest.mark.parametrize("flags", [["--enable_inference"], ["--input_path=-"], ["--convert_onnx"], ["--enable_dqm"],
                                   ["--enable_ort", "--quantize_onnx"], ["--enable_qat_fx"]])
def test_labelling_is_done_in_fp32_from_encoded_text(labelled_once: Place, flags: list[str]) -> None:
    said = refusal(evaluate.main, *labelled_once.evaluate_flags("--augmented", *flags))
    assert flags[-1].split("=")[0] in said and "fp32" in said


def test_labelling_needs_the_encoding(trained: Place) -> None:
    said = refusal(evaluate.main, *trained.evaluate_flags("--augmented"))
    assert "augmented.raw.ids: no such file" in said and "--augmented_filename=augmented.raw" in said


def test_a_broken_teacher(labelled: Place) -> None:
    checkpoint = load_checkpoint(labelled.model)
    next(iter(reversed(checkpoint.model.values()))).fill_(float("nan"))
    save_checkpoint(checkpoint, labelled.model)
    before = snapshot(labelled.data)
    said = refusal(evaluate.main, *labelled.evaluate_flags("--augmented"))
    assert said.startswith(f"{labelled.data / 'augmented.raw'}:1: ") and "not finite" in said
    assert snapshot(labelled.data) == before


@pytest.mark.parametrize(("flags", "says"), [
    (["--augmented", "--criterion=MSELoss"], "compares the logits themselves"), ([], "class labels"),
    (["--augmented", "--criterion=KLDivLoss"], None)])
def test_where_a_temperature_has_a_meaning(labelled: Place, flags: list[str], says: str | None) -> None:
    encode_student(labelled)
    run = partial(labelled.train_flags, "--kd_temperature=2", "--epoch=1", *flags)
    if says:
        said = refusal(train.main, *run())
        assert says in said and "--kd_temperature=2" in said
    else:
        train.main(run())


def test_records_of_two_files_do_not_meet(tmp_path: Path) -> None:
    for name, content, labels in (("a", "x\t1 2\n", ["no", "yes"]), ("b", "x\t2 1\n", ["yes", "no"])):
        (tmp_path / name).write_text(content)
        write_logits_info(tmp_path / name, labels)
    shutil.copy(tmp_path / "b", tmp_path / "c")
    assert [(find_logits_info(tmp_path / name) or {})["labels"][0] for name in "abc"] == ["no", "yes", "yes"]
    (tmp_path / "c").write_text("x\t2 1.0\n")
    assert find_logits_info(tmp_path / "c") is None
    with pytest.raises(InputError, match="no record"):
        column_order(tmp_path / "c", Labels(("no", "yes")), required=True)
