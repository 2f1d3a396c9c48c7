"""vectors.py: word vectors from text files."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from text import vectors
from text.arrays import ArrayWriter
from text.vectors import WordVectors, read_vectors

ROOT = Path(__file__).parents[2]
PLAIN = b"the 0.1 -0.2 3e-05\nof .5 1. +2\n"


def write(folder: Path, content: bytes) -> Path:
    path = folder / "vectors.txt"
    path.write_bytes(content)
    return path


def read(folder: Path, content: bytes) -> WordVectors:
    return read_vectors(write(folder, content), cache=False)


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(vectors, "_convert", refuse)


@pytest.mark.parametrize("content", [
    PLAIN, PLAIN.removesuffix(b"\n"), PLAIN.replace(b"\n", b"\r\n"), PLAIN.replace(b" ", b"\t"),
    PLAIN.replace(b"the ", b"the\t"), PLAIN.replace(b"\n", b" \n"), PLAIN.replace(b" ", b"  "), b"2 3\n" + PLAIN,
    b"2\t3\r\n" + PLAIN.replace(b"\n", b" \r\n"), b"\xef\xbb\xbf" + PLAIN, b"\xef\xbb\xbf2 3\n" + PLAIN,
    b" " + PLAIN,
], ids=["plain", "no last LF", "CRLF", "tabs", "tab after the word", "fastText", "two blanks", "header",
        "header, CRLF", "BOM", "BOM and header", "leading blank"])
def test_every_layout_reads_alike(tmp_path: Path, content: bytes) -> None:
    result = read(tmp_path, content)
    assert result.words == ["the", "of"]
    assert result.table.dtype == np.float32
    np.testing.assert_array_equal(result.table, np.array([[0.1, -0.2, 3e-05], [0.5, 1, 2]], np.float32))
    assert (result.repeated, result.undecodable) == (0, 0)


@pytest.mark.parametrize("end", [b"\n", b" \n", b"\r\n"])
@pytest.mark.parametrize("blank", [b" ", b"\t"])
def test_usual_lines_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank: bytes,
                                       end: bytes) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("parsed by hand")

    monkeypatch.setattr(vectors, "_parse_line", refuse)
    content = b"the 0.1 -0.2\nof 3e-05 1\n".replace(b" ", blank).replace(b"\n", end)
    assert read(tmp_path, content).words == ["the", "of"]
    with pytest.raises(AssertionError, match="by hand"):
        read(tmp_path, content + b"a b 1 2\n")


def test_words_with_blanks_numbers_and_line_separators(tmp_path: Path) -> None:
    words = [". . .", "at name@domain.com", "2", "3.5", "nan", "\x85", "a\u2028b", "\ufeff", '"', "a\xa0b", "#", "\x00"]
    for order in (words, words[::-1]):
        content = "".join(f"{word} 1 2.5\n" for word in order).encode()
        result = read_vectors(write(tmp_path, content))
        assert result.words == order and read_vectors(tmp_path / "vectors.txt").words == order
        assert result.table.tolist() == [[1, 2.5]] * len(words)


def test_what_is_left_out_is_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, b"a 1 2\nb\xff 3 4\na 5 6\nc 7 8\n\xfe 1 1\n\xfe 1 1\n")
    for _ in range(2):  # parsed, then from the cache
        caplog.clear()
        result = read_vectors(path)
        assert result.words == ["a", "c"] and result.table.tolist() == [[1, 2], [7, 8]]
        assert (result.repeated, result.undecodable) == (1, 3)
        assert len(caplog.records) == 1 and str(path) in caplog.text
        assert "1 with a word that stood above" in caplog.text and "3 with a word that is not UTF-8" in caplog.text


@pytest.mark.parametrize(("content", "line", "reason"), [
    (b"", 1, "empty"), (b"\n", 1, "no word"), (b"word\n", 1, "no word"), (b"some prose\nand more\n", 1, "no word"),
    (b"a 1 2\nb 1 2\nc 1\n", 3, "1 numbers"), (b"a 1 2\nb 1 2\nc 1 2 3\n", 3, "3 numbers"),
    (b"a 1 2\n\nb 1 2\n", 2, "0 numbers"), (b"a 1 2\nb 1 x\nc 1 2\n", 2, "'x'"), (b"a 1 2\nb 1 nan\n", 2, "'nan'"),
    (b"a 1 2\nb -inf 1\n", 2, "'-inf'"), (b"a 1 2\nb 1 1e39\n", 2, "beyond"), (b"a 1 2\nb 1 1e999\n", 2, "beyond"),
    (b"a 1 2\nb 1 0x1\n", 2, "'0x1'"), (b"a 1 2\nb 1 1_0\n", 2, "'1_0'"), (b"a 1 2\nb 1 \xff\n", 2, r"xff"),
    (b"2 3\na 1 2 3\nb 1 2\n", 3, "2 numbers"), (b"2 2\na 1 2\n", 1, "announces 2"),
    (b"1 2\na 1 2\nb 1 2\n", 1, "2 follow"), (b"a 1 2\nb 1 2\rc 1 2\n", 2, "4 numbers"),
    (b"a 1 2\nb 1 2c 1 2\n", 2, "3 numbers"), (b"a 1 2\rb 1 2\rc 1 2\r", 1, "6 numbers"),
    (b"2 99999999999\na 1 2\n", 2, "2 numbers"), (b"2 0\na 1 2\n", 1, "no word"), (b"1 2\n", 1, "0 follow"),
    (b"a 1 2\r\nb 1\r\n", 2, "1 numbers"), (b"a 1 2\n 1 2\nb 1 2\n", 2, "1 numbers"),
    (b"a 1 2\n" * 200_000 + b"z 1\n", 200_001, "1 numbers"),
])
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_vectors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and reason in message and message.endswith(".")
    assert "\n" not in message and os.listdir(tmp_path) == ["vectors.txt"]


@pytest.mark.parametrize(("content", "reason"), [(b"PK\x03\x04...", "unpack"), (b"\xff 1 2\n", "UTF-8")])
def test_a_file_without_vectors(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read(tmp_path, content)
    with pytest.raises(InputError, match="no such file"):
        read_vectors(tmp_path / "none.txt")


def number(field: bytes) -> float:
    if b"_" in field:  # Python's own liberty
        raise ValueError
    return float(field)


def is_finite_number(field: bytes) -> bool:
    try:
        return bool(np.isfinite(number(field)))
    except ValueError:
        return False


def parse_naively(content: bytes, dimension: int) -> dict[str, list[float]] | int:
    """The vectors, or the number of the first line that is none. For files without a header."""
    result: dict[str, list[float]] = {}
    for place, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        fields = line.split()
        try:
            values = [number(field) for field in fields[-dimension:]]
        except ValueError:
            return place
        with np.errstate(over="ignore"):
            sound = np.isfinite(np.array(values).astype(np.float32)).all()
        if len(fields) <= dimension or not sound or any(map(is_finite_number, fields[1:-dimension])):
            return place
        with contextlib.suppress(UnicodeDecodeError):
            result.setdefault(b" ".join(fields[:-dimension]).decode(), values)
    return result


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, int]:
    """A file with at least one usable vector in the first line, and its dimension."""
    dimension = draw(st.integers(1, 4))
    word = (st.text(st.characters(exclude_characters="\n\r\t\v\f ", exclude_categories=["Cs"]), min_size=1, max_size=4)
            .map(str.encode) | st.sampled_from([b"a b", b". . .", b"\xff", b"\xef\xbb\xbf", b"5", b"nan", b"a\tb"]))
    value = st.floats(width=32, allow_nan=False, allow_infinity=False)
    number = (value.map(lambda x: f"{x:.5g}") | value.map(repr)).map(str.encode)
    odd = st.sampled_from(b"x nan inf 1e 1e99 +1 . 1_0 - 1. .5 1e-60 1,5".split(b" ") + [b""])
    end = draw(st.sampled_from([b"\n", b"\r\n", b" \n"]))
    blank = draw(st.sampled_from([b" ", b"\t"]))
    lines = [b"word" + b" 1.5" * dimension + b"\n"] * draw(st.integers(5, 6))
    for _ in range(draw(st.integers(0, 4))):
        numbers = draw(st.lists(number, min_size=dimension, max_size=dimension))
        if draw(st.integers(0, 5)) == 0:
            numbers[draw(st.integers(0, dimension - 1))] = draw(odd)
        if draw(st.integers(0, 7)) == 0:
            numbers = numbers[1:] if draw(st.booleans()) else [*numbers, b"1"]
        lines.append(blank.join([draw(word), *numbers]) + (end if draw(st.integers(0, 3)) else b"\n"))
    content = b"".join(lines)
    return content.removesuffix(b"\n") if draw(st.booleans()) else content, dimension


@given(files())
@settings(max_examples=400, deadline=None)
def test_agrees_with_a_naive_parser(tmp_path_factory: pytest.TempPathFactory, case: tuple[bytes, int]) -> None:
    content, dimension = case
    path = write(tmp_path_factory.getbasetemp(), content)
    expected = parse_naively(content, dimension)
    try:
        result = read_vectors(path, cache=False)
    except InputError as error:
        assert str(error).startswith(f"{path}:{expected}: ")
        return
    assert isinstance(expected, dict), f"line {expected} is no vector"
    assert result.words == list(expected)
    np.testing.assert_array_equal(result.table, np.array(list(expected.values())).astype(np.float32))


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b"3 2", b"a 1 2", b"b .5 -1e3", vectors.BOM]), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path_factory: pytest.TempPathFactory,
                                                     lines: list[bytes]) -> None:
    path = write(tmp_path_factory.getbasetemp(), b"\n".join(lines))
    try:
        result = read_vectors(path, cache=False)
    except InputError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(result.words) == len(set(result.words)) == len(result.table) and np.isfinite(result.table).all()


def test_values_are_rounded_as_numpy_rounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [[f"{x:.{digits}g}" for x in rng.normal(0, 10.0 ** rng.integers(-40, 30), 50)]
             for digits in (3, 5, 7, 9, 17) for _ in range(200)]
    content = "".join(f"w{n} {' '.join(row)}\n" for n, row in enumerate(texts)).encode()
    table = read(tmp_path, content).table
    expected = np.array(texts, dtype=np.float64).astype(np.float32)
    wrong = table != expected
    assert wrong.mean() < 1e-4  # text halfway between two floats: numpy rounds twice
    np.testing.assert_array_max_ulp(table, expected, 1)


def test_blocks_are_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b"w%d %d %d.5\n" % (n, n, n) if n % 7 else b". w%d %d %d.5\n" % (n, n, n) for n in range(1, 999))
    monkeypatch.setattr(vectors, "BLOCK", 100)
    result = read(tmp_path, content)
    assert [word.split("w")[1] for word in result.words] == [str(n) for n in range(1, 999)]
    assert result.table.tolist() == [[n, n + 0.5] for n in range(1, 999)]
    with pytest.raises(InputError, match=":999: "):
        read(tmp_path, content + b"z 1\n")


# ----------------------------------------------------------------------------------------------------------- cache


def test_the_second_read_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, PLAIN)
    first = read_vectors(path)
    assert sorted(os.listdir(tmp_path)) == ["vectors.txt", "vectors.txt.cache"]
    forbid_parsing(monkeypatch)
    second = read_vectors(path)
    assert second.words == first.words and second.table.tolist() == first.table.tolist()
    second.table[0] = 9  # stays in the process
    assert read_vectors(path).table.tolist() == first.table.tolist()
    with pytest.raises(AssertionError, match="parsed again"):
        read_vectors(path, cache=False)


def test_without_cache_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    result = read(tmp_path, PLAIN)
    assert sorted(os.listdir(tmp_path)) == ["temporary", "vectors.txt"] and not os.listdir(tmp_path / "temporary")
    assert result.table.sum() == pytest.approx(3.4, abs=1e-3)


@pytest.mark.parametrize("change", ["size", "time", "format"])
def test_a_stale_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = write(tmp_path, b"a 1 2\n")
    read_vectors(path)
    before = os.stat(path)
    path.write_bytes(b"b 1 2\nc 1 2\n" if change == "size" else b"b 1 2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    if change == "format":
        monkeypatch.setattr(vectors, "CACHE_FORMAT", "another")
    assert read_vectors(path).words[0] == "b"
    forbid_parsing(monkeypatch)
    assert read_vectors(path).words[0] == "b"


def test_a_damaged_or_foreign_cache_is_made_again(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    expected = read_vectors(path)
    cache = tmp_path / "vectors.txt.cache"
    whole = cache.read_bytes()
    contents = [whole[:cut] for cut in range(0, len(whole), 7)] + [b"a foreign file\n" * 9, whole + b"x"]
    for content in contents:
        cache.unlink()  # the one that is mapped must not shrink
        cache.write_bytes(content)
        result = read_vectors(path)
        assert result.words == expected.words and result.table.tolist() == expected.table.tolist()
        assert cache.read_bytes() == whole
    with ArrayWriter(cache, {"words": ("u1", ()), "table": ("f4", ())}) as writer:
        status = os.stat(path)
        writer.metadata |= {"format": vectors.CACHE_FORMAT, "source_size": str(status.st_size),
                            "source_time": str(status.st_mtime_ns), "repeated": "0", "undecodable": "0"}
        writer.append("words", np.frombuffer(b"the\nof\n", np.uint8))
        writer.append("table", np.ones(2, "f4"))
    assert read_vectors(path).table.tolist() == expected.table.tolist()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = write(tmp_path / "source", PLAIN)
    create = tempfile.TemporaryFile

    def refuse(*, dir: Path) -> object:  # root may write everywhere, so that a mode would not do
        if dir == path.parent:
            raise PermissionError(13, "Permission denied")
        return create(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with caplog.at_level(logging.WARNING):
        assert read_vectors(path).words == ["the", "of"]
    assert "cannot be written (Permission denied)" in caplog.text and len(caplog.records) == 1
    assert os.listdir(path.parent) == ["vectors.txt"] and os.listdir(tmp_path / "temporary") == []


def test_a_full_disk_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    append = ArrayWriter.append

    def fill(writer: ArrayWriter, name: str, array: np.ndarray) -> None:
        if writer.path.parent == tmp_path:
            raise OSError(28, "No space left on device")
        append(writer, name, array)

    monkeypatch.setattr(ArrayWriter, "append", fill)
    assert read_vectors(write(tmp_path, PLAIN)).words == ["the", "of"]
    assert "No space left" in caplog.text and os.listdir(tmp_path) == ["vectors.txt"]


def test_two_processes_build_the_cache_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"w{n} " + " ".join(str(n + k / 8) for k in range(50)) for n in range(4000)]
    path = write(tmp_path, "\n".join(rows).encode())
    code = "import sys; from text.vectors import read_vectors; print(read_vectors(sys.argv[1]).table.sum(dtype=float))"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
            for _ in range(3)]
    sums = {run.communicate()[0] for run in runs}
    assert len(sums) == 1 and not any(run.returncode for run in runs)
    forbid_parsing(monkeypatch)
    result = read_vectors(path)
    assert len(result.words) == 4000 and float(sums.pop()) == result.table.sum(dtype=float)
    assert sorted(os.listdir(tmp_path)) == ["vectors.txt", "vectors.txt.cache"]


def test_importing_loads_neither_torch_nor_arrow() -> None:
    code = "import sys, text.vectors, text.arrays; assert not {'torch', 'transformers', 'pyarrow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
