"""label.txt, and labels as targets."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from text.labels import (
    NAMED,
    NO_LABEL,
    UNKNOWN_LABEL,
    LabelParser,
    column_order,
    find_logits_info,
    looks_like_logits,
    read_labels,
    write_labels,
    write_logits_info,
)


def test_labels_round_trip(tmp_path: Path) -> None:
    labels = Labels(("b", "a c", "é", "x\u2028y"))
    write_labels(labels, tmp_path / "label.txt")
    assert read_labels(tmp_path / "label.txt") == labels
    assert labels.index() == {"b": 0, "a c": 1, "é": 2, "x\u2028y": 3} and len(labels) == 4


def test_labels_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "label.txt").write_bytes(b"\xef\xbb\xbfyes\r\nno")
    assert read_labels(tmp_path / "label.txt").names == ("yes", "no")


@pytest.mark.parametrize("content", [b"", b"a\n\nb\n", b"a\na\n", b"\xff\n", b"a\n\n"])
def test_damaged_labels(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "label.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"label\.txt: .*preprocess"):
        read_labels(tmp_path / "label.txt")


@pytest.mark.parametrize(("label", "expected"), [
    ("1 2", True), ("-1.5e3\t.5", True), ("nan inf", True), ("1", False), ("", False), ("1 b", False), ("a b", False)])
def test_looks_like_logits(label: str, expected: bool) -> None:
    assert looks_like_logits(label) is expected


def test_label_parser_class_ids() -> None:
    parser = LabelParser(Labels(("a", "b c")))
    assert [parser("b c"), parser("a")] == [1, 0] and parser.logits is False
    for wrong in ("d", "1 2"):
        with pytest.raises(ValueError, match="unknown label"):
            parser(wrong)


@pytest.mark.parametrize(("label", "says"), [
    ("1 2", "2 logits where label.txt names 3"), ("1 2 3 4", "4 logits"), ("1 nan 2", "not finite"),
    ("1 inf 2", "not finite"), ("1 -3.5e38 2", "not finite"), ("a", "not a row of logits"), ("1 2 x", "not a row")])
def test_label_parser_logits(label: str, says: str) -> None:
    parser = LabelParser(Labels(("a", "b", "c")))
    assert parser("1 -2.5 3e2") == [1.0, -2.5, 300.0] and parser.logits is True
    with pytest.raises(ValueError, match=says):
        parser(label)


def test_unknown_labels_where_they_are_allowed() -> None:
    parser = LabelParser(Labels(("a", "b")), unknown_allowed=True)
    assert [parser(label) for label in ("oos", "a", "1 2", "oos")] == [UNKNOWN_LABEL, 0, UNKNOWN_LABEL, UNKNOWN_LABEL]
    assert parser.logits is False and parser.unknown == ["oos", "1 2"]
    for number in range(50):
        parser(f"label {number}")
    assert len(parser.unknown) == NAMED  # memory does not grow with them
    logits = LabelParser(Labels(("a", "b")), unknown_allowed=True)
    assert logits("1 2") == [1.0, 2.0]
    with pytest.raises(ValueError, match="not a row of logits"):
        logits("oos")


def test_the_unicode_form_of_a_label_does_not_matter(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "café")
    (tmp_path / "label.txt").write_text(f"{nfd}\nmu\u200bsic\n", encoding="utf-8")
    labels = read_labels(tmp_path / "label.txt")
    assert labels.names == ("café", "music")
    assert LabelParser(labels, nfd)("café") == 0 and LabelParser(Labels(("x", "y")), nfd)("café") == NO_LABEL
    (tmp_path / "train.txt").write_text("a\t1 2\n", encoding="utf-8")
    write_logits_info(tmp_path / "train.txt", ["music", nfd])
    assert column_order(tmp_path / "train.txt", labels, asserted=None) == [1, 0]
    (tmp_path / "order.txt").write_text(f"music\n{nfd}\n", encoding="utf-8")
    assert column_order(tmp_path / "train.txt", labels, str(tmp_path / "order.txt")) == [1, 0]
    write_logits_info(tmp_path / "train.txt", ["café", nfd])
    with pytest.raises(InputError, match="not a whole record"):
        find_logits_info(tmp_path / "train.txt")


def test_a_bad_first_label_does_not_decide_the_kind() -> None:
    parser = LabelParser(Labels(("a", "b")))
    for wrong in ("1 2 3", "c"):
        with pytest.raises(ValueError, match="."):
            parser(wrong)
    assert parser("a") == 0
