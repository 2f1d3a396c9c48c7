"""A table with a classifier's answers: every row and column as it was, and columns with labels and probabilities."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sentence_classifier.errors import InputError
from sentence_classifier.labels import normalize_label, split_labels
from sentence_classifier.lines import Example
from sentence_classifier.tables import ANY, LABEL_NAMES, TEXT_NAMES, Row, Table, TableFormat, read_table, shown

if TYPE_CHECKING:
    from sentence_classifier.classifier import TextClassifier

ROWS = 1024  # that are read before they are answered
DIGITS = 6


@dataclass
class AnsweredTable:
    """What `predict_table` found.

    Attributes:
        rows: how many there are.
        blank: how many have no text, and so an empty answer.
        labelled: how many have a label to compare with.
        correct: how many of these were answered with it.
        added: the names of the new columns.
    """

    rows: int = 0
    blank: int = 0
    labelled: int = 0
    correct: int = 0
    added: tuple[str, ...] = ()


def predict_table(classifier: TextClassifier, input_path: str, output_path: str, text_column: str | None = None,
                  label_column: str | None = None, top_k: int = 1, batch_size: int = 32,
                  format: TableFormat = ANY) -> AnsweredTable:
    """Answer a table's sentences in a copy of it. Memory holds a part of the table at a time.

    Args:
        input_path: CSV, TSV, JSON lines or parquet; "-" is standard input.
        output_path: .csv, .tsv, .jsonl or .parquet; it appears whole, at the end.
        text_column: the sentences' column, by name or by number from 1; None: the one that is usually called so.
        label_column: a column of labels to compare with; None: the one that is usually called so, if there is one.
        top_k: how many labels a row gets, the likeliest first.
        format: what is known of how the input is written.

    Raises:
        InputError: the table cannot be read, or its columns are not clear, or the output cannot be written.
        ValueError: top_k or batch_size is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, and a whole number of at least 1 is needed.")
    top_k = min(top_k, len(classifier.labels))
    with read_table(input_path, format, [name for name in (text_column, label_column) if name]) as table:
        text, label = find_columns(table, text_column, label_column)
        several = classifier.decision.multi_label
        names = ["labels"] * several + [name for place in range(1, top_k + 1) for name in (
            ("label", "probability") if place == 1 else (f"label_{place}", f"probability_{place}"))]
        if set(names) & set(table.columns):
            names = [f"predicted_{name}" for name in names]
        found = AnsweredTable(added=tuple(names))
        rows = iter(table)
        with _writer(output_path, table, names) as writer:
            while part := list(islice(rows, ROWS)):
                sentences = [_sentence(table, row, text) for row in part]
                known = [place for place, sentence in enumerate(sentences) if sentence]
                answers: list[list[Any]] = [[None] * len(names)] * len(part)
                if known:
                    probabilities = classifier.predict_probabilities([sentences[place] for place in known], batch_size)
                    best = _best(classifier.labels.names, probabilities, top_k)
                    if several:
                        sets = _sets(classifier, probabilities)
                        best = ([labels, *row] for labels, row in zip(sets, best, strict=True))
                    for place, answer in zip(known, best, strict=True):
                        answers[place] = answer
                for row, answer in zip(part, answers, strict=True):
                    writer.write(row, answer)
                    if label is not None and answer[0] is not None and (several or row.cells[label] not in (None, "")):
                        found.labelled += 1
                        found.correct += _label_set(row.cells[label], classifier) == _label_set(answer[0], classifier)
                if table.later_keys and not isinstance(writer, JsonLinesWriter):
                    raise InputError(f"{input_path}: row {found.rows + 1} or one soon after has keys that the first "
                                     f"rows lack ({shown(table.later_keys)}), for which {output_path} has no column; "
                                     "write a .jsonl file.")
                found.rows += len(part)
                found.blank += len(part) - len(known)
    return found


def find_columns(table: Table, text_column: str | None, label_column: str | None) -> tuple[int, int | None]:
    """The places of a table's sentences, and of its labels where it has some."""
    if text_column is None and len(table.columns) == 1:
        return 0, None
    label = table.column(label_column) if label_column else None
    text = (table.column(text_column) if text_column
            else table.guess_column(TEXT_NAMES, "sentences", "--text_column", label))
    if label is None:
        with contextlib.suppress(InputError):
            label = table.guess_column(LABEL_NAMES, "labels", "--label_column", text)
    return text, label


def table_lines(table: Table, text_column: str | None) -> Iterator[Example]:
    """The sentences of a table, each with the number of its row."""
    place, _ = find_columns(table, text_column, None)
    return (Example(row.number, _sentence(table, row, place)) for row in table)


def _sentence(table: Table, row: Row, place: int) -> str:
    cell = row.cells[place]
    fault = None if cell is None or isinstance(cell, str) else f"holds {cell!r:.40}, and text is expected"
    sentence = (cell or "").strip() if fault is None else ""
    try:
        sentence.encode()
    except UnicodeEncodeError:
        fault = "holds half of a surrogate pair"
    if fault:
        raise InputError(f"{table.path}:{row.number}: {table.columns[place]!r} {fault}.")
    return sentence


def _label_set(cell: Any, classifier: TextClassifier) -> set[str]:
    """The labels that a cell holds: a list of them, several with separators, one or none."""
    if isinstance(cell, list):
        return {normalize_label(str(one)) for one in cell}
    text = "" if cell is None else " ".join(str(cell).split())
    decision = classifier.decision
    return set(split_labels(text, decision.separator)) if decision.multi_label else {normalize_label(text)}


def _sets(classifier: TextClassifier, probabilities: np.ndarray) -> Iterator[str]:
    """For each row of probabilities [N, C] its labels, joined."""
    names = classifier.labels.names
    return (classifier.decision.separator.join(names[place] for place in np.flatnonzero(row))
            for row in classifier.decision.decide(probabilities))


def _best(names: Sequence[str], probabilities: np.ndarray, top_k: int) -> Iterator[list[Any]]:
    """For each row of probabilities [N, C] the likeliest labels, each with its probability."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(probabilities, order, 1).astype(float).round(DIGITS)
    for places, values in zip(order.tolist(), best.tolist(), strict=True):
        yield [cell for place, value in zip(places, values, strict=True) for cell in (names[place], value)]


# ----------------------------------------------------------------------------------------------------------- writers


class TableWriter(ABC):
    """Writes a table's rows with more cells."""

    @abstractmethod
    def write(self, row: Row, added: Sequence[Any]) -> None:
        """Write a row; what is added is None where there is no answer."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class CsvWriter(TableWriter):
    """CSV or TSV. Where the input is written alike, its rows are copied byte for byte."""

    def __init__(self, file: IO[bytes], table: Table, names: Sequence[str], delimiter: str) -> None:
        self.copies = table.format.kind == "csv" and table.format.delimiter == delimiter
        self.file = io.TextIOWrapper(file, (table.format.encoding if self.copies else None) or "utf-8", newline="")
        self.end = table.line_end if self.copies else "\n"
        self.delimiter = delimiter
        quoted = not self.copies or table.format.quoted
        self.made = io.StringIO()
        style: Any = {} if quoted else {"quoting": csv.QUOTE_NONE, "quotechar": None}
        # A writer quotes cells in which its end of a line stands.
        self.csv = csv.writer(self.made, delimiter=delimiter, lineterminator="\r\n", **style)
        if table.format.header or not self.copies:
            self.write(Row(1, table.columns, table.header_source), names)

    def write(self, row: Row, added: Sequence[Any]) -> None:
        if self.copies:
            kept = row.source + self.delimiter
        else:
            kept = self._line([_csv_text(cell) for cell in row.cells]) + self.delimiter
        self.file.write(kept + self._line(["" if cell is None else cell for cell in added]) + self.end)

    def _line(self, cells: Sequence[Any]) -> str:
        self.made.seek(0)
        self.made.truncate()
        try:
            self.csv.writerow(cells)
        except csv.Error:
            raise InputError(f"the labels {shown(cells)} hold the table's delimiter, and it is without quotes; write a "
                             ".jsonl file.") from None
        return self.made.getvalue().removesuffix("\r\n")

    def close(self) -> None:
        self.file.flush()
        self.file.detach()


def _csv_text(cell: Any) -> str:
    """A cell of JSON or parquet as CSV has it."""
    if cell is None:
        return ""
    return json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, list | dict) else str(cell)


class JsonLinesWriter(TableWriter):
    """JSON lines in UTF-8. Objects of the input are copied byte for byte."""

    def __init__(self, file: IO[bytes], table: Table, names: Sequence[str]) -> None:
        if len(set(table.columns)) < len(table.columns):
            raise InputError(f"{table.path}: two columns have one name ({shown(table.columns)}), which JSON has not.")
        self.file = file
        self.table = table
        self.names = names

    def write(self, row: Row, added: Sequence[Any]) -> None:
        answer = json.dumps(dict(zip(self.names, added, strict=True)), ensure_ascii=False)
        if self.table.format.kind == "jsonl":
            kept = row.source.rstrip().removesuffix("}").rstrip()
        else:
            cells = dict(zip(self.table.columns, row.cells, strict=True))
            kept = json.dumps(cells, ensure_ascii=False, default=str)[:-1]
        self.file.write(f"{kept}{', ' if kept != '{' else ''}{answer[1:]}\n".encode())

    def close(self) -> None:
        pass


class ParquetWriter(TableWriter):
    """Parquet, with the types of the input where that is parquet; CSV's cells are strings."""

    def __init__(self, file: IO[bytes], table: Table, names: Sequence[str]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise InputError("writing parquet needs the package pyarrow.") from None
        self.pyarrow = pyarrow
        added = [pyarrow.field(name, pyarrow.float64() if "probability" in name else pyarrow.string())
                 for name in names]
        kept = table.schema or self._schema(table)
        self.schema = pyarrow.schema([*kept, *added], metadata=kept.metadata)
        self.writer = parquet.ParquetWriter(file, self.schema)
        self.rows: list[list[Any]] = []

    def _schema(self, table: Table) -> Any:
        if table.format.kind == "csv":
            return self.pyarrow.schema([(name, self.pyarrow.string()) for name in table.columns])
        columns = zip(*table.first_rows, strict=True)
        return self.pyarrow.schema([(name, self.pyarrow.array(cells).type)
                                    for name, cells in zip(table.columns, columns, strict=True)])

    def write(self, row: Row, added: Sequence[Any]) -> None:
        self.rows.append([*row.cells, *added])
        if len(self.rows) == 64 * ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = [self.pyarrow.array(cells, type=field.type)
                   for cells, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)]
        if columns:
            self.writer.write_table(self.pyarrow.Table.from_arrays(columns, schema=self.schema))
        self.rows = []

    def close(self) -> None:
        self._flush()
        self.writer.close()


@contextlib.contextmanager
def _writer(path: str, table: Table, names: Sequence[str]) -> Iterator[TableWriter]:
    """The writer for a file's ending. The file takes its name when the block ends well."""
    ending = Path(path).suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise InputError(f"--output_path={path}: .csv, .tsv, .jsonl or .parquet is expected at its end.")
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        file = open(temporary, "wb")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place.") from None
    try:
        with file:
            if ending == ".jsonl":
                writer: TableWriter = JsonLinesWriter(file, table, names)
            elif ending == ".parquet":
                writer = ParquetWriter(file, table, names)
            else:
                own = table.format.delimiter if table.format.kind == "csv" and ending == ".csv" else None
                writer = CsvWriter(file, table, names, "\t" if ending == ".tsv" else own or ",")
            try:
                yield writer
            finally:
                writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
