"""Word vectors from a text file: GloVe, word2vec, fastText, ConceptNet Numberbatch.

Each line is a word and its numbers, separated by blanks; a first line `count dimension` may stand above them. A file
is parsed once, in parallel, into a cache beside it that later reads map into memory.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from sentence_classifier.errors import FullDisk, InputError
from sentence_classifier.lines import open_input
from text.arrays import ArrayWriter, open_arrays
from text.checks import foreign_format

logger = logging.getLogger(__name__)

CACHE_FORMAT = "word vectors 1"  # another number makes older caches stale
BLOCK = 1 << 20  # bytes of text parsed at a time; larger blocks leave the processor's cache and gain nothing
BOM = b"\xef\xbb\xbf"
NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
BLANKS = bytes.maketrans(b"\t\r\v\f", b"    ")


@dataclass(frozen=True)
class WordVectors:
    """Words and their vectors, in the order of the file (for the usual files, falling frequency)."""

    words: list[str]  # V words, each once
    table: np.ndarray  # [V, D] float32, a memory map; what is written to it stays in this process
    repeated: int  # lines left out because their word stood above already
    undecodable: int  # lines left out because their word is not UTF-8


def read_vectors(path: str | os.PathLike[str], cache: bool = True) -> WordVectors:
    """Read a text file of word vectors.

    Args:
        path: the file.
        cache: keep the parsed vectors in `path.cache`, recognised by the file's size and time, and read them from
            there. Where it cannot be written, the log says so and reading goes on.

    Raises:
        InputError: with file, line, what is wrong and what to do.
    """
    path = Path(path)
    with open_input(path) as file:
        source = os.fstat(file.fileno())
    identity = {"format": CACHE_FORMAT, "source_size": str(source.st_size), "source_time": str(source.st_mtime_ns)}
    cached = path.with_name(f"{path.name}.cache")
    vectors = _load(cached, identity) if cache else None
    if vectors is None and cache:
        try:
            with tempfile.TemporaryFile(dir=path.parent):  # can the folder be written? Better known before the work.
                pass
            _convert(path, cached, identity)
            vectors = _load(cached, identity)
        except (OSError, FullDisk) as error:
            logger.warning("%s cannot be written (%s): the vectors will be parsed again each time.", cached,
                           error.strerror)
    if vectors is None:
        with tempfile.TemporaryDirectory() as folder:  # its file lives on, nameless, as long as it is mapped
            _convert(path, Path(folder) / cached.name, identity)
            vectors = _load(Path(folder) / cached.name, identity)
    assert vectors is not None
    if vectors.repeated or vectors.undecodable:
        logger.warning("%s: %d vectors; left out: %d with a word that stood above already, %d with a word that is not "
                       "UTF-8.", path, len(vectors.words), vectors.repeated, vectors.undecodable)
    return vectors


def _load(path: Path, identity: dict[str, str]) -> WordVectors | None:
    """The vectors in a cache, or None where there is none, or it is stale, damaged or something else."""
    try:
        arrays, metadata = open_arrays(path)
        if not metadata.items() >= identity.items():
            return None
        words = arrays["words"].tobytes().decode().removesuffix("\n").split("\n")
        table = arrays["table"]
        if table.ndim != 2 or table.dtype != np.float32 or len(table) != len(words):
            return None
        return WordVectors(words, table, int(metadata["repeated"]), int(metadata["undecodable"]))
    except (InputError, KeyError, ValueError):
        return None


def _convert(path: Path, target: Path, identity: dict[str, str]) -> None:
    """Parse the text file `path` into the array file `target`."""
    seen: set[str] = set()
    lines = repeated = undecodable = 0
    with open_input(path) as file:
        first, count, dimension = _read_head(path, file)
        with (ArrayWriter(target, {"table": ("f4", (dimension,)), "words": ("u1", ())}) as writer,
              tqdm(total=int(identity["source_size"]), desc=f"reading {path.name}", unit="B", unit_scale=True,
                   mininterval=0.5, delay=1) as bar):
            for size, words, table in _parse_blocks(path, file, first, dimension):
                keep = []
                for row, word in enumerate(words):
                    if word is None:
                        undecodable += 1
                    elif word in seen:
                        repeated += 1
                    else:
                        seen.add(word)
                        keep.append(row)
                writer.append("table", table[keep] if len(keep) < len(words) else table)
                kept = "".join(f"{words[row]}\n" for row in keep)
                writer.append("words", np.frombuffer(kept.encode(), np.uint8))
                lines += len(words)
                bar.update(size)
            if count is not None and lines != count:
                raise InputError(f"{path}:1: the header announces {count} vectors, but {lines} follow; fetch the file "
                                 "again, or correct the header.")
            if not seen:
                raise InputError(f"{path}: no word in it is UTF-8; convert the file to UTF-8.")
            writer.metadata |= identity | {"repeated": str(repeated), "undecodable": str(undecodable)}


def _read_head(path: Path, file: IO[bytes]) -> tuple[int, int | None, int]:
    """Find out a file's layout and leave it at its first vector.

    Returns:
        The line of the first vector (counted from 1), the number of vectors where a header says it, the dimension.
    """
    head = file.read(1 << 20)
    if foreign := foreign_format(head):
        raise InputError(f"{path}: the file is {foreign[0]}, and text is expected, a word and its numbers a line; "
                         f"{foreign[1] or 'save its vectors as text'}.")
    start = len(BOM) if head.startswith(BOM) else 0
    lines = head[start:].removesuffix(b"\n").split(b"\n")
    if len(lines) > 1 and len(head) == 1 << 20:
        lines.pop()  # cut short
    header = lines[0].split()
    count = None
    if len(header) == 2 and header[0].isdigit() and header[1].isdigit():
        count, dimension = (int(field[:18]) for field in header)
        start += len(lines[0]) + 1
        if dimension and len(lines) > 1:  # where the two disagree, better known before memory is set aside
            try:
                _parse_line(lines[1], dimension)
            except ValueError as error:
                raise _bad_line(path, 2, error, dimension) from None
    else:
        # A word may hold blanks, so that only the numbers at the end of a line tell the dimension; a single line may
        # be broken, so that the most frequent one counts.
        lengths: Counter[int] = Counter()
        for line in lines[:100]:
            fields = line.split()[1:]
            others = (place for place, field in enumerate(reversed(fields)) if not NUMBER.fullmatch(field))
            lengths[next(others, len(fields))] += 1
        dimension = max(lengths, key=lambda length: (lengths[length], length))
    if not dimension:
        raise InputError(f"{path}:1: {'no word with its vector' if head else 'the file is empty'}; each line must be "
                         "a word and its numbers, separated by blanks.")
    file.seek(start)
    return 1 if count is None else 2, count, dimension


def _parse_blocks(path: Path, file: IO[bytes], number: int,
                  dimension: int) -> Iterator[tuple[int, list[str | None], np.ndarray]]:
    """Parse the rest of a file, whose next line is line `number`, in parallel but in order.

    Yields:
        Size in bytes, words and vectors of a block; see _parse_block.
    """
    workers = min(os.cpu_count() or 1, 8)
    pending: deque[tuple[int, Future[tuple[list[str | None], np.ndarray, ValueError | None]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            block = file.read(BLOCK)
            block += file.readline(BLOCK)  # bounded: in a file without line ends there are no vectors either
            if block:
                pending.append((len(block), pool.submit(_parse_block, block, dimension)))
            elif not pending:
                return
            if not block or len(pending) > 2 * workers:
                size, parsed = pending.popleft()
                words, table, error = parsed.result()
                number += len(words)
                if error:
                    raise _bad_line(path, number, error, dimension)
                yield size, words, table


def _bad_line(path: Path, number: int, error: ValueError, dimension: int) -> InputError:
    return InputError(f"{path}:{number}: {error}, where a word and {dimension} numbers are expected; correct or remove "
                      "the line, or fetch the file again.")


def _parse_block(block: bytes, dimension: int) -> tuple[list[str | None], np.ndarray, ValueError | None]:
    """Parse whole lines.

    Where one blank stands between all fields, Arrow converts all numbers at once. A block with another line (a word
    with blanks, tabs beside blanks) or with a fault goes to _parse_line.

    Returns:
        n words (None for one that is not UTF-8), their vectors [n, dimension], and what is wrong with the line after
        them, where one is.
    """
    # Blanks of one kind, none at the lines' ends where the first has one, as in fastText's files and before CRLF.
    if any(blank in block for blank in (b"\r", b"\t", b"\v", b"\f")):
        block = block.translate(BLANKS)
    if block[:block.find(b"\n")].endswith(b" "):
        block = block.replace(b" \n", b"\n")
    if not block.endswith(b"\n"):
        block += b"\n"
    if (parsed := _parse_even(block, dimension)) is not None:
        words, table = parsed
        return [_decode(word) for word in words], table, None
    words, rows, wrong = [], [], None
    for line in block.removesuffix(b"\n").split(b"\n"):
        try:
            word, row = _parse_line(line, dimension)
        except ValueError as error:
            wrong = error
            break
        words.append(word)
        rows.append(row)
    return [_decode(word) for word in words], np.array(rows, np.float32).reshape(-1, dimension), wrong


def _parse_even(block: bytes, dimension: int) -> tuple[list[bytes], np.ndarray] | None:
    """The words and numbers of lines whose fields one blank separates; None where a line is another.

    The block as it is becomes an Arrow array of strings, fields and what stands between them in turn. All that is no
    number is marked as missing, and passed over. b"a 1 2\\nb 3 4\\n", whose fields end at [[1, 3, 5], [7, 9, 11]]:

        bounds   0   1   2   3   4    5   6   7   8   9   10   11   12
        strings  "a" " " "1" " " "2" "\\n" "b" " " "3" " " "4" "\\n"
        present   no  no yes  no yes  no   no  no yes  no yes  no
    """
    import pyarrow as pa

    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((characters == ord(" ")) | (characters == ord("\n")))
    last = np.flatnonzero(characters[ends] == ord("\n"))  # the fields that are the last of a line
    if (np.diff(last, prepend=-1) != dimension + 1).any():
        return None
    ends = ends.reshape(-1, dimension + 1)  # type: ignore[assignment]
    starts = [0, *(ends[:-1, -1] + 1).tolist()]
    words = [block[start:end] for start, end in zip(starts, ends[:, 0].tolist(), strict=True)]
    bounds = np.zeros(2 * ends.size + 1, np.int32)
    bounds[1::2] = ends.reshape(-1)
    np.add(bounds[1::2], 1, out=bounds[2::2])
    present = np.zeros((*ends.shape, 2), bool)
    present[:, 1:, 0] = True
    parts = (bounds, characters, np.packbits(present, bitorder="little"))
    try:
        cast = pa.StringArray.from_buffers(present.size, *map(pa.py_buffer, parts)).cast(pa.float32())
    except pa.ArrowInvalid:
        return None
    numbers = np.frombuffer(cast.buffers()[1], np.float32, present.size).reshape(present.shape)[:, 1:, 0]
    return (words, numbers) if all(words) and np.isfinite(numbers).all() else None


def _parse_line(line: bytes, dimension: int) -> tuple[bytes, np.ndarray]:
    """Parse a line: a word, which may hold blanks, and `dimension` numbers; ValueError where it is something else."""
    fields = line.split()
    numbers = fields[-dimension:]
    wrong = [field for field in numbers if not NUMBER.fullmatch(field)]
    vector = np.empty(0, np.float32)
    # Numbers inside a word with blanks are rather those of a vector that is too long, or of a line that lost its end.
    if len(fields) <= dimension or any(map(NUMBER.fullmatch, fields[1:-dimension])):
        fault = f"{sum(map(bool, map(NUMBER.fullmatch, fields[1:])))} numbers"
    elif wrong:
        fault = f"{wrong[0].decode(errors='backslashreplace')[:40]!r} in place of a finite number"
    else:
        with np.errstate(over="ignore"):
            vector = np.array([float(field) for field in numbers]).astype(np.float32)
        fault = "" if np.isfinite(vector).all() else "a number beyond single precision's range"
    if fault:
        raise ValueError(fault)
    return line.rsplit(None, dimension)[0].strip(), vector


def _decode(word: bytes) -> str | None:
    try:
        return word.decode()
    except UnicodeDecodeError:
        return None
