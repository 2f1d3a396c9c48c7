"""Lines of text files: sentences and their labels, read as a stream."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from sentence_classifier.errors import InputError
from sentence_classifier.labels import normalize_label
from text.checks import file_fault
from util import open_input

BLOCK_BYTES = 1 << 20  # that are worked on at a time, rounded up to whole lines


class Example(NamedTuple):
    """One line of a TSV file."""

    line: int  # counted from 1
    sentence: str
    label: Any  # what `parse_label` made of it


class TsvReader:
    """The examples of a `sentence TAB label` file, read as a stream so that memory does not grow with the file.

    Lines end at LF or CRLF and at nothing else (a U+2028 inside a sentence is text). A byte order mark is dropped.

    Args:
        path: the file.
        skip_bad_lines: count bad lines in `skipped` in place of raising on the first.
        labelled: False reads a whole line as one sentence, and a TAB in it as an error.
        parse_label: turns a label's text into what Example.label holds; raises ValueError with the reason where it
            is unusable.

    Raises:
        InputError: with file, line, what is wrong and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], skip_bad_lines: bool = False, labelled: bool = True,
                 parse_label: Callable[[str], Any] = str) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.labelled = labelled
        self.parse_label: Any = parse_label  # perhaps an object, of which its maker asks more
        self.skipped = 0
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Example]:
        with contextlib.ExitStack() as stack:
            if str(self.path) == "-":
                file: IO[bytes] = sys.stdin.buffer
            else:
                file = stack.enter_context(open_input(self.path))
            usable = False
            for example in self.parse(file):
                usable = True
                yield example
            if not usable:
                raise self.no_line()

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """The file in blocks of whole lines, each with the number of its first line, under a bar."""
        first = 1
        with open_input(self.path) as file, bytes_bar(self.path) as bar:
            while block := file.read(BLOCK_BYTES):
                block += file.readline()
                yield first, block
                first += block.count(b"\n")
                bar.update(len(block))

    def parse(self, lines: Iterable[bytes], first: int = 1) -> Iterator[Example]:
        """The examples of raw lines, of which the first has the number `first`; see `blocks`."""
        self.skipped = self.bytes_read = 0
        for number, raw in enumerate(lines, first):
            self.bytes_read += len(raw)
            try:
                yield self._parse(number, raw)
            except ValueError as error:
                if not self.skip_bad_lines:
                    fault = None if str(self.path) == "-" else file_fault(self.path)
                    raise InputError(f"{self.path}: {fault}" if fault else f"{self.path}:{number}: {error} Correct the "
                                     "line, or pass --skip_bad_lines.") from None
                self.skipped += 1

    def no_line(self) -> InputError:
        """That no line is an example."""
        if self.skipped and str(self.path) != "-" and (fault := file_fault(self.path)):
            return InputError(f"{self.path}: {fault}")
        what = "no usable line" if self.skipped else "the file is empty"
        return InputError(f"{self.path}: {what}; one example a line is expected, sentence TAB label."
                          if self.labelled else f"{self.path}: {what}; one sentence a line is expected.")

    def _parse(self, number: int, raw: bytes) -> Example:
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"broken UTF-8 at byte {error.start + 1} of the line.") from None
        line = line.removesuffix("\n").removesuffix("\r")
        if "\0" in line:
            raise ValueError("the line holds a NUL character.")
        sentence, *rest = line.split("\t")
        sentence = sentence.strip()
        if len(rest) > self.labelled:
            raise ValueError("more than one TAB; sentence TAB label is expected." if self.labelled
                             else "a TAB; unlabelled input is one sentence a line.")
        if self.labelled and not rest:
            raise ValueError("no TAB; sentence TAB label is expected." if line.strip() else "the line is empty.")
        if not sentence:
            raise ValueError("the sentence is empty.")
        label = normalize_label(rest[0]) if rest else ""
        if self.labelled and not label:
            raise ValueError("the label is empty.")
        return Example(number, sentence, self.parse_label(label) if self.labelled else "")


def bytes_bar(path: str | os.PathLike[str]) -> tqdm[Any]:
    """A progress bar that knows the file's size."""
    return tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=Path(path).name, disable=None)


def progress(lines: TsvReader) -> Iterator[Example]:
    """The examples of a file under a bar."""
    with bytes_bar(lines.path) as bar:
        for example in lines:
            yield example
            bar.update(lines.bytes_read - bar.n)


def chunks(examples: Iterable[Any], sentences: int = 1024, characters: int = 1 << 18) -> Iterator[list[Any]]:
    """Examples, or what else has a sentence, by so many, and fewer of long ones at a time."""
    chunk: list[Any] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += len(example.sentence)
        if len(chunk) == sentences or size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
