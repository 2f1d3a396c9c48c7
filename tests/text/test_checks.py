"""Files of another kind or encoding, and what is legal but surely not meant."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from text.checks import (
    file_fault,
    foreign_format,
    header_line,
    label_warnings,
    low_coverage,
    not_english,
    quoted_sentences,
    skipped,
    swapped_columns,
    unknown_labels,
    unspaced_text,
)
from text.lines import TsvReader
from text.report import SplitReport
from text.vectors import read_vectors

KOREAN = "내일 서울 날씨 어때\t날씨\n음악 좀 틀어 줘\t음악\n가게에 가자\t길 찾기\n" * 9
JAPANESE = "あしたの天気はどうですか\t天気\n音楽をかけてください\t音楽\n" * 9
CHINESE = "明天北京的天气怎么样\t天气\n请播放一首好听的歌曲\t音乐\n" * 9
FRENCH = "l'été à la plage\tété\nça va, mon élève ?\tété\noù est le château\tlieu\n" * 9

# ------------------------------------------------------------------------------------------------ files as a whole


@pytest.mark.parametrize(("text", "encoding", "named"), [
    (KOREAN, "cp949", "CP949"), (KOREAN, "euc-kr", "CP949"), (KOREAN, "utf-16", "UTF-16"),
    (KOREAN, "utf-16-le", "UTF-16LE"), (KOREAN, "utf-16-be", "UTF-16BE"), (FRENCH, "latin-1", "ISO-8859-1"),
    (FRENCH + "d’où\tlieu\n" * 3, "cp1252", "CP1252"), (FRENCH, "utf-16", "UTF-16"),
    ("play some jazz\tmusic\n" * 9, "utf-16-le", "UTF-16LE"), (JAPANESE, "shift_jis", "SHIFT_JIS"),
    (CHINESE, "gb18030", "GB18030")])
def test_another_encoding_is_named(tmp_path: Path, text: str, encoding: str, named: str) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode(encoding))
    for skip in (False, True):
        with pytest.raises(InputError) as error:
            examples = list(TsvReader(path, skip))
            assert skip and examples and encoding not in ("utf-16", "cp949")  # its plain ASCII lines
            raise InputError(f"{path}: {file_fault(path)}")
        assert str(error.value).startswith(f"{path}: the file looks like {named}, ")
        assert f"iconv -f {named} -t UTF-8 {path} > NEW" in str(error.value)
    assert path.read_bytes().decode(named) == text


def test_line_ends_of_cr_alone(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"play jazz\tmusic\rwill it rain\tweather\r")
    with pytest.raises(InputError, match=r"train.txt: its lines end in CR alone; .* tr '\\r' '\\n' < "):
        list(TsvReader(path))


@pytest.mark.parametrize("content", [
    b"fine\tx\n\xff\xfe\tx\n", KOREAN.encode() + b"\xff\tx\n" * 3, b"a\0b\tx\n", b"\xe9\tx\n" * 2, b"a\rb\tc\n"])
def test_a_broken_line_is_no_other_encoding(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    assert file_fault(path) is None


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_utf8_is_never_taken_for_something_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "utf8.txt"
    path.write_bytes(f"first\tline\n{text}".encode())
    assert file_fault(path) is None


def archive(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr(name, b"content")
    return made.getvalue()


def saved(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


@pytest.mark.parametrize(("content", "what", "remedy"), [
    (b"2 3\na " + np.ones(3, "f4").tobytes() + b"b " + np.ones(3, "f4").tobytes(), "word2vec's binary format", "text"),
    (gzip.compress(b"a 1 2\n", mtime=0), "a gzip file", "unpack it first"),
    (archive("a.txt"), "a zip archive", "unpack"),
    (archive("archive/data.pkl"), "a PyTorch file", "as text"), (archive("a.npy"), "numpy arrays", "as text"),
    (saved(np.ones((2, 3))), "a numpy array", "as text"), (pickle.dumps({"a": [1]}, 2), "a Python pickle", "as text"),
    (b"\xba\x16\x4f\x2f\x0c\0\0\0", "a fastText model", "take the .vec file"),
    (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file", "as text")])
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, what: str, remedy: str) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_vectors(path)
    assert str(error.value).startswith(f"{path}: the file is {what}") and remedy in str(error.value)
    with pytest.raises(InputError) as error:
        list(TsvReader(path))
    assert what in str(error.value) and ("unpack" in remedy) == ("unpack" in str(error.value))


@pytest.mark.parametrize("head", [b"", b"the 0.1 0.2\n", b"2 3\na 1 2 3\n", b"BZ 1 2\n", "東京 1 2\n".encode()])
def test_text_is_no_other_format(head: bytes) -> None:
    assert foreign_format(head) is None


# ------------------------------------------------------------------------------------------------ sentences and labels


def report(first: tuple[str, str] = ("", ""), labels: dict[int, int] | None = None, **more: object) -> SplitReport:
    return SplitReport("train.txt", Counter({3: 100}), Counter(labels or {}), first_line=first, **more)


@pytest.mark.parametrize(("first", "count", "warned"), [
    (("sentence", "label"), 1, True), (("Text", "Intent"), 1, True), (('"utterance"', '"category"'), 1, True),
    (("comments", "labels"), 1, True), (("문장", "라벨"), 1, True), (("query", "label"), 3, True),
    (("what is this", "label"), 1, True), (("what is this", "label"), 9, False), (("sentence", "music"), 1, False),
    (("play jazz", "music"), 1, False), (("", ""), 1, False)])
def test_a_header_line(first: tuple[str, str], count: int, warned: bool) -> None:
    said = header_line(report(first, {0: count, 1: 50}), (first[1], "music"))
    assert (said is not None) == warned
    if said:
        assert first[0] in said and "remove the line" in said
        assert header_line(report(first, {0: 50, 1: 50}), ("music", "weather"))  # of test.txt, when train.txt has none


def test_swapped_columns() -> None:
    sentences = [f"label {number % 7}" for number in range(1000)]
    assert "swapped" in str(swapped_columns(990, 1000, sentences))
    assert swapped_columns(7, 1000, sentences) is None
    taken = []
    assert swapped_columns(900, 1000, (taken.append(number) or number for number in range(1000))) is None
    assert len(taken) == 451  # no more are read, or kept, than it takes


def test_quotes() -> None:
    assert "double quotes" in str(quoted_sentences(report(quoted=3))) and quoted_sentences(report(quoted=2)) is None
    quotes, alike = label_warnings(('"music"', "music", "weather"))
    assert '"music"' in quotes and "double quotes" in quotes and "look alike" in alike


@pytest.mark.parametrize("pair", [("Music", "music"), ("book  a table", "book a table"), ("'x'", "x"), ("ẞ", "ss")])
def test_labels_that_look_alike(pair: tuple[str, str]) -> None:
    (said,) = label_warnings((pair[0], "other", pair[1]))
    assert f"{pair[0]!r} and {pair[1]!r}" in said and "[train.txt]" in said
    assert label_warnings(("music", "weather", "book_table", "book table")) == []


def test_unknown_labels_are_counted_and_named() -> None:
    names = ["oos", "Music", *"abcdefgh"]
    said = unknown_labels(report(unknown_labels=1234, unknown_names=names), ("music", "weather"))
    assert said and said.startswith("1234 sentences have a label that train.txt lacks ('oos', 'Music', 'a', 'b', 'c', ")
    assert "'Music' looks like 'music'" in said and "as errors" in said
    assert unknown_labels(report(), ("music",)) is None


def test_many_skipped_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(KOREAN.encode("cp949"))
    assert "50 of 150 lines were skipped, 33%; the file looks like CP949" in str(skipped(path, report(skipped=50)))
    path.write_text("fine\tx\n" * 9)
    assert "--skip_bad_lines" in str(skipped(path, report(skipped=12))) and skipped(path, report(skipped=11)) is None


@pytest.mark.parametrize(("sentence", "warned"), [
    ("明天北京的天气怎么样", True), ("あしたの天気はどうですか", True), ("오늘날씨가어떤지알려줘", True),
    ("พรุ่งนี้อากาศเป็นอย่างไร", True), ("오늘 날씨가 어떤지 알려 줘", False), ("明天 北京 的 天气 怎么样", False),
    ("Donaudampfschifffahrtsgesellschaftskapitän", False), ("play some jazz", False), ("음악", False)])
def test_text_without_blanks(sentence: str, warned: bool) -> None:
    said = unspaced_text(Counter(sentence.split()), 1)
    assert (said is not None) == warned
    assert unspaced_text(Counter(), 1) is None or not said  # a transformer's words are not counted


def test_vectors_that_fit_nothing() -> None:
    said = low_coverage(0.003, "numberbatch.txt", ["/c/en/the", "/c/en/of", "/c/en/and", "/c/en/to"])
    assert said and "0.3%" in said and "numberbatch.txt" in said and "'/c/en/the'" in said and "/c/en/to" not in said
    assert low_coverage(0.06, "glove.txt", ["the"]) is None


def test_an_english_analyzer_on_another_script() -> None:
    assert "--analyzer=kiwi" in str(not_english(["내일 서울 날씨", "play"], "hanta"))
    assert not_english(["l'été à Straße", "play", "1 2 3 !", "東京"], "hanta") is None
