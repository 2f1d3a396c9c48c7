"""Flat arrays in one file, in the safetensors format: written as a stream, read as memory maps.

The format (https://github.com/huggingface/safetensors): the length of a JSON header (8 bytes, little-endian), the
header, the arrays one after another without gaps. Reading it can run no code, and memory stays flat at any file size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from sentence_classifier.errors import InputError
from sentence_classifier.lines import open_input
from util import atomic_write

DTYPES = {f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}")
          for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8))) for size in sizes}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ENCODED_FORMAT = "encoded-2"  # of the files that preprocess.py writes and dataset.py reads
HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own


class ArrayWriter:
    """Write named arrays of unknown length into one file, which appears whole when the `with` block ends well.

    Each column is spooled to a nameless temporary file in the target's folder, so that a killed process leaves nothing
    behind, and copied into its place at the end.

    Args:
        path: the file to make; what stands there is replaced at the end.
        columns: name to (dtype, shape of one row): `{"ids": ("i4", ()), "table": ("f4", (300,))}`.

    Attributes:
        metadata: strings stored beside the arrays; may be changed until the block ends.

    Raises:
        InputError: the target's folder cannot be written.
        OSError: the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str],
                 columns: Mapping[str, tuple[DTypeLike, tuple[int, ...]]]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._columns = {name: (np.dtype(dtype).newbyteorder("<"), tuple(shape))
                         for name, (dtype, shape) in columns.items()}
        for name, (dtype, _) in self._columns.items():
            if dtype not in CODES or name == "__metadata__":
                raise ValueError(f"no column {name!r} of {dtype} can be stored")
        self._rows = dict.fromkeys(columns, 0)
        self._spools: dict[str, IO[bytes]] = {}

    def __enter__(self) -> ArrayWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for name in self._columns:
                self._spools[name] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); choose another place.") from None
        return self

    def append(self, name: str, array: np.ndarray) -> None:
        """Add rows to the column `name`.

        Args:
            array: [rows, *shape of one row], of a dtype that the column's holds without loss.

        Raises:
            TypeError: the dtype does not fit.
            ValueError: the shape does not fit.
        """
        dtype, shape = self._columns[name]
        if array.shape[1:] != shape or not array.ndim:
            raise ValueError(f"column {name!r} has rows of shape {shape}, not an array of shape {array.shape}")
        rows = np.ascontiguousarray(array.astype(dtype, casting="safe", copy=False))
        self._spools[name].write(rows.data)
        self._rows[name] += len(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            for spool in self._spools.values():
                stack.enter_context(spool)
            if kind is None:
                self._assemble()

    def _assemble(self) -> None:
        if not all(isinstance(text, str) for pair in self.metadata.items() for text in pair):
            raise TypeError("metadata are strings")
        header: dict[str, Any] = {"__metadata__": self.metadata}
        # The widest numbers first: then each array starts at a multiple of its item size.
        names = sorted(self._columns, key=lambda name: -self._columns[name][0].itemsize)
        end = 0
        for name in names:
            dtype, shape = self._columns[name]
            begin, end = end, end + self._rows[name] * math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": [self._rows[name], *shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_write(self.path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                self._spools[name].seek(0)
                shutil.copyfileobj(self._spools[name], file, 1 << 16)  # four times as fast as by the megabyte


def open_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a file of arrays into memory.

    Returns:
        The arrays by name, and the metadata. A page is read when it is first touched; what is written to an array
        stays in this process (copy on write) and never reaches the file.

    Raises:
        InputError: there is no such file, or it is truncated, damaged or of another kind.
    """
    with open_input(path) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise ValueError("it is truncated or of another kind")
            layout, metadata = _parse_header(file.read(length), size - 8 - length)
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
            return {
                name: np.frombuffer(mapping, dtype, math.prod(shape), 8 + length + begin).reshape(shape)
                for name, (dtype, shape, begin) in layout.items()
            }, metadata
        except (ValueError, OverflowError, RecursionError, OSError) as error:
            raise InputError(f"{path}: not a usable file of arrays ({error}); make it again.") from None


def _parse_header(text: bytes, size: int) -> tuple[dict[str, tuple[np.dtype, list[int], int]], dict[str, str]]:
    """Name to (dtype, shape, first byte), and the metadata; ValueError unless the arrays fill `size` bytes exactly."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    layout: dict[str, tuple[np.dtype, list[int], int]] = {}
    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if (
                code in DTYPES and all(type(number) is int and number >= 0 for number in [*shape, begin, end])
                and end - begin == math.prod(shape) * DTYPES[code].itemsize
            ):
                layout[name] = DTYPES[code], shape, begin
                spans.append((begin, end))
            case _:
                raise ValueError(f"its header describes the array {name!r} wrongly")
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("its arrays overlap or leave gaps")
        position = end
    if position != size:
        raise ValueError(f"{size} bytes of data where its header says {position}")
    return layout, metadata


def fingerprint(table: np.ndarray, own_rows: int = 0) -> str:
    """A name for a table's content: the first `own_rows` rows whole, and of all rows 1,024 that are spread over them.

    Cheap for a memory map of any size: a vector file's rows are known by a sample, which tells files apart, and the
    random ones before them, which depend on few flags, by each number.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, 1024).astype(np.int64)) if len(table) else np.zeros(0, np.int64)
    digest = hashlib.sha256(str((table.shape, str(table.dtype))).encode())
    digest.update(np.ascontiguousarray(table[rows]).tobytes())
    for start in range(0, own_rows, 1 << 14):
        digest.update(np.ascontiguousarray(table[start : min(start + (1 << 14), own_rows)]).data)
    return f"{own_rows}-{digest.hexdigest()[:32]}" if own_rows else digest.hexdigest()[:32]


def has_fingerprint(table: np.ndarray, expected: str) -> bool:
    """Whether `expected` is the fingerprint of the table."""
    own_rows, _, digest = expected.rpartition("-")
    return fingerprint(table, int(own_rows or 0)) == expected
