"""The third stage: its log lines to the letter, its files, raw text, and what it refuses."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from conftest import Place
from helpers import (
    ENCODERS,
    ROOT,
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
from sklearn.metrics import f1_score

import evaluate
import preprocess
import train
from sentence_classifier.labels import normalize_label
from text.arrays import ArrayWriter, open_arrays
from text.labels import UNKNOWN_LABEL, read_labels
from util import sha256

LINES = make_lines(21, 2)  # test.txt


def predictions(place: Place, kind: str = "pred") -> list[list[str]]:
    """The rows of a predictions file."""
    content = (place.data / f"test.txt.{kind}").read_bytes().decode()  # in which a lone CR is text
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
    if flags:  # the total leaves the warm-up example out, too
        total, average = re.findall(r"average\)\] : (\S+)ms, (\S+)ms", logged)[0]
        assert float(total) == pytest.approx((len(LINES) - 1) * float(average), rel=1e-9)


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


def test_a_checkpoint_answers_as_a_library(trained: Place) -> None:
    classifier = evaluate.TorchClassifier(trained.model, "cpu")
    evaluate.main(trained.evaluate_flags())
    expected = [row[2] for row in predictions(trained)]
    assert [answer.label for answer in classifier.predict([sentence for sentence, _ in LINES], 4)] == expected
    assert classifier.predict(LINES[0][0]).label == expected[0]


@pytest.mark.parametrize("job", [[], ["--enable_inference"], ["--input_path=in.txt"], ["--convert_onnx"],
                                 ["--enable_dqm"]])
def test_nothing_writes_to_the_flags(trained: Place, monkeypatch: pytest.MonkeyPatch, job: list[str]) -> None:
    class Frozen(argparse.Namespace):
        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError(f"{name} is written after get_params")

    args, config = evaluate.get_params(trained.evaluate_flags(f"--onnx_path={trained.root / 'model.onnx'}", *job))
    frozen = Frozen()
    vars(frozen).update(vars(args))
    monkeypatch.setattr(evaluate, "get_params", lambda argv: (frozen, config))
    Path("in.txt").write_text("play jazz")
    evaluate.main([])


def test_flags_are_resolved_once() -> None:
    args, _ = evaluate.get_params(["--enable_dqm"])
    assert (args.int8_mode, args.device, args.command) == ("dqm", "cpu", "evaluate.py --enable_dqm")
    assert evaluate.get_params(["--enable_ort"])[0].int8_mode is None


# ------------------------------------------------------------------------------------- labels that train.txt lacks


def relabel(place: Place, changes: dict[int, str], encoded: list[int] | None = None) -> list[tuple[str, str]]:
    """Give lines of test.txt labels that train.txt lacks, there and in the encoded file, and return the lines.

    Args:
        encoded: the lines that the encoded file has them in, where it shall have other ones.
    """
    lines = [(sentence, changes.get(number, label)) for number, (sentence, label) in enumerate(LINES)]
    write_lines(place.data / "test.txt", lines)
    path = place.data / "test.txt.ids"
    arrays, metadata = open_arrays(path)
    labels = np.array(arrays["labels"])
    labels[encoded or list(changes)] = UNKNOWN_LABEL
    columns = {name: np.array(array) for name, array in {**arrays, "labels": labels}.items()}
    encoding = json.loads(metadata["encoding"])
    with ArrayWriter(path, {name: (array.dtype, array.shape[1:]) for name, array in columns.items()}) as writer:
        writer.metadata = {**metadata, "encoding": json.dumps({
            **encoding, "source_sha256": sha256(place.data / "test.txt")})}
        for name, array in columns.items():
            writer.append(name, array)
    return lines


@pytest.mark.parametrize("flags", [[], ["--batch_size=5"], ["--enable_inference"], ["--enable_dqm"]])
def test_labels_that_train_lacks_count_as_errors(trained: Place, flags: list[str],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    evaluate.main(trained.evaluate_flags(*flags))
    before = results(trained)
    kind = "inference" if "--enable_inference" in flags else "pred"
    right = [label == said for _, label, said in predictions(trained, kind)]
    lines = relabel(trained, {0: "out of scope", 3: "날씨", 7: "out of scope"})
    caplog.clear()
    evaluate.main(trained.evaluate_flags(*flags))
    assert [row[:2] for row in predictions(trained, kind)] == [list(line) for line in lines]
    found = results(trained)
    assert found["examples"] == 21 and found["correct"] == before["correct"] - sum(right[i] for i in (0, 3, 7))
    assert found["per_class"]["out of scope"]["support"] == 2 and found["per_class"]["날씨"]["recall"] == 0.0
    assert found["macro_f1"] == pytest.approx(f1_score(*zip(*[row[1:] for row in predictions(trained, kind)],
                                                            strict=True), average="macro", zero_division=0))
    warned = [record.getMessage() for record in caplog.records if "train.txt lacks" in record.getMessage()]
    assert len(warned) == 1
    assert "3 of 21 sentences have a label that train.txt lacks (out of scope 2, 날씨 1); they count as" in warned[0]


@pytest.mark.parametrize("flags", [[], ["--enable_inference"]])
def test_labels_that_train_lacks_pass_every_stage(raw: Place, flags: list[str]) -> None:
    """And Korean in two Unicode forms is the same sentence and the same label in all of them."""
    korean = [("내일 날씨 어때", "날씨"), ("음악 재생해 줘", "음악")]
    for name, form in (("train.txt", "NFC"), ("valid.txt", "NFC"), ("test.txt", "NFD")):
        with open(raw.data / name, "a", encoding="utf-8") as file:
            file.write(normalize(form, "".join(f"{sentence}\t{label}\n" for sentence, label in korean * 6)))
    for name in ("valid.txt", "test.txt"):
        with open(raw.data / name, "a", encoding="utf-8") as file:
            file.write("who are you\toos\n")
    preprocess.main(raw.preprocess_flags())
    train.main(raw.train_flags("--epoch=6"))
    evaluate.main(raw.evaluate_flags(*flags))
    found = results(raw)
    assert found["examples"] == 21 + 12 + 1 and list(found["per_class"])[-1] == "oos"
    assert found["per_class"]["oos"]["support"] == 1 and found["per_class"]["날씨"]["support"] == 6
    assert found["per_class"]["날씨"]["recall"] == found["per_class"]["음악"]["recall"] == 1.0


def test_encoded_data_that_left_out_sentences(trained: Place) -> None:
    """Where lines and encoded sentences differ, each label would be compared with another sentence's prediction."""
    relabel(trained, {3: "out of scope"}, encoded=[4])
    assert "its sentences are not those of" in refused_without_a_trace(trained)


# --------------------------------------------------------------------------------- consoles, paths and other folders


def in_process(place: Place, stage: str, flags: list[Any], **environment: str) -> tuple[str, str]:
    """What a script prints and logs as bytes, read as UTF-8, in another environment."""
    process = subprocess.run([sys.executable, str(ROOT / stage), *map(str, flags)], capture_output=True, check=False,
                             env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=place.root)
    said = process.stdout.decode("utf-8", "backslashreplace"), process.stderr.decode("utf-8", "backslashreplace")
    assert process.returncode == 0, said[1]
    return said


NO_UTF_8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_console_that_lacks_the_labels_letters(trained: Place) -> None:
    lines = relabel(trained, {0: "날씨", 1: "café"})
    printed, logged = in_process(trained, "evaluate.py", trained.evaluate_flags(), PYTHONIOENCODING="latin-1")
    assert "\\ub0a0\\uc528" in printed and "caf\\xe9" in printed  # the one escaped, the other a byte of Latin-1
    assert "[Accuracy] : " in logged and "Traceback" not in logged
    assert [row[1] for row in predictions(trained)] == [label for _, label in lines]
    assert results(trained)["per_class"]["날씨"]["support"] == 1
    printed, _ = in_process(trained, "evaluate.py", trained.evaluate_flags(), **NO_UTF_8)
    assert "날씨" in printed  # into a pipe in UTF-8


def test_paths_that_the_locale_cannot_read(encoded: Place) -> None:
    model, onnx = encoded.root / "모델 1.pt", encoded.root / "모델.onnx"
    flags = [flag for flag in encoded.train_flags("--epoch=1") if not flag.startswith("--save_path")]
    in_process(encoded, "train.py", [*flags, f"--save_path={model}"], **NO_UTF_8)
    given = [f"--data_dir={encoded.data}", f"--model_path={model}", f"--onnx_path={onnx}"]
    in_process(encoded, "evaluate.py", given, **NO_UTF_8)
    in_process(encoded, "evaluate.py", [*given, "--convert_onnx"], **NO_UTF_8)
    in_process(encoded, "evaluate.py", [*given, "--enable_ort", "--enable_inference"], **NO_UTF_8)
    for path in (model, onnx):
        assert json.loads(Path(f"{path}.test.json").read_text(encoding="utf-8"))["examples"] == 21
    evaluate.main(given)
    assert json.loads(Path(f"{model}.test.json").read_text(encoding="utf-8"))["flags"]["model_path"] == str(model)


def test_output_dir(trained: Place) -> None:
    before = snapshot(trained.root)
    evaluate.main(trained.evaluate_flags(f"--output_dir={trained.root / 'new/results'}"))
    made = {path.removeprefix("new/results/") for path in set(snapshot(trained.root)) - set(before) - {"new"}}
    assert made == {"new/results", "test.txt.pred", "model.pt.test.json", "model.pt.confusion.png"}
    assert {name: snapshot(trained.root)[name] for name in before} == before


def test_a_read_only_data_folder_is_noticed_before_the_work(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tempfile.TemporaryFile

    def read_only(dir: Path) -> Any:
        if dir == trained.data:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return whole(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(evaluate, "classify", lambda *_: pytest.fail("worked before it looked"))
    said = refused_without_a_trace(trained)
    assert said.startswith(f"{trained.data}: cannot be written to") and "--output_dir" in said
    (trained.root / "file").touch()
    assert "file/results: cannot be written to" in refused_without_a_trace(
        trained, f"--output_dir={trained.root / 'file/results'}")


def test_punctuation_and_case_of_raw_text(raw: Place) -> None:
    write_config(raw.config, tokenizer="punctuation")
    preprocess.main(raw.preprocess_flags())
    train.main(raw.train_flags())
    (raw.root / "in.txt").write_text("play jazz\nPlay JAZZ\nplay  jazz !\nplay jazz!\n")
    probabilities = [record["probabilities"] for record in classified(raw, raw.root / "in.txt")]
    assert probabilities[0] == probabilities[1] != probabilities[2] == probabilities[3]


def test_the_first_example_is_warm_up() -> None:
    figures = evaluate.time_figures(np.array([5.0, 0.001, 0.003]), 1)
    assert figures["mean_ms"] == pytest.approx(2.0) and figures["warm_up_ms"] == pytest.approx(5000.0)
    assert evaluate.time_figures(np.array([2.0]), 1)["mean_ms"] == 2000.0
    assert evaluate.time_figures(np.array([5.0, 5.0, 0.001, 0.003]), 2)["mean_ms"] == pytest.approx(2.0)


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
    (b"fine\na\tb\nfine", ":2"), (b"\tb\n", ":1"), (b"\xff\n", ":1"), (b"a\0b\n", ":1"), (b"", "")])
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
    path.write_text("play jazz\nspiel mir caf\u00e9\na\tb\nplay rock", encoding="utf-8")
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
    before = snapshot(arena.data)
    try:
        path.write_bytes(content[:place] + put + content[place + cut :])
        bad = [line for line in naive(path.read_bytes()) if isinstance(line, int)]
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
                (line[1], normalize_label(line[2])) for line in naive(path.read_bytes()) if not isinstance(line, int)]
    finally:
        restore(arena.data, before)
