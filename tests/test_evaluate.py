"""The third stage: its log lines to the letter, its files, raw text, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Place
from helpers import (
    ENCODERS,
    answer,
    make_lines,
    malicious_zip,
    naive,
    refusal,
    restore,
    script,
    snapshot,
    write_config,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import preprocess
import train
from text.labels import read_labels

LINES = make_lines(21, 2)  # test.txt


def predictions(place: Place, kind: str = "pred") -> list[list[str]]:
    """The rows of a predictions file."""
    content = (place.data / f"test.txt.{kind}").read_text(encoding="utf-8")
    return [line.split("\t") for line in content.removesuffix("\n").split("\n")]


def results(place: Place) -> dict[str, Any]:
    """The results JSON of evaluation."""
    return json.loads(Path(f"{place.model}.test.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ what it answers


@pytest.mark.parametrize(("flags", "elapsed"), [
    ([], r"INFO:__main__:\[Elapsed Time\] : \d+ms, \d+\.\d+ms on average"),
    (["--enable_inference"],
     r"INFO:__main__:\[Elapsed Time\(total_duration_time, average\)\] : \d+\.\d+ms, \d+\.\d+ms"),
])
def test_log_lines_to_the_letter(trained: Place, flags: list[str], elapsed: str) -> None:
    process = script("evaluate.py", *trained.evaluate_flags(*flags))
    printed, logged = process.communicate()
    assert process.returncode == 0, logged
    accuracy = re.findall(r"^INFO:__main__:\[Accuracy\] : (\d\.\d{4}), ( *\d+)/( *\d+)$", logged, re.M)
    assert len(accuracy) == 1 and len(re.findall(f"^{elapsed}$", logged, re.M)) == 1, logged
    share, correct, count = accuracy[0]
    assert len(correct) == len(count) == 5 and int(count) == len(LINES)
    assert share == f"{int(correct) / int(count):.4f}"
    assert "macro avg" in printed and "confusion matrix" in printed and "book a table" in printed


def test_predictions_and_results_agree(trained: Place) -> None:
    evaluate.main(trained.evaluate_flags())
    rows = predictions(trained)
    assert [(sentence, label) for sentence, label, _ in rows] == LINES
    names = read_labels(trained.data / "label.txt").names
    matrix = [[sum(label == one and said == other for _, label, said in rows) for other in names] for one in names]
    correct = sum(label == said for _, label, said in rows)
    found = results(trained)
    assert (found["correct"], found["examples"], found["accuracy"]) == (correct, 21, correct / 21)
    assert found["confusion_matrix"] == matrix
    f1 = [2 * matrix[i][i] / max(1, sum(matrix[i]) + sum(row[i] for row in matrix)) for i in range(4)]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert correct > 10  # it is a trained model
    assert found["command"] == " ".join(["evaluate.py", *trained.evaluate_flags()])
    assert {"timing", "flags", "run_id", "config", "git_revision", "versions", "date", "command"} <= set(found)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_way_of_evaluating_predicts_the_same(encoded: Place, encoder: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)
    write_config(encoded.config, encoder)
    train.main(encoded.train_flags())
    evaluate.main(encoded.evaluate_flags())
    expected = predictions(encoded)
    for flags in (["--batch_size=7"], ["--batch_size=64", f"--config={encoded.config}"]):
        evaluate.main(encoded.evaluate_flags(*flags))
        assert predictions(encoded) == expected
    evaluate.main(encoded.evaluate_flags("--enable_inference"))
    assert predictions(encoded, "inference") == expected


def test_everything_comes_from_the_checkpoint(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=1"))
    evaluate.main([f"--model_path={encoded.model}"])
    assert len(predictions(encoded)) == 21


@pytest.mark.parametrize("flags", [["--batch_size=2"], ["--enable_inference"]])
def test_num_examples(trained: Place, flags: list[str]) -> None:
    evaluate.main(trained.evaluate_flags("--num_examples=5", *flags))
    rows = predictions(trained, "inference" if "--enable_inference" in flags else "pred")
    assert [tuple(row[:2]) for row in rows] == LINES[:5] and results(trained)["examples"] == 5


def test_confusion_picture(trained: Place) -> None:
    evaluate.main(trained.evaluate_flags())
    assert Path(f"{trained.model}.confusion.png").read_bytes().startswith(b"\x89PNG")


def test_punctuation_and_case_of_raw_text(raw: Place) -> None:
    write_config(raw.config, tokenizer="punctuation")
    preprocess.main(raw.preprocess_flags())
    train.main(raw.train_flags())
    (raw.root / "in.txt").write_text("play jazz\nPlay JAZZ\nplay  jazz !\nplay jazz!\n")
    probabilities = [record["probabilities"] for record in classified(raw, raw.root / "in.txt")]
    assert probabilities[0] == probabilities[1] != probabilities[2] == probabilities[3]


def test_the_first_example_is_warm_up() -> None:
    figures = evaluate.time_figures([5.0, 0.001, 0.003], 1)
    assert figures["mean_ms"] == pytest.approx(2.0) and evaluate.time_figures([2.0], 1)["mean_ms"] == 2000.0
    assert evaluate.time_figures([5.0, 5.0, 0.001, 0.003], 2)["mean_ms"] == pytest.approx(2.0)


# --------------------------------------------------------------------------------------------------- unlabelled text


def classified(place: Place, source: Any, *flags: str) -> list[dict[str, Any]]:
    """The answers on standard output."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", said)
        evaluate.main(place.evaluate_flags(f"--input_path={source}", *flags))
    return [json.loads(line) for line in said.getvalue().removesuffix("\n").split("\n")]


@pytest.mark.parametrize("flags", [[], ["--batch_size=4"]])
def test_input_path(trained: Place, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    evaluate.main(trained.evaluate_flags())
    content = "".join(f"{sentence}\r\n" for sentence, _ in LINES).encode()
    (trained.root / "in.txt").write_bytes(content)
    records = classified(trained, trained.root / "in.txt", *flags)
    assert [[record["sentence"], record["label"]] for record in records] == [
        [sentence, said] for sentence, _, said in predictions(trained)]
    for record in records:
        assert set(record["probabilities"]) == set(read_labels(trained.data / "label.txt").names)
        assert sum(record["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
        assert record["probability"] == max(record["probabilities"].values())
        assert record["probabilities"][record["label"]] == record["probability"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [record["label"] for record in classified(trained, "-", *flags)] == [record["label"] for record in records]
    assert len(classified(trained, trained.root / "in.txt", "--num_examples=3", *flags)) == 3


def test_input_path_needs_no_data_folder_file(trained: Place) -> None:
    for path in trained.data.iterdir():
        if path.name != "embedding.npy":
            path.unlink()
    (trained.root / "in.txt").write_text("play jazz")
    assert classified(trained, trained.root / "in.txt")[0]["sentence"] == "play jazz"


@pytest.mark.parametrize(("content", "place"), [
    (b"fine\n\nfine", ":2"), (b"a\tb\n", ":1"), (b"\xff\n", ":1"), (b"a\0b\n", ":1"), (b"", ""),
    (b"\xef\xbb\xbf", ":1")])
def test_bad_unlabelled_lines(trained: Place, content: bytes, place: str) -> None:
    path = trained.root / "in.txt"
    path.write_bytes(content)
    flags = trained.evaluate_flags(f"--input_path={path}")
    assert refusal(evaluate.main, *flags).startswith(f"{path}{place}: ")
    if content.startswith(b"fine"):
        assert len(classified(trained, path, "--skip_bad_lines")) == 2


def test_lines_before_a_bad_one_are_answered_in_utf_8(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = trained.root / "in.txt", io.BytesIO()
    output = io.TextIOWrapper(said, encoding="ascii", write_through=True)
    path.write_text("play jazz\nspiel mir caf\u00e9\n\nplay rock", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert refusal(evaluate.main, *trained.evaluate_flags(f"--input_path={path}", "--batch_size=3")
                       ).startswith(f"{path}:3: ")
    lines = said.getvalue().decode("utf-8").splitlines()
    assert [json.loads(line)["sentence"] for line in lines] == ["play jazz", "spiel mir caf\u00e9"]


def test_an_empty_input_path_is_not_the_test_set(trained: Place) -> None:
    refused_without_a_trace(trained, "--input_path=")


# ---------------------------------------------------------------------------------------------------------- refused


def refused_without_a_trace(place: Place, *flags: Any) -> str:
    before = snapshot(place.root)
    said = refusal(evaluate.main, *place.evaluate_flags(*flags))
    assert snapshot(place.root) == before
    return said


def truncated_model(place: Place) -> None:
    place.model.write_bytes(place.model.read_bytes()[:-100])


def malicious_model(place: Place) -> None:
    malicious_zip(place.model)


def stale_data(place: Place) -> None:
    write_lines(place.data / "test.txt", LINES[:-1])


def truncated_data(place: Place) -> None:
    path = place.data / "test.txt.ids"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "says"), [
    (truncated_model, "model.pt: not a whole checkpoint"), (malicious_model, "model.pt: not a whole checkpoint"),
    (lambda place: place.model.unlink(), "model.pt: no such checkpoint"),
    (lambda place: place.model.write_text("something else"), "model.pt: not a whole checkpoint of this toolkit (no"),
    (stale_data, "test.txt has changed"),
    (truncated_data, "test.txt.ids: not a usable file"),
    (lambda place: (place.data / "test.txt.ids").unlink(), "test.txt.ids: no such file"),
])
def test_damaged_files(trained: Place, damage: Callable[[Place], None], says: str) -> None:
    damage(trained)
    assert says in refused_without_a_trace(trained)
    assert not Path("executed").exists()


def test_frozen_vectors_of_another_table(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=1"))
    table = encoded.data / "embedding.npy"
    np.save(table, np.load(table)[::-1].copy())
    assert "embedding.npy: not the vectors" in refused_without_a_trace(encoded)
    table.unlink()
    assert "embedding.npy: no such file" in refused_without_a_trace(encoded)


def test_data_of_another_vocabulary(trained: Place, raw: Place) -> None:
    preprocess.main(raw.preprocess_flags("--max_vocab=9"))
    shutil.copy(raw.data / "test.txt.ids", trained.data)
    assert "another vocabulary" in refused_without_a_trace(trained)


def test_data_of_other_labels(trained: Place, raw: Place) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        path = raw.data / name
        path.write_text(path.read_text(encoding="utf-8").replace("PlayMusic", "PlayVideo"), encoding="utf-8")
    preprocess.main(raw.preprocess_flags())
    shutil.copy(raw.data / "test.txt.ids", trained.data)
    shutil.copy(raw.data / "test.txt", trained.data)
    assert "PlayVideo" in refused_without_a_trace(trained)
    assert "unknown label 'PlayVideo'" in refused_without_a_trace(trained, "--enable_inference")


@pytest.mark.parametrize(("encoder", "changes", "names"), [
    ("gnb", {}, "enc_class"), ("cnn", {"num_filters": 3}, "num_filters"), ("cnn", {"lowercase": False}, "lowercase")])
def test_config_of_another_model(trained: Place, encoder: str, changes: dict[str, Any], names: str) -> None:
    other = write_config(trained.root / "other.json", encoder, **changes)
    said = refused_without_a_trace(trained, f"--config={other}")
    assert said.startswith(f"{other}: not the config of") and names in said


def test_training_settings_of_the_config_do_not_matter(trained: Place) -> None:
    other = write_config(trained.root / "other.json", lr=0.5, n_ctx=7)
    evaluate.main(trained.evaluate_flags(f"--config={other}"))


@pytest.fixture(scope="session")
def arena(trained_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place of the hypothesis test, which puts it back after each example."""
    return trained_once.copy(tmp_path_factory.mktemp("arena") / "place")


@settings(max_examples=40)
@given(place=st.integers(0, 900), cut=st.integers(0, 3), put=st.binary(max_size=2))
def test_damaged_raw_text(arena: Place, place: int, cut: int, put: bytes) -> None:
    path = arena.data / "test.txt"
    content = path.read_bytes()
    place %= len(content)
    names = read_labels(arena.data / "label.txt").names
    before = snapshot(arena.data)
    try:
        path.write_bytes(content[:place] + put + content[place + cut :])
        bad = [line if isinstance(line, int) else line[0] for line in naive(path.read_bytes())
               if isinstance(line, int) or line[2] not in names]
        changed = snapshot(arena.data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "draw_confusion", lambda *_: None)
            patch.setattr(sys, "stdout", io.StringIO())
            said = answer(evaluate.main, *arena.evaluate_flags("--enable_inference"))
        if bad:
            assert said is not None and said.startswith(f"{path}:{bad[0]}: ") and snapshot(arena.data) == changed
        else:
            assert said is None
            assert [tuple(row[:2]) for row in predictions(arena, "inference")] == [
                line[1:] for line in naive(path.read_bytes()) if not isinstance(line, int)]
    finally:
        restore(arena.data, before)
