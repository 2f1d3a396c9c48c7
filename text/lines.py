"""Lines of text files: sentences and their labels, read as a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sentence_classifier.labels import normalize_label
from sentence_classifier.lines import Example, SentenceReader, open_input
from text.checks import file_fault

BLOCK_BYTES = 1 << 20  # that are worked on at a time, rounded up to whole lines


class TsvReader(SentenceReader):
    """The examples of a `sentence TAB label` file, read as a stream so that memory does not grow with the file.

    Args:
        labelled: False reads a whole line as one sentence, and a TAB in it as an error.
        empty_labels: a label may be empty, where a sentence may have several or none.
        parse_label: turns a label's text into what Example.label holds; raises ValueError with the reason where it
            is unusable.

    Raises:
        InputError: with file, line, what is wrong and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], skip_bad_lines: bool = False, labelled: bool = True,
                 parse_label: Callable[[str], Any] = str, empty_labels: bool = False) -> None:
        super().__init__(path, skip_bad_lines)
        self.empty_labels = empty_labels
        self.labelled = labelled
        self.parse_label: Any = parse_label  # perhaps an object, of which its maker asks more
        if labelled:
            self.expected = "one example a line is expected, sentence TAB label"

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """The file in blocks of whole lines, for `parse`, each with the number of its first line, under a bar."""
        first = 1
        with open_input(self.path) as file, bytes_bar(self.path) as bar:
            while block := file.read(BLOCK_BYTES):
                block += file.readline()
                yield first, block
                first += block.count(b"\n")
                bar.update(len(block))

    def fault(self) -> str | None:
        """See file_fault."""
        return None if str(self.path) == "-" else file_fault(self.path)

    def example(self, number: int, line: str) -> Example:
        """What a line holds; raises ValueError with the reason if it cannot be used."""
        sentence, *rest = line.split("\t") if self.labelled else [super().example(number, line).sentence]
        if self.labelled and len(rest) != 1:
            raise ValueError("more than one TAB; sentence TAB label is expected." if rest else
                             "no TAB; sentence TAB label is expected." if line.strip() else "the line is empty.")
        if not (sentence := sentence.strip()):
            raise ValueError("the sentence is empty.")
        if not self.labelled:
            return Example(number, sentence)
        if not (label := normalize_label(rest[0])) and not self.empty_labels:
            raise ValueError("the label is empty.")
        return Example(number, sentence, self.parse_label(label))


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
