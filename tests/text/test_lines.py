"""Lines of text files."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from helpers import naive
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from text import lines as text
from text.checks import file_fault
from text.lines import TsvReader


def read(path: Path, **options: bool) -> list[tuple[int, str, str]]:
    return [(line.line, line.sentence, line.label) for line in TsvReader(path, **options)]


blanks = ["", "", " ", "\r", "\u2028", "\x85", "\x0b", "\u00a0", "\x1c"]
words = st.sampled_from(["play", "é", "東", "\u2028", "a\rb", "a\x85b", "İ", "😀", "x\u200by", "\ufeff"])
field = st.lists(words, max_size=3).map(" ".join)
line = st.tuples(field, st.sampled_from(["\t", "\t", "\t", " \t ", "", "\t\t", "\0\t"]), field,
                 st.sampled_from(blanks)).map(lambda parts: "".join(parts).encode())
damaged = st.tuples(line, st.sampled_from([b"", b"", b"", b"\xff", b"\xc3", b"\xed\xa0\x80"])).map(b"".join)
files = st.tuples(st.sampled_from([b"", b"\xef\xbb\xbf"]), st.lists(damaged, max_size=6),
                  st.sampled_from([b"\n", b"\r\n"]), st.booleans()).map(
    lambda parts: parts[0] + parts[2].join(parts[1]) + (parts[2] if parts[3] else b""))


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "file.txt"


@settings(max_examples=100)
@given(content=st.one_of(files, st.binary(max_size=30)), size=st.integers(1, 20))
def test_blocks_hold_the_same_lines(path: Path, content: bytes, size: int) -> None:
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", size)
        lines = TsvReader(path, skip_bad_lines=True)
        blocks = list(lines.blocks())
    found = [example for first, raw in blocks for example in lines.parse(io.BytesIO(raw), first)]
    assert [tuple(example) for example in found] == [item for item in naive(content) if not isinstance(item, int)]
    assert b"".join(raw for _, raw in blocks) == content and all(raw.endswith(b"\n") for _, raw in blocks[:-1])


@settings(max_examples=400)
@given(content=st.one_of(files, st.binary(max_size=30)), labelled=st.booleans())
@example(content=b"a\tb", labelled=True)
@example(content=b"\xef\xbb\xbfa\tb\r\n\r\n", labelled=True)
def test_lines_against_a_naive_reader(path: Path, content: bytes, labelled: bool) -> None:
    path.write_bytes(content)
    expected = naive(content, labelled)
    bad = [item for item in expected if isinstance(item, int)]
    good = [item for item in expected if not isinstance(item, int)]
    if good:
        lines = TsvReader(path, skip_bad_lines=True, labelled=labelled)
        assert [(line.line, line.sentence, line.label) for line in lines] == good
        assert lines.skipped == len(bad)
    if bad or not good:
        with pytest.raises(InputError) as error:
            read(path, labelled=labelled)
        fault = file_fault(path)  # of all lines, where there is one
        assert str(error.value).startswith(f"{path}:{bad[0]}: " if bad and not fault else f"{path}: {fault or ''}")
    else:
        assert read(path, labelled=labelled) == good


@pytest.mark.parametrize(("content", "place", "says"), [
    (b"", "", "the file is empty"),
    (b"a\tb\nno tab\n", ":2", "no TAB"),
    (b"a\tb\n\nc\td\n", ":2", "the line is empty"),
    (b"a\tb\tc\n", ":1", "more than one TAB"),
    (b"a\tb\n \tc\n", ":2", "the sentence is empty"),
    (b"a\t \n", ":1", "the label is empty"),
    (b"a\tb\nx\0\tb\n", ":2", "NUL"),
    (b"a\tb\nab\xff\tb\n", ":2", "broken UTF-8 at byte 3"),
])
def test_bad_lines_are_named(path: Path, content: bytes, place: str, says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{place}: ") and says in str(error.value)


def test_nothing_usable_is_an_error_with_skip_bad_lines_too(path: Path) -> None:
    path.write_bytes(b"no tab\nneither\n")
    with pytest.raises(InputError, match="no usable line"):
        read(path, skip_bad_lines=True)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo")))
    assert [line.sentence for line in TsvReader("-", labelled=False)] == ["one", "two"]


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_files_that_cannot_be_read(name: str) -> None:
    with pytest.raises(InputError, match=name):
        list(TsvReader(name))
