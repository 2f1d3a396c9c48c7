"""Lines in, JSON objects out: the runtime's own command line, and evaluate.py --input_path, which is the same."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Place
from helpers import ROOT, answer, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from sentence_classifier.classifier import load
from sentence_classifier.command_line import main
from sentence_classifier.errors import InputError
from sentence_classifier.lines import SentenceReader
from sentence_classifier.tables import read_table


@pytest.fixture(scope="module")
def words(trained_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained CNN and its model.onnx. Not to be changed."""
    place = trained_once.copy(tmp_path_factory.mktemp("words") / "place")
    evaluate.main(place.evaluate_flags("--convert_onnx", f"--onnx_path={place.root / 'model.onnx'}"))
    return place


def both(place: Place, content: bytes, *flags: str) -> list[tuple[list[dict[str, Any]], str | None]]:
    """What the runtime and evaluate.py answer to a file, and the sentence with which they end, if with one."""
    (source := Path("in.txt")).write_bytes(content)
    found = []
    for stage, named in ((main, [place.root / "model.onnx"]),
                         (evaluate.main, ["--enable_ort", f"--onnx_path={place.root / 'model.onnx'}"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", said := io.StringIO())
            error = answer(stage, *named, f"--input_path={source}", *flags)
        lines = [json.loads(line) for line in said.getvalue().splitlines()]
        found.append((lines[: len(lines) // 2] if error else lines, error))  # `answer` runs what ends badly twice
    return found


def test_the_same_as_evaluate(words: Place) -> None:
    for flags in ([], ["--batch_size=2"], ["--batch_size=50"]):
        own, other = both(words, b"play jazz\r\n\xef\xbb\xbfwill it rain\n\nlast line", *flags)
        assert own == other and own[1] is None
        assert [(line["line"], line["sentence"]) for line in own[0]] == [
            (1, "play jazz"), (2, "\ufeffwill it rain"), (3, ""), (4, "last line")]
        assert all(list(line) == ["line", "sentence", "label", "probability", "probabilities"] for line in own[0])


def test_bad_lines(words: Place) -> None:
    content = b"fine\n\na\tb\n\xff\na\0b\n\tc\nfine, too\n"
    own, other = both(words, content, "--batch_size=5")
    assert own == other and [line["line"] for line in own[0]] == [1, 2]
    assert own[1] and own[1].startswith("in.txt:3: a TAB") and "--skip_bad_lines" in own[1]
    own, other = both(words, content, "--skip_bad_lines")
    assert own == other and [line["line"] for line in own[0]] == [1, 2, 7] and own[1] is None


@settings(max_examples=60)
@given(content=st.binary(max_size=30) | st.text("ab \t\n\r\0\ufeffé", max_size=20).map(str.encode))
def test_every_line_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(content)
    pieces = content.split(b"\n")[: -1 if content.endswith(b"\n") else None]
    good = {}
    for number, piece in enumerate(pieces if content else [], 1):
        try:
            text = piece.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            continue
        if "\t" not in text.removesuffix("\r") and "\0" not in text:
            good[number] = text.strip()
    reader = SentenceReader(str(path), skip_bad_lines=True)
    if good:
        assert {line.line: line.sentence for line in reader} == good and reader.skipped == len(pieces) - len(good)
    else:
        with pytest.raises(InputError, match="lines.txt: (no usable line|the file is empty)"):
            list(reader)


def tables(place: Place, source: str, *flags: str) -> list[str | None]:
    """What ends the runtime and evaluate.py when they answer a table."""
    return [answer(main, place.root / "model.onnx", f"--input_path={source}", *flags),
            answer(evaluate.main, "--enable_ort", f"--onnx_path={place.root / 'model.onnx'}", f"--input_path={source}",
                   *flags)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_comes_back_with_answers(words: Place, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [("play jazz", "PlayMusic"), ("", "GetWeather"), ("will it rain; or\nsnow, \"today\"", "GetWeather")]
    with open("in.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("query", "intent"), *rows])
    assert tables(words, "in.csv", f"--output_path=out{ending}", "--top_k=2") == [None, None]
    with read_table(f"out{ending}") as table:
        answered = [[str(cell or "") for cell in row.cells] for row in table]
    assert table.columns == ("query", "intent", "label", "probability", "label_2", "probability_2")
    assert [tuple(row[:2]) for row in answered] == rows and answered[1][2:] == [""] * 4
    predictions = load(words.root / "model.onnx").predict([rows[0][0], rows[2][0]])
    assert [answered[0][2], answered[2][2]] == [prediction.label for prediction in predictions]
    assert 0 < float(answered[0][5]) <= float(answered[0][3]) <= 1
    assert "3 rows, 1 of them without text" in caplog.text and "/    2" in caplog.text.split("[Accuracy] : ")[1]


def test_a_table_is_answered_in_json_lines(words: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text('{"id": 7, "text": "play jazz"}\n\n{"id": 8, "text": "will it rain"}\n')
    assert tables(words, "in.jsonl", "--top_k=1") == [None, None]
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[:2] == found[2:] and [line["line"] for line in found[:2]] == [1, 3]
    assert all(len(line["probabilities"]) == 1 and line["label"] in line["probabilities"] for line in found)


def test_a_table_on_standard_input(words: Place) -> None:
    done = subprocess.run([sys.executable, "-m", "sentence_classifier", words.root / "model.onnx", "--text_column=2",
                           f"--output_path={Path.cwd() / 'out.csv'}"], cwd=ROOT, input="7;play jazz\n7;will it rain\n",
                          capture_output=True, encoding="utf-8", check=True)
    assert "2 rows, 0 of them without text" in done.stderr
    assert [line.split(";")[:2] for line in Path("out.csv").read_text().splitlines()] == [
        ["7", "play jazz"], ["7", "will it rain"]]


def test_refused_tables(words: Place) -> None:
    Path("in.csv").write_text("query,id\nplay jazz,1\n")
    for flags, says in [(["--text_column=text"], "no column 'text'; its columns are 'query', 'id'"),
                        (["--output_path=out.txt"], ".csv, .tsv, .jsonl or .parquet is expected at its end"),
                        (["--output_path=none/out.csv"], "none/out.csv: cannot be written"),
                        (["--top_k=0"], "--top_k is at least 1"), (["--encoding=utf-99"], "no such text encoding")]:
        assert all(said and says in said for said in tables(words, "in.csv", *flags)), flags
    assert [path.name for path in Path().iterdir()] == ["in.csv"]


@pytest.mark.parametrize(("flags", "says"), [
    (["none.onnx"], "none.onnx: no such file"), (["{model}", "--input_path=none.txt"], "none.txt: no such file")])
def test_refused(words: Place, flags: list[str], says: str) -> None:
    assert refusal(main, *[flag.format(model=words.root / "model.onnx") for flag in flags]).startswith(says)


@pytest.mark.parametrize("flags", [[], ["model.onnx", "--batch_size=0"], ["model.onnx", "--num_threads=-1"],
                                   ["model.onnx", "--batch=3"]])
def test_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2 and "usage: sentence-classifier" in capsys.readouterr().err


def test_each_line_is_answered_before_the_next_is_read(words: Place) -> None:
    process = subprocess.Popen([sys.executable, "-m", "sentence_classifier", words.root / "model.onnx"], cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdin and process.stdout
    for number in (1, 2, 3):
        process.stdin.write("spiel etwas Café ☕\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        assert (found["line"], found["sentence"]) == (number, "spiel etwas Café ☕")
    process.communicate()
    assert process.returncode == 0
