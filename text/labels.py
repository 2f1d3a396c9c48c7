"""Labels as files have them: class names in label.txt and in text, or a teacher's logits in their place.

A row of numbers does not say which class its columns mean. So beside a file with logits stands
`logits-CHECKSUM.json`, named after the file's content: it is found for a copy under another name in the same folder,
and not for a file that was edited.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels, normalize_label, split_labels
from sentence_classifier.lines import open_input
from util import atomic_write, sha256, write_json

logger = logging.getLogger(__name__)


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """Read label.txt: one name a line, the line's place is the id."""
    with open_input(path) as file:
        try:
            lines = file.read().decode("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: broken UTF-8; run preprocess.py again.") from None
    names = [normalize_label(line) for line in lines]
    if len(set(names)) != len(names) or not all(names):
        raise InputError(f"{path}: an empty or repeated label; run preprocess.py again.")
    return Labels(tuple(names))


def write_labels(labels: Labels, path: str | os.PathLike[str]) -> None:
    """Write label.txt."""
    with atomic_write(path) as file:
        file.writelines(f"{name}\n" for name in labels.names)


NO_LABEL = -1  # the target of text without a label
UNKNOWN_LABEL = -2  # the target of a label that train.txt lacks: whatever a model answers is an error
NO_LABELS = 255  # at the end of the label set of text without labels
NAMED = 10  # at most so many of a file's unknown labels are named


def looks_like_logits(label: str) -> bool:
    """Whether a label is two or more numbers separated by blanks, as a teacher's logits are."""
    try:
        return len([float(part) for part in label.split()]) > 1
    except ValueError:
        return False


class LabelParser:
    """Turns a file's labels into targets: class ids, or a teacher's logits. The first usable label decides.

    Args:
        labels: the label map.
        dummy: what stands in the place of a label in text that has none, unless the label map has it; such text gets
            the target NO_LABEL. None: text without labels is an error.
        unknown_allowed: whether a label that the label map lacks gets the target UNKNOWN_LABEL, as in valid.txt and
            test.txt; else it is an error.
        columns: asked once, at the first logits, for the column of each label; None: they are in the labels' order.
        separator: what stands between several labels of a sentence; None: a sentence has one.

    Attributes:
        logits: True where the file holds logits, None before the first label.
        unknown: the first NAMED unknown labels.
    """

    def __init__(self, labels: Labels, dummy: str | None = None, unknown_allowed: bool = False,
                 columns: Callable[[], list[int] | None] | None = None, separator: str | None = None) -> None:
        self.separator = separator
        self.ids = labels.index()
        dummy = dummy and normalize_label(dummy)
        self.dummy = None if dummy in self.ids else dummy
        self.unknown_allowed = unknown_allowed
        self.unknown: list[str] = []
        self.columns = columns
        self.order: list[int] | None = None
        self.logits: bool | None = None
        self.labelled: bool | None = None

    def __call__(self, label: str) -> int | list[float] | np.ndarray:
        """The target of one label: a class id, a teacher's logits [C] or, with a separator, a label set.

        A label set [C + 1] uint8 is 1 for each label, and ends with the number of labels that the label map lacks;
        text without labels has NO_LABELS there.

        Raises:
            ValueError: an unknown label, logits of the wrong count or not finite, or a mixture of the kinds.
            InputError: from `columns`.
        """
        labelled = label != self.dummy
        if self.labelled not in (None, labelled):
            raise ValueError(f"the label {shorten(label)}, and the file's first line has "
                             + ("none." if labelled else "one: this says that there is none."))
        logits = self.logits
        if logits is None:
            logits = labelled and label not in self.ids and looks_like_logits(label)
        target: int | list[float] | np.ndarray
        if logits:
            target = self._logits(label)
        elif self.separator is not None:
            target = self._label_set(split_labels(label, self.separator) if labelled else None)
        else:
            target = self._class_id(label) if labelled else NO_LABEL
        self.labelled, self.logits = labelled, logits
        return target

    def _class_id(self, label: str) -> int:
        if label in self.ids:
            return self.ids[label]
        if not self.unknown_allowed:
            raise ValueError(f"unknown label {shorten(label)}; train.txt has {shorten(', '.join(self.ids))}.")
        if label not in self.unknown and len(self.unknown) < NAMED:
            self.unknown.append(label)
        return UNKNOWN_LABEL

    def _label_set(self, names: list[str] | None) -> np.ndarray:
        found = np.zeros(len(self.ids) + 1, dtype=np.uint8)
        if names is None:
            found[-1] = NO_LABELS
            return found
        for name in names:
            place = self._class_id(name)
            if place == UNKNOWN_LABEL:
                found[-1] = min(found[-1] + 1, NO_LABELS - 1)
            else:
                found[place] = 1
        return found

    def _logits(self, label: str) -> list[float]:
        try:
            numbers = [float(part) for part in label.split()]
        except ValueError:
            raise ValueError(
                f"the label {shorten(label)} is not a row of logits, as the file's first one is.") from None
        if self.columns:
            self.order, self.columns = self.columns(), None
        if len(numbers) != len(self.ids):
            raise ValueError(f"{len(numbers)} logits where label.txt names {len(self.ids)} labels.")
        # Beyond single precision's range a finite number would be stored as infinity.
        if not all(math.isfinite(number) and abs(number) < 3e38 for number in numbers):
            raise ValueError("a logit that is not finite.")
        return numbers if self.order is None else [numbers[column] for column in self.order]


def shorten(text: str, limit: int = 60) -> str:
    """A label for a message: in quotes, and cut off where it is long."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


INFO_FORMAT, INFO_NAME = "logits-1", "logits-{:.16}.json"  # of the checksum


def write_logits_info(path: str | os.PathLike[str], labels: list[str], **more: Any) -> None:
    """Write beside the file with logits at `path` what its columns are.

    Args:
        labels: the names of the columns, in their order.
        more: where the logits come from (teacher, source); plain data.
    """
    checksum = sha256(path)
    write_json({"format": INFO_FORMAT, "sha256": checksum, "file": Path(path).name, "labels": labels, **more,
                "date": time.strftime("%Y-%m-%d %H:%M:%S")}, Path(path).with_name(INFO_NAME.format(checksum)))


def find_logits_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What is recorded of the file with logits at `path`, None where nothing is. The labels are in Unicode's form NFC.

    Raises:
        InputError: there is one, and it is damaged.
    """
    checksum = sha256(path)
    place = Path(path).with_name(INFO_NAME.format(checksum))
    if not place.exists():
        return None
    with open_input(place) as file:
        try:
            match info := json.load(file):
                case {"format": format, "sha256": found, "labels": [*names]} if (
                    format == INFO_FORMAT and found == checksum and all(isinstance(name, str) for name in names)
                    and len(set(names := [normalize_label(name) for name in names])) == len(names)
                ):
                    return {**info, "labels": names}
        except (ValueError, RecursionError):
            pass
    raise InputError(f"{place}: not a whole record of the logits in {path}; write both again with evaluate.py "
                     "--augmented, or remove the record and name the file of label names, in the logits' order, with "
                     "--logits_order.")


def column_order(path: str | os.PathLike[str], labels: Labels, asserted: str | None = None,
                 required: bool = False) -> list[int] | None:
    """In which order the columns of a file with logits have to be taken to be those of `labels`.

    Args:
        path: the file with logits.
        labels: label.txt.
        asserted: a file with the columns' names, for a file with logits that has no record (--logits_order).
        required: whether one of both must be there.

    Returns:
        For each label its column; None where neither is there: the file's columns are taken to be the labels.

    Raises:
        InputError: the order is not known, or the logits are of other labels.
    """
    info = find_logits_info(path)
    names = None if info is None else tuple(info["labels"])
    said = f"{path}: its logits, by the record beside it,"
    if asserted:
        named = read_labels(asserted).names
        if names not in (None, named):
            raise InputError(f"{said} are in the order {', '.join(names or ())}, which --logits_order={asserted} "
                             "contradicts; leave --logits_order out.")
        names, said = named, f"{path}: its logits, by --logits_order={asserted},"
    if names is None:
        if required:
            raise InputError(f"{path}: holds logits, and no record beside it says of which labels in which order: it "
                             "was edited, or comes from elsewhere; label it again with evaluate.py --augmented and "
                             "copy augmented.raw.pred within its folder, or name a file of the labels in the logits' "
                             "order, one a line: --logits_order=FILE.")
        return None
    if set(names) != set(labels.names):
        raise InputError(f"{said} are of the labels {', '.join(names)}, and label.txt has "
                         f"{', '.join(labels.names)}; take a teacher that was trained on this data's labels.")
    if names != labels.names:
        logger.info("[%s] logits reordered from %s to label.txt's %s", path, ", ".join(names), ", ".join(labels.names))
    return [names.index(name) for name in labels.names]


def label_parser(path: str | os.PathLike[str], labels: Labels, dummy: str | None = None, asserted: str | None = None,
                 required: bool = False, unknown_allowed: bool = False, separator: str | None = None) -> LabelParser:
    """The parser of a file's labels, whose logits come out in the order of `labels`; see column_order.

    Args:
        dummy: the label of text that has none.
        unknown_allowed, separator: see LabelParser.
    """
    return LabelParser(labels, dummy, unknown_allowed, partial(column_order, path, labels, asserted, required),
                       separator)


class TrainingLabels:
    """Collects the labels of train.txt; where the first of them is a teacher's logits, follows label.txt instead.

    Args:
        path: the text, for messages.
        label_path: label.txt.
        separator: see LabelParser.

    Attributes:
        names: the labels as keys, in order of first appearance.
        follow: the parser of logits, None where labels are collected.
    """

    def __init__(self, path: Path, label_path: Path, separator: str | None = None) -> None:
        self.path = path
        self.separator = separator
        self.label_path = label_path
        self.names: dict[str, int] = {}
        self.follow: LabelParser | None = None

    def __call__(self, label: str) -> None:
        """Take in a label. ValueError: it is of another kind than the file's first one."""
        logits = looks_like_logits(label)
        if logits and not self.names and self.follow is None:
            if not self.label_path.exists():
                raise InputError(f"{self.path}: the label {label!r} reads as a teacher's logits, and the label map "
                                 f"that they follow is missing; put the class names into {self.label_path}, one a "
                                 "line.")
            self.follow = label_parser(self.path, read_labels(self.label_path), separator=self.separator)
        if self.follow is not None:
            self.follow(label)
        elif logits:
            raise ValueError(f"the label {label!r} reads as a teacher's logits, and the file's first one does not.")
        else:
            for name in [label] if self.separator is None else split_labels(label, self.separator):
                self.names.setdefault(name, len(self.names))
