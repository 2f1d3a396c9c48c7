"""Lines of text files, read as a stream."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """One line of a file."""

    line: int  # counted from 1
    sentence: str
    label: Any = ""


def open_input(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading bytes.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


class SentenceReader:
    """The lines of a file of sentences. An empty line is an empty sentence.

    Lines end at LF or CRLF and at nothing else (a U+2028 inside a sentence is text). A byte order mark is dropped.

    Args:
        path: the file; "-" is standard input.
        skip_bad_lines: count bad lines in `skipped` in place of raising on the first.

    Raises:
        InputError: no such file, an empty one, or a line that is not UTF-8 or holds a TAB or NUL character.
    """

    expected = "one sentence a line is expected"

    def __init__(self, path: str | os.PathLike[str], skip_bad_lines: bool = False) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.skipped = self.bytes_read = 0

    def __iter__(self) -> Iterator[Example]:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if str(self.path) == "-" else stack.enter_context(open_input(self.path))
            usable = False
            for example in self.parse(file):
                usable = True
                yield example
        if usable and self.skipped:
            logger.warning("[%s] %d bad lines were skipped", self.path, self.skipped)
        if not usable:
            fault = self.skipped and self.fault()
            what = "no usable line" if self.skipped else "the file is empty"
            raise InputError(f"{self.path}: {fault or f'{what}; {self.expected}.'}")

    def parse(self, lines: Iterable[bytes], first: int = 1) -> Iterator[Example]:
        """The examples of raw lines, of which the first has the number `first`."""
        self.skipped = self.bytes_read = 0
        for number, raw in enumerate(lines, first):
            self.bytes_read += len(raw)
            try:
                line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode("utf-8")
                if "\0" in line:
                    raise ValueError("the line holds a NUL character.")
                yield self.example(number, line.removesuffix("\n").removesuffix("\r"))
            except ValueError as error:
                if not self.skip_bad_lines:
                    said = (f"broken UTF-8 at byte {error.start + 1} of the line; the file has to be in UTF-8."
                            if isinstance(error, UnicodeDecodeError) else error)
                    fault = self.fault()
                    raise InputError(f"{self.path}: {fault}" if fault else f"{self.path}:{number}: {said} Correct the "
                                     "line, or pass --skip_bad_lines.") from None
                self.skipped += 1

    def example(self, number: int, line: str) -> Example:
        """What a line holds; raises ValueError with the reason if it cannot be used."""
        if "\t" in line:
            raise ValueError("a TAB; unlabelled input is one sentence a line.")
        return Example(number, line.strip())

    def fault(self) -> str | None:
        """What is wrong with the file as a whole and what to do, where no single line is to blame."""
        return None
