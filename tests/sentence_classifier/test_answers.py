"""A table comes back whole, in order and with answers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentence_classifier.classifier import TextClassifier
from sentence_classifier.decisions import ONE_LABEL
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from sentence_classifier.tables import TableFormat, read_table
from sentence_classifier.tokenizers import WORDS, TokenizerInfo, make_tokenizer


class Lengths(TextClassifier):
    """A classifier that goes by the number of words: one, two, more."""

    def __init__(self) -> None:
        info = TokenizerInfo(kind=WORDS, n_ctx=9, tokenizer="whitespace", lowercase=True)
        super().__init__(Labels(("one", "two", "more")), make_tokenizer("<pad>\n<unk>\n", info), ONE_LABEL)

    def logits(self, rows: Sequence[Any]) -> np.ndarray:
        return np.array([[8.0 * (min(len(row), 3) == place) - place for place in (1, 2, 3)] for row in rows],
                        dtype=np.float32)


def named(sentence: str) -> str:
    return ("one", "two", "more")[min(len(sentence.split()), 3) - 1]


CELLS = st.text(st.sampled_from("ab Ö날,;|\t\"'\n5"), max_size=9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), delimiter=st.sampled_from(",;\t"),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), end=st.sampled_from(["\n", "\r\n"]),
       ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
def test_rows_stay_as_they_were(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, encoding: str, end: str,
                                ending: str) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerows([("note", "text"), *rows])
    path, output = tmp_path / "table.csv", tmp_path / f"answers{ending}"
    path.write_bytes(file.getvalue().encode(encoding))
    found = Lengths().predict_table(path, output, batch_size=2, format=TableFormat(
        delimiter=delimiter, quoted=True, header=True))
    assert found.rows == len(rows) and found.blank == sum(not text.strip() for _, text in rows)
    written = TableFormat(delimiter={".csv": delimiter, ".tsv": "\t"}.get(ending), quoted=True, header=True)
    with read_table(str(output), written) as table:
        answered = list(table)
    assert table.columns == ("note", "text", "label", "probability")
    wanted = [(*row, named(row[1]) if row[1].strip() else "") for row in rows]
    assert [(*row.cells[:2], row.cells[2] or "") for row in answered] == wanted
    if ending == ".csv":
        text = output.read_bytes().decode(encoding)
        assert table.format.encoding.lower() == encoding and text.count(end) >= len(rows) + 1  # type: ignore[union-attr]
        for row, source in zip(answered, read_sources(path, delimiter), strict=True):
            assert row.source.startswith(source + delimiter)


def read_sources(path: Path, delimiter: str) -> list[str]:
    with read_table(str(path), TableFormat(delimiter=delimiter, quoted=True, header=True)) as table:
        return [row.source for row in table]


def test_json_lines_keep_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ['{"text": "play jazz",  "n": 1.50, "tags": ["a"]}', '{"n": 2, "text": null}', "{ }",
             '{"text": "\\ud55c", "later": true}']
    path.write_text("\n".join(lines), encoding="utf-8")
    found = Lengths().predict_table(path, output, top_k=2)
    assert (found.rows, found.blank, found.added) == (4, 2, ("label", "probability", "label_2", "probability_2"))
    written = output.read_text(encoding="utf-8").splitlines()
    assert written[0].startswith(lines[0][:-1] + ', "label": "two"') and written[1].endswith('"probability_2": null}')
    answers = [json.loads(line) for line in written]
    assert answers[3] == {"text": "한", "later": True, "label": "one", "probability": pytest.approx(0.9994, abs=1e-3),
                          "label_2": "two", "probability_2": pytest.approx(1e-4, abs=1e-3)}
    monkeypatch.setattr("sentence_classifier.tables.SAMPLE", 80)
    message = refused(path, tmp_path / "out.csv")
    assert "'later'" in message and not (tmp_path / "out.csv").exists()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        Lengths().predict_table(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_accuracy_where_there_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("label,query,intent\nx,play,one\ny,play jazz,more\nz,play jazz,\nz,,one\n", encoding="utf-8")
    assert "several columns may hold the labels" in refused_guess(path)
    found = Lengths().predict_table(path, tmp_path / "out.tsv", label_column="intent")
    assert (found.rows, found.blank, found.labelled, found.correct) == (4, 1, 2, 1)
    assert found.added == ("predicted_label", "predicted_probability")
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()[0] == (
        "label\tquery\tintent\tpredicted_label\tpredicted_probability")


def refused_guess(path: Path) -> str:
    with read_table(str(path)) as table, pytest.raises(InputError) as error:
        table.guess_column(("class", "label", "intent"), "labels", "--label_column")
    return str(error.value)


def test_refusals_leave_the_output_alone(tmp_path: Path) -> None:
    path, output = tmp_path / "in.csv", tmp_path / "out.csv"
    output.write_text("mine", encoding="utf-8")
    for content, says in [("text,n\nplay,1\nplay jazz\n", "in.csv:3: 1 cells in a table of 2 columns"),
                          ("note,n\nplay,1\njazz,2\n", "no column's name says that it holds the sentences"),
                          ("", "the file is empty"),
                          ('text,n\n"play,1\n', "in.csv"), ("text,n\npl\0ay,1\n", "in.csv:2: the line holds a NUL")]:
        path.write_text(content, encoding="utf-8")
        assert says in refused(path, output)
    path.write_text("text,n\nplay,1\n", encoding="utf-8")
    assert "is expected at its end" in refused(path, tmp_path / "out.xlsx")
    assert "no column 'query'" in refused(path, output, text_column="query")
    path.write_bytes("text,n\n날씨,1\n".encode("cp949"))
    assert "in.csv:2: not text in UTF-8" in refused(path, output)
    (tmp_path / "in.jsonl").write_text('{"text": 5}\n', encoding="utf-8")
    assert "in.jsonl:1: 'text' holds 5, and text is expected" in refused(tmp_path / "in.jsonl", output)
    assert output.read_text(encoding="utf-8") == "mine" and {path.name for path in tmp_path.iterdir()} == {
        "in.csv", "in.jsonl", "out.csv"}
