"""Tables as people have them: CSV, TSV, JSON lines and parquet, read row by row in memory that stays flat.

`read_table` finds out how a file is written (text encoding, delimiter, quotes, header) from its first part, unless it
is told. What a later row contradicts is an error that names the row: nothing is guessed twice.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from sentence_classifier.errors import InputError

SAMPLE = 1 << 20  # bytes by which a file is recognised
LONGEST_CELL = 1 << 24  # characters; a quote that is never closed would take the rest of the file for a cell
DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
TEXT_NAMES = tuple("text sentence utterance query comment document review question message content title tweet "
                   "input document_text 문장 텍스트 句子 文本".split())
LABEL_NAMES = tuple("label intent category class target topic emotion sentiment tag output "
                    "gold y 라벨 레이블 标签 類別 ラベル".split())
BOMS = {codecs.BOM_UTF8: "UTF-8-SIG", codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
        codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
Kind = Literal["csv", "jsonl", "parquet"]


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        number: of its first line in a file of text, of the row in a parquet file; counted from 1.
        cells: strings in a CSV or TSV file, else what JSON or parquet has; None where there is nothing.
        source: its text in the file, without the end of the line; empty for parquet.
    """

    number: int
    cells: Sequence[Any]
    source: str


@dataclass(frozen=True)
class TableFormat:
    """How a table is written. What is None is found out from the file.

    Attributes:
        kind: csv stands for TSV as well.
        encoding: of the text, by Python's name.
        delimiter: what separates cells.
        quoted: whether cells may stand in double quotes; else quotes are text.
        header: whether the first row names the columns; else they are called 1, 2, 3 ...
    """

    kind: Kind | None = None
    encoding: str | None = None
    delimiter: str | None = None
    quoted: bool | None = None
    header: bool | None = None

    def __str__(self) -> str:
        if self.kind == "parquet":
            return "parquet"
        if self.kind == "jsonl":
            return f"JSON lines in {self.encoding}"
        names = {value: name for name, value in DELIMITERS.items()}
        return (f"{self.encoding}, delimiter {names.get(self.delimiter or '', repr(self.delimiter))}, "
                f"{'with' if self.quoted else 'without'} quotes, {'with' if self.header else 'without'} header")


ANY = TableFormat()  # all to be found out


class Table:
    """A table's columns, and its rows as an iterator, to be gone through once.

    Attributes:
        path: the file; "-" is standard input.
        format: how it is written, with nothing left open.
        columns: their names.
        first_rows: the cells of the rows by which the format was found out.
        blank_lines: lines that hold nothing, counted while the rows are read.
        later_keys: of JSON objects, those that `columns` lacks, collected while the rows are read.
        header_source: the header's text in a CSV file.
        line_end: how lines end in a CSV file.
        schema: a parquet file's.
    """

    def __init__(self, path: str, format: TableFormat, columns: Sequence[str], rows: Iterator[Row],
                 first_rows: Sequence[Sequence[Any]]) -> None:
        self.path = path
        self.format = format
        self.columns = tuple(columns)
        self.first_rows = first_rows
        self.blank_lines = 0
        self.later_keys: set[str] = set()
        self.header_source = ""
        self.line_end = "\n"
        self.schema: Any = None
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            if isinstance(row.cells, dict):
                self.later_keys |= row.cells.keys() - set(self.columns)
                yield row._replace(cells=[row.cells.get(name) for name in self.columns])
            elif not row.cells and (len(self.columns) > 1 or self.format.kind == "jsonl"):
                self.blank_lines += 1
            elif len(row.cells or [""]) == len(self.columns):
                yield row._replace(cells=row.cells or [""])
            else:
                raise InputError(f"{self.path}:{row.number}: {len(row.cells)} cells in a table of {len(self.columns)} "
                                 f"columns ({shown(self.columns)}; {self.format}). Correct the row, or say how the "
                                 "table is written: --delimiter, --quotes, --no_header.")

    def column(self, name: str) -> int:
        """The place of a column by its name, or by its number from 1 where no column has that name.

        Raises:
            InputError: there is no such column, or two have the name.
        """
        for alike in (str, str.casefold):
            found = [place for place, one in enumerate(self.columns) if alike(one.strip()) == alike(name)]
            if len(found) > 1:
                raise InputError(f"{self.path}: {len(found)} columns are called {name!r}; name one by its number.")
            if found:
                return found[0]
        if name.isdecimal() and 1 <= int(name) <= len(self.columns):
            return int(name) - 1
        raise InputError(f"{self.path}: no column {name!r}; its columns are {shown(self.columns)} ({self.format}).")

    def guess_column(self, usual: Sequence[str], what: str, flag: str, other: int | None = None) -> int:
        """The place of the column that has one of the usual names.

        Args:
            what, flag: what the column holds and the flag that names it, for the message.
            other: a column that it is not.

        Raises:
            InputError: no column has such a name, or several have.
        """
        places = [place for place, name in enumerate(self.columns) if place != other and _is_usual(name, usual)]
        exact = [place for place in places if self.columns[place].strip().casefold() == usual[0]]
        if len(exact or places) == 1:
            return (exact or places)[0]
        which = "several columns may hold" if places else "no column's name says that it holds"
        raise InputError(f"{self.path}: {which} the {what}; name it with {flag}. The columns are {shown(self.columns)} "
                         f"({self.format}).")


def text_and_label(table: Table, text: str | None, label: str | None) -> tuple[int, int]:
    """The places of the sentences and of their labels, by name, by number, or as they are usually called.

    A table of two columns without a header has its labels where the fewer different cells are.

    Raises:
        InputError: it is not clear which they are.
    """
    if len(table.columns) < 2:
        raise InputError(f"{table.path}: one column alone ({shown(table.columns)}; {table.format}), and sentences and "
                         "labels are expected; is it --delimiter that is missing?")
    sentence, place = (table.column(name) if name else None for name in (text, label))
    if len(table.columns) == 2 and table.format.header is False and sentence is None and place is None:
        distinct = [len({row[column] for row in table.first_rows if len(row) == 2}) for column in (0, 1)]
        if max(distinct) >= 2 * min(distinct):
            sentence, place = distinct.index(max(distinct)), distinct.index(min(distinct))
    if len(table.columns) == 2:  # where one is known, the other one
        if sentence is None and place is not None:
            sentence = 1 - place
        elif place is None and sentence is not None:
            place = 1 - sentence
    if sentence is None:
        sentence = table.guess_column(TEXT_NAMES, "sentences", "--text_column", place)
    if place is None:
        place = table.guess_column(LABEL_NAMES, "labels", "--label_column", sentence)
    if sentence == place:
        raise InputError(f"{table.path}: the column {table.columns[place]!r} cannot hold both sentences and labels.")
    return sentence, place


def shown(names: Iterable[object], most: int = 20) -> str:
    """Names for a message, the first of them if they are many."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


@contextlib.contextmanager
def read_table(path: str, given: TableFormat = ANY, names: Sequence[str] = ()) -> Iterator[Table]:
    """Open a table.

    Args:
        path: the file, of a text kind also with .gz; "-" is standard input, which is text.
        given: what is known of its format.
        names: of columns that the caller looks for: a first row that has one of them is a header.

    Raises:
        InputError: no such file, or an empty one, or one of another kind. Reading the rows raises it, too.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = _open(path, stack)
            sample = stream.peek(SAMPLE)[:SAMPLE]
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: cannot be read ({reason}).") from None
        if not sample.strip():
            raise InputError(f"{path}: the file is empty; a table is expected.")
        kind = given.kind or _kind(path, sample)
        if kind == "parquet":
            yield _parquet(path)
            return
        encoding = given.encoding or find_encoding(sample)
        found = replace(given, kind=kind, encoding=encoding)
        lines = _Lines(path, stream, encoding)
        text = sample.decode(lines.codec, "replace")
        if len(sample) == SAMPLE:
            text = text[: text.rfind("\n") + 1] or text
        yield (_json_lines if kind == "jsonl" else _csv)(path, found, lines, text, names)


def _open(path: str, stack: contextlib.ExitStack) -> Any:
    if path == "-":
        return stack.enter_context(open(sys.stdin.fileno(), "rb", SAMPLE, closefd=False))
    if path.endswith(".gz"):
        return io.BufferedReader(stack.enter_context(gzip.open(path)), SAMPLE)
    return stack.enter_context(open(path, "rb", SAMPLE))


def _kind(path: str, sample: bytes) -> Kind:
    """What kind of table begins so, by its content where that says it, else by its name."""
    if sample.startswith(b"PAR1"):
        return "parquet"
    if sample.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: a zip archive or an Excel workbook; save the sheet as CSV (UTF-8).")
    start = sample.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1]
    if start == b"[" and path.removesuffix(".gz").endswith((".json", ".jsonl")):
        raise InputError(f"{path}: a JSON array; JSON lines are expected, one object a line (jq -c '.[]' {path}).")
    return "jsonl" if start == b"{" else "csv"


def find_encoding(sample: bytes) -> str:
    """The encoding of a text, by its byte order mark or by the zeros that UTF-16 has in most scripts; else UTF-8."""
    for mark, name in BOMS.items():
        if sample.startswith(mark):
            return name
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) >= max(8, len(sample) / 10) and min(even, odd) * 4 <= max(even, odd):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return "UTF-8"


class _Lines:
    """The lines of a text, which end at LF, with the end left on; counted in `number`, collected in `taken`."""

    def __init__(self, path: str, stream: Any, encoding: str) -> None:
        self.path = path
        try:
            wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
        except LookupError:
            raise InputError(f"--encoding={encoding}: no such text encoding; UTF-8, UTF-16, CP949, GB18030, Shift_JIS, "
                             "CP1252 and others are known.") from None
        self.codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        # What an encoding lacks is found where its line is read; UTF-16 has no such escapes.
        self._file = io.TextIOWrapper(stream, self.codec, "strict" if wide else "surrogateescape", newline="\n")
        self.encoding = encoding
        self.number = 0
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._file)
            self.number += 1
            line.encode()
        except UnicodeError:
            raise InputError(f"{self.path}:{self.number}: not text in {self.encoding}; name the file's encoding, such "
                             "as --encoding=CP949, or save it as UTF-8.") from None
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}:{self.number}: cannot be read on ({error}).") from None
        if "\0" in line:
            raise InputError(f"{self.path}:{self.number}: the line holds a NUL character; is the encoding right? Name "
                             "it with --encoding.")
        self.taken.append(line)
        return line


# --------------------------------------------------------------------------------------------------------------- CSV


def _csv(path: str, given: TableFormat, lines: _Lines, sample: str, names: Sequence[str]) -> Table:
    found, first_rows = _csv_format(path, given, sample, names)
    rows = csv_rows(lines, found)
    header = Row(1, [str(number) for number in range(1, len(first_rows[0]) + 1)], "")
    if found.header:
        header = next(row for row in rows if row.cells)
        first_rows = first_rows[1:]
    table = Table(path, found, [name.strip() for name in header.cells], rows, first_rows)
    table.header_source = header.source
    table.line_end = "\r\n" if "\r\n" in sample else "\n"
    return table


def _csv_format(path: str, given: TableFormat, sample: str,
                names: Sequence[str]) -> tuple[TableFormat, list[Sequence[str]]]:
    """The delimiter and the quotes by which all rows of a sample have as many cells, and whether it has a header."""
    delimiters = [given.delimiter] if given.delimiter else list(DELIMITERS.values())
    best: tuple[Any, TableFormat, list[Sequence[str]]] | None = None
    for delimiter in delimiters:
        for quoted in (True, False) if given.quoted is None else (given.quoted,):
            tried = replace(given, delimiter=delimiter, quoted=quoted)
            rows, whole = _sample_rows(path, sample, tried)
            widths = Counter(map(len, rows))
            width, count = widths.most_common(1)[0] if rows else (0, 0)
            fitting = count / len(rows) if rows else 0.0
            # Quotes that stand round whole cells are meant as quotes; in TSV a sentence may begin with one, too.
            meant = whole and (delimiter != "\t" or _quotes_round_cells(sample, delimiter))
            score = (width > 1, fitting == 1.0, fitting if width > 1 else 0.0, quoted == meant)
            if best is None or score > best[0]:
                best = score, tried, rows
    assert best is not None
    _, found, rows = best
    if not rows:
        raise InputError(f"{path}: no row in its first {SAMPLE >> 10} KB ({found}); is --quotes=none missing?")
    header = given.header
    return replace(found, header=_has_header(rows, names) if header is None else header), rows


def _sample_rows(path: str, sample: str, tried: TableFormat) -> tuple[list[Sequence[str]], bool]:
    """The rows of a sample that are not blank, and whether all of it could be read so."""
    rows: list[Sequence[str]] = []
    lines = _Lines(path, io.BufferedReader(io.BytesIO(sample.encode("utf-8", "replace"))), "UTF-8")
    try:
        for row in csv_rows(lines, tried):
            if row.cells:
                rows.append(row.cells)
    except InputError:
        return rows, lines.number == sample.count("\n")  # the sample's end may cut a cell
    return rows, True


def _quotes_round_cells(sample: str, delimiter: str) -> bool:
    """Whether quotes that cells begin with are a writer's: closed, and there for quotes within or round most cells."""
    lines = sample.splitlines()
    cells = [cell for line in lines for cell in line.split(delimiter) if cell.startswith('"')]
    needed = len(cells) >= len(lines) or all('""' in cell[1:-1] for cell in cells)
    return bool(cells) and needed and all(re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in cells)


def _has_header(rows: Sequence[Sequence[str]], names: Sequence[str]) -> bool:
    """Whether the first row names the columns: by a usual name, or by names none of which comes again in its column."""
    first = rows[0]
    new = [cell for place, cell in enumerate(first) if cell not in (row[place] for row in rows[1:] if len(row) > place)]
    if any(cell.strip() in names for cell in first) or any(_is_usual(cell, TEXT_NAMES + LABEL_NAMES) for cell in new):
        return True
    return len(new) == len(first) > 1


def _is_usual(name: str, usual: Sequence[str]) -> bool:
    name = name.strip().casefold()
    return name in usual or name.removesuffix("s") in usual


def csv_rows(lines: _Lines, format: TableFormat) -> Iterator[Row]:
    """The rows of a CSV file as the format says; a blank line is a row without cells.

    Raises:
        InputError: a quote that is not closed, or text behind a closed one.
    """
    assert format.delimiter is not None
    if not format.quoted:
        for line in lines:
            lines.taken.clear()
            source = line.removesuffix("\n").removesuffix("\r")
            yield Row(lines.number, source.split(format.delimiter) if source else [], source)
        return
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(lines, delimiter=format.delimiter, strict=True)
    while True:
        first = lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{lines.path}:{first}: not a row of {format} ({error}). Correct the row, or, if quotes "
                             "are part of the text, pass --quotes=none.") from None
        if cells is None:
            return
        source = "".join(lines.taken)
        lines.taken.clear()
        yield Row(first, cells, source.removesuffix("\n").removesuffix("\r"))


# -------------------------------------------------------------------------------------------------- JSON, parquet


def _json_lines(path: str, found: TableFormat, lines: _Lines, sample: str, names: Sequence[str]) -> Table:
    columns: dict[str, None] = {}
    first_rows = []
    for number, line in enumerate(sample.splitlines(), 1):
        if line.strip():
            row = _json_object(path, number, line)
            columns |= dict.fromkeys(row)
            first_rows.append(row)

    def rows() -> Iterator[Row]:
        for line in lines:
            lines.taken.clear()
            yield Row(lines.number, _json_object(path, lines.number, line) if line.strip() else [],  # type: ignore
                      line.removesuffix("\n").removesuffix("\r"))

    return Table(path, found, tuple(columns), rows(), [[row.get(name) for name in columns] for row in first_rows])


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a key stands twice in an object")
        return made

    try:
        found = json.loads(line, object_pairs_hook=unique)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not JSON ({error}); one object a line is expected.") from None
    except RecursionError:
        raise InputError(f"{path}:{number}: JSON nested too deep; one object a line is expected.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}:{number}: JSON, but no object; a line is expected to be as "
                         '{"text": "play some jazz", "label": "PlayMusic"}.')
    return found


def _parquet(path: str) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs the package pyarrow.") from None
    if path == "-":
        raise InputError("standard input: parquet cannot be read from a pipe; name the file.")
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}).") from None
    names = file.schema_arrow.names

    def rows() -> Iterator[Row]:
        with file:
            cells = (row for batch in file.iter_batches(1024)
                     for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
            for number, row in enumerate(cells, 1):
                yield Row(number, row, "")

    table = Table(path, TableFormat("parquet"), names, rows(), [])
    table.schema = file.schema_arrow
    return table
