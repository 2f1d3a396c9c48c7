"""A teacher's labels: logits in the place of class names, and a record beside the file of which classes they are.

A row of numbers does not say which class its columns mean. So beside a file with logits stands
`logits-CHECKSUM.json`, named after the file's content: it is found for a copy under another name in the same folder,
and not for a file that was edited.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sentence_classifier.errors import InputError
from text.lines import LabelParser, Labels, Lines, chunks, progress
from util import atomic_write, open_input, sha256

if TYPE_CHECKING:  # it imports torch
    from dataset import EncodedData

logger = logging.getLogger(__name__)

RECORD_FORMAT = "logits-1"


def _record_path(path: str | os.PathLike[str], checksum: str) -> Path:
    return Path(path).with_name(f"logits-{checksum[:16]}.json")


def write_record(path: str | os.PathLike[str], labels: list[str], **more: Any) -> None:
    """Write the record of the file with logits at `path` beside it.

    Args:
        labels: the names of the columns, in their order.
        more: where the logits come from (teacher, source); plain data.
    """
    checksum = sha256(path)
    with atomic_write(_record_path(path, checksum)) as file:
        json.dump({"format": RECORD_FORMAT, "sha256": checksum, "file": Path(path).name, "labels": labels, **more,
                   "date": time.strftime("%Y-%m-%d %H:%M:%S")}, file, indent=2, ensure_ascii=False)
        file.write("\n")


def find_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of the file at `path`, None where there is none.

    Raises:
        InputError: there is one, and it is damaged.
    """
    checksum = sha256(path)
    place = _record_path(path, checksum)
    if not place.exists():
        return None
    with open_input(place) as file:
        try:
            match record := json.load(file):
                case {"format": format, "sha256": found, "labels": [*names]} if (
                    format == RECORD_FORMAT and found == checksum and all(isinstance(name, str) for name in names)
                    and len(set(names)) == len(names)
                ):
                    return record
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
    record = find_record(path)
    names = None if record is None else tuple(record["labels"])
    said = f"{path}: its logits, by the record beside it,"
    if asserted:
        named = Labels.read(asserted).names
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
                 required: bool = False) -> LabelParser:
    """The parser of a file's labels, whose logits come out in the order of `labels`; see column_order.

    Args:
        dummy: the label of text that has none.
    """
    return LabelParser(labels, dummy, partial(column_order, path, labels, asserted, required))


def label_text(data: EncodedData, labels: Labels, logits: Callable[[list[np.ndarray]], np.ndarray], batch_size: int,
               limit: int, teacher: dict[str, Any]) -> Path:
    """Write `SOURCE.pred` beside the text SOURCE that `data` encodes: sentence TAB logits, and its record.

    Memory does not grow with the file: some thousand lines at a time are put into batches of like length, and their
    answers into the order of the lines. Each number is the shortest that single precision reads back as the same.

    Args:
        labels: the teacher's.
        logits: token id rows to logits [B, C] float32.
        limit: only the first so many sentences; 0: all.
        teacher: who it is, for the record.

    Raises:
        InputError: a logit is not finite.
    """
    target = data.source.with_name(f"{data.source.name}.pred")
    lines = Lines(data.source, data.facts["skip_bad_lines"],
                  parse_label=label_parser(data.source, labels, data.facts.get("dummy_label")))
    begin = 0
    with atomic_write(target) as file:
        for examples in chunks(islice(progress(data.source, lines), limit or None), 8192, 1 << 22):
            lengths = data.lengths[begin : begin + len(examples)]
            order = np.argsort(-lengths, kind="stable")
            answers = np.empty((len(examples), len(labels)), dtype=np.float32)
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                answers[places] = logits(data.rows(begin + places))
            for example, row in zip(examples, answers, strict=True):
                if not np.isfinite(row).all():
                    raise InputError(f"{data.source}:{example.line}: the teacher's logits for this sentence are not "
                                     "finite; train the teacher again, with a lower --lr.")
                file.write(f"{example.sentence}\t{' '.join(map(str, row))}\n")
            begin += len(examples)
    write_record(target, list(labels.names), teacher=teacher,
                 source={"file": data.source.name, "sha256": data.facts["source_sha256"]})
    return target
