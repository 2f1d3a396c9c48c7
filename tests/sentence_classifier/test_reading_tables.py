"""Tables are read as they were written, or refused in one sentence that says where."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from sentence_classifier.tables import ANY, TableFormat, read_table, text_and_label

WORDS = st.text(st.sampled_from("abc Öü날씨,;|\t\"'\n\r.:5"), max_size=12)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def read(path: str, given: TableFormat = ANY, names: tuple[str, ...] = ()) -> tuple[Any, list[Any]]:
    with read_table(path, given, names) as table:
        return table, list(table)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(WORDS, WORDS, st.sampled_from(["PlayMusic", "5", "날씨"])), min_size=1, max_size=12),
       delimiter=st.sampled_from(",;\t|"), encoding=st.sampled_from(ENCODINGS), end=st.sampled_from(["\n", "\r\n"]),
       header=st.booleans(), zipped=st.booleans(), all_quoted=st.booleans())
def test_what_csv_writes_arrives(tmp_path: Path, rows: list[tuple[str, str, str]], delimiter: str, encoding: str,
                                 end: str, header: bool, zipped: bool, all_quoted: bool) -> None:
    """With its format named, any table arrives; with nothing named, it arrives or is refused in a sentence."""
    file = io.StringIO()
    all_quoted |= any("\r" in cell for row in rows for cell in row)  # which the writer does not count as a line break
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end,
                        quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    names = ("text", "note", "label")
    first = f"{delimiter.join(names)}{end}"
    file.write(first if header else "")
    writer.writerows(rows)
    content = file.getvalue().encode(encoding)
    path = tmp_path / ("table.csv.gz" if zipped else "table.csv")
    path.write_bytes(gzip.compress(content) if zipped else content)
    known = TableFormat(encoding=encoding if encoding[-2:] in ("le", "be") else None, delimiter=delimiter, quoted=True,
                        header=header)
    table, found = read(str(path), known)
    assert table.columns == (names if header else ("1", "2", "3"))
    assert [tuple(row.cells) for row in found] == rows
    sources = "".join(f"{row.source}{end}" for row in found)
    assert sources == (file.getvalue().removeprefix(first) if header else file.getvalue())


SENTENCES = st.lists(st.sampled_from(
    ["play", "some", "jazz,", "please;", '"Hey', 'Jude"', "it's", "5", "a|b", "day\ntwo", "날씨가", "어때?", '"why?"']),
    min_size=1, max_size=9).map(" ".join)
LABELS = st.sampled_from(["PlayMusic", "5", "날씨", "get, weather"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(SENTENCES, LABELS), min_size=6, max_size=30), delimiter=st.sampled_from(",;\t"),
       encoding=st.sampled_from(ENCODINGS), header=st.sampled_from(["text", "Utterances", " Comment", None]),
       swapped=st.booleans(), plain=st.booleans())
def test_how_a_table_is_written_is_found_out(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str,
                                             encoding: str, header: str | None, swapped: bool, plain: bool) -> None:
    """Right, or refused in a sentence; in plain TSV quotes are text, and cells hold no line break."""
    if plain:
        delimiter, rows = "\t", [(sentence.replace("\n", " "), label) for sentence, label in rows]
    columns = (1, 0) if swapped else (0, 1)
    file = io.StringIO()
    written = [tuple(row[column] for column in columns) for row in [(header or "", "intent")] * bool(header) + rows]
    if plain:
        file.writelines(f"{delimiter.join(row)}\n" for row in written)
    else:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(written)
    path = write(tmp_path / "table", file.getvalue(), encoding)
    try:
        with read_table(path) as table:
            sentence, label = text_and_label(table, None, None)
            found = [(row.cells[sentence], row.cells[label]) for row in table]
    except InputError as error:
        assert path in str(error) and "\n" not in str(error)
        event("refused")
        return
    assert found == rows, table.format
