"""Turn tables into a data folder: stage 0, before preprocess.py.

Reads   CSV, TSV, JSON lines or parquet: INPUT, and where there are such files VALID and TEST.
Writes  OUTPUT_DIR/train.txt, valid.txt, test.txt (sentence TAB label). What INPUT alone stands for is split off it.

    python import_data.py --input=reviews.csv --output_dir=data/reviews
    python import_data.py --input train.jsonl --test test.jsonl --text_column=query --label_column=intent \\
        --output_dir=data/mine
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli.flags import Parser, natural_int, number, positive_int
from sentence_classifier.command_line import add_table_flags, given_format
from sentence_classifier.errors import FlagError, InputError, fail_cleanly
from sentence_classifier.labels import SEPARATOR, normalize_label, split_labels
from sentence_classifier.tables import read_table, text_and_label
from text.labels import NAMED, shorten
from text.lines import TsvReader, chunks, progress
from text.report import DuplicateFinder, SplitReport, hash_sentence
from text.splitting import Sentence, deal_out
from util import exclusive, previous_name, second_name, sha256, sweep

logger = logging.getLogger(__name__)

TRAIN, VALID, TEST = SPLITS = ("train.txt", "valid.txt", "test.txt")
SHOWN = 10  # labels in the report


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(__doc__, __file__)
    files = parser.add_argument_group("files")
    files.add_argument("--input", nargs="+", required=True, metavar="FILE",
                       help="Tables of the training data, or of all data. Standard input is -.")
    files.add_argument("--valid", nargs="+", metavar="FILE", default=[],
                       help="Tables of the validation data (default: split off --input).")
    files.add_argument("--test", nargs="+", metavar="FILE", default=[],
                       help="Tables of the test data (default: split off --input).")
    files.add_argument("--output_dir", required=True, help="The data folder, for preprocess.py's --data_dir.")
    add_table_flags(parser.add_argument_group("tables"))
    rows = parser.add_argument_group("rows")
    rows.add_argument("--skip_bad_lines", action="store_true",
                      help="Pass over rows without a sentence or a label and count them, in place of ending at the "
                           "first.")
    rows.add_argument("--multi_label", action="store_true",
                      help="A sentence may have several labels, in a list or in one cell, or none.")
    rows.add_argument("--label_separator", default=SEPARATOR,
                      help="This stands between several labels in a cell (default: %(default)s).")
    rows.add_argument("--drop_duplicates", action="store_true",
                      help="Keep a sentence with its label once, and out of the training data what --valid or --test "
                           "has.")
    rows.add_argument("--min_count", type=positive_int, default=1,
                      help="Leave out the sentences of labels with fewer (default: %(default)s, which leaves out "
                           "none).")
    rows.add_argument("--other_label", metavar="NAME",
                      help="Give them this label in place of leaving them out (default: none).")
    split = parser.add_argument_group("split")
    split.add_argument("--valid_share", type=number(0, 1, below=True), default=0.1,
                       help="The proportion of --input that becomes valid.txt (default: %(default)s).")
    split.add_argument("--test_share", type=number(0, 1, below=True), default=0.2,
                       help="The proportion of --input that becomes test.txt (default: %(default)s).")
    split.add_argument("--seed", type=natural_int, default=42, help="The seed decides about the split (default: "
                                                                    "%(default)s).")
    args = parser.parse_args(argv)
    if args.other_label and args.min_count == 1:
        raise FlagError("--other_label goes with --min_count, which says what labels are rare.")
    if args.valid_share + args.test_share >= 1:
        raise FlagError("--valid_share and --test_share leave nothing to train on; lower them.")
    return args


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, ".import-*")
    # Everything is made in a folder beside its place and moved there at the end: a bad row loses nothing.
    with (exclusive("--output_dir", str(folder)),
          tempfile.TemporaryDirectory(dir=folder, prefix=".import-", ignore_cleanup_errors=True) as made):
        stage = Path(made)
        given = {TRAIN: args.input, VALID: args.valid, TEST: args.test}
        parts = {name: read_part(args, paths, stage / f"{name}.given") for name, paths in given.items() if paths}
        rename = rare_labels(parts[TRAIN].labels, args.min_count, args.other_label)
        shares = {name: share for name, share in ((TEST, args.test_share), (VALID, args.valid_share))
                  if name not in parts}

        def rows_of(*names: str) -> Iterator[tuple[str, str, str]]:
            for name in names:
                for sentence, labels in parts[name].rows():
                    if (label := renamed(labels, rename, args.multi_label)) is not None:
                        yield name, sentence, label

        def stratum(label: str) -> str:  # of several labels the rarest, so that each label is split in proportion
            names = label.split(SEPARATOR) if args.multi_label else [label]
            return min(names, key=lambda name: (parts[TRAIN].labels[name], name))

        rows = rows_of(*parts)
        if shares or args.drop_duplicates:
            kept = (name for name in parts if name != TRAIN)
            rows = chain(deal_out((Sentence(name != TRAIN, *row) for name, *row in rows), shares, TRAIN, args.seed,
                                  args.drop_duplicates, stage, stratum), rows_of(*kept))
        write_splits(rows, stage)
        report(stage, args.multi_label)
        publish(stage, folder, args.multi_label)


# -------------------------------------------------------------------------------------------------------- tables in


@dataclass
class Part:
    """Rows of the user's tables, in a file of ours.

    Attributes:
        count: of the rows.
        labels: number of rows by label, in order of first appearance.
    """

    path: Path
    count: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Sentences and labels."""
        with open(self.path, encoding="utf-8", newline="\n") as file:
            for line in tqdm(file, desc=self.path.stem, total=self.count, unit=" rows", disable=None):
                sentence, label = line.removesuffix("\n").split("\t")
                yield sentence, label


def read_part(args: argparse.Namespace, paths: list[str], place: Path) -> Part:
    """Read tables into the file `place`, and log how they were read."""
    part = Part(place)
    names = [name for name in (args.text_column, args.label_column) if name]
    with open(place, "w", encoding="utf-8", newline="\n") as file:
        for path in paths:
            with read_table(path, given_format(args), names) as table:
                columns = text_and_label(table, args.text_column, args.label_column)
                before, joined, skipped = part.count, 0, 0
                for row in tqdm(table, desc=Path(path).name, unit=" rows", disable=None):
                    try:
                        sentence = one_line(row.cells[columns[0]], table.columns[columns[0]], str)
                        if not sentence:
                            raise ValueError(f"{table.columns[columns[0]]!r} is empty.")
                        labels = read_labels(row.cells[columns[1]], table.columns[columns[1]],
                                             args.label_separator if args.multi_label else None)
                    except ValueError as error:
                        if not args.skip_bad_lines:
                            raise InputError(f"{path}:{row.number}: {error} Correct the row, or pass --skip_bad_lines."
                                             ) from None
                        skipped += 1
                        continue
                    joined += sentence not in str(row.cells[columns[0]])
                    part.count += 1
                    part.labels.update(labels)
                    file.write(f"{sentence}\t{SEPARATOR.join(labels)}\n")
            rows = part.count - before
            if not rows:
                raise InputError(f"{path}: no usable row ({table.format}).")
            logger.info("[%s] %s; sentences in %r, labels in %r", path, table.format,
                        *(table.columns[column] for column in columns))
            notes = {"sentences with line breaks or several blanks in a row, which became one": joined,
                     "blank lines": table.blank_lines, "rows skipped": skipped}
            logger.info("[%s] %d rows%s", path, rows,
                        "".join(f"; {count} {what}" for what, count in notes.items() if count))
            if skipped * 10 > rows + skipped:
                logger.warning("[%s] %d of %d rows were skipped; leave --skip_bad_lines out to see what is wrong with "
                               "the first of them.", path, skipped, rows + skipped)
    return part


KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def one_line(cell: Any, column: str, *kinds: type) -> str:
    """A cell as one line of text, perhaps an empty one.

    Raises:
        ValueError: it is not of these kinds.
    """
    if not isinstance(cell, (*kinds, type(None))):
        raise ValueError(f"{column!r} holds {KINDS.get(type(cell), type(cell).__name__)}, and text is expected.")
    text = "" if cell is None else " ".join(str(cell).split())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} holds half of a surrogate pair.") from None
    return text


def read_labels(cell: Any, column: str, separator: str | None) -> list[str]:
    """The labels in a cell: one, or with a separator a list of them or text in which it stands between them.

    Raises:
        ValueError: none or several where one is expected, or what is no label.
    """
    found = [one_line(one, column, str, int, float) for one in (cell if isinstance(cell, list) else [cell])]
    if separator is None:
        names = [normalize_label(name) for name in found]
        if len(names) > 1:
            raise ValueError(f"{column!r} holds {len(names)} labels; if sentences may have several, pass "
                             "--multi_label.")
        if not names or not names[0]:
            raise ValueError(f"{column!r} is empty.")
        return names
    names = list(dict.fromkeys(name for text in found for name in (
        [normalize_label(text)] if isinstance(cell, list) else split_labels(text, separator)) if name))
    if wrong := [name for name in names if SEPARATOR in name]:
        raise ValueError(f"{column!r} holds the label {wrong[0]!r}, and {SEPARATOR} stands between labels in a data "
                         "folder.")
    return names


def rare_labels(labels: Counter[str], min_count: int, other: str | None) -> dict[str, str | None]:
    """What becomes of the labels with fewer rows than `min_count`: `other`; None leaves their rows out."""
    rare = {label: count for label, count in labels.items() if count < min_count}
    if rare:
        logger.info("[labels] %d labels have fewer than %d sentences, %d in all, which are %s", len(rare), min_count,
                    sum(rare.values()), f"labelled {other}" if other else "left out")
    if len(rare) == len(labels):
        raise InputError(f"--min_count={min_count}: no label has so many sentences; at most they have "
                         f"{max(rare.values())}.")
    return dict.fromkeys(rare, normalize_label(other) if other else None)


def renamed(label: str, rename: dict[str, str | None], multi_label: bool) -> str | None:
    """A label, or several, under other names; None: the row is left out, for it had but one label and that is gone."""
    if not multi_label or not rename:
        return rename.get(label, label)
    names = (rename.get(name, name) for name in label.split(SEPARATOR))
    return SEPARATOR.join(dict.fromkeys(name for name in names if name))


# ------------------------------------------------------------------------------------------------------------ output


def write_splits(rows: Iterable[tuple[str, str, str]], folder: Path) -> None:
    """Write rows of split, sentence and label to the splits' files in `folder`."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "w", encoding="utf-8", newline="\n"))
                 for name in SPLITS}
        for name, sentence, label in rows:
            files[name].write(f"{sentence}\t{label}\n")


def report(folder: Path, multi_label: bool) -> None:
    """Log what a careful user wants to know of the splits in `folder`."""
    finder = DuplicateFinder(folder)
    ids: dict[str, int] = {}
    examples: dict[str, str] = {}
    for name in SPLITS:
        split = SplitReport(name)
        finder.add_split(name)
        for chunk in chunks(progress(TsvReader(folder / name, empty_labels=multi_label))):
            for example in chunk:
                split.lengths[len(example.sentence.split())] += 1
                for label in split_labels(example.label, SEPARATOR) if multi_label else [example.label]:
                    split.labels[ids.setdefault(label, len(ids))] += 1
                    examples.setdefault(label, example.sentence)
                split.without_label += not example.label
            finder.add(np.fromiter((hash_sentence(example.sentence) for example in chunk), np.uint64),
                       np.fromiter((example.line for example in chunk), np.int64),
                       np.fromiter((zlib.crc32(example.label.encode()) >> 1 for example in chunk), np.int64))
        if name == TRAIN:
            names, most = tuple(ids), split.labels.most_common(SHOWN)
        for line in (split.size_line(), split.labels_line(tuple(ids)),
                     *([f"{split.without_label} sentences have no label"] if split.without_label else [])):
            logger.info("[%s] %s", name, line)
        if lacking := list(ids)[len(names) :]:
            logger.warning("[%s] %d labels that train.txt lacks: %s", name, len(lacking),
                           ", ".join(map(shorten, lacking[:NAMED])))
    for line in finder.report():
        logger.info(line)
    logger.info("[labels] the most frequent in train.txt, each with a sentence:")
    for label, count in most:
        logger.info("[labels] %6d  %s  %s", count, shorten(names[label]), shorten(examples[names[label]]))


def publish(stage: Path, folder: Path, multi_label: bool) -> None:
    """Move the splits to their place. What other data made moves aside."""
    for name in SPLITS:
        place = folder / name
        if place.exists() and sha256(place) != sha256(stage / name):
            aside = previous_name(place)
            second_name(place, aside)
            logger.warning("[moved aside] %s: other data, now at %s", place, aside)
        os.replace(stage / name, place)
    logger.info("[wrote to %s] %s", folder, ", ".join(SPLITS))
    logger.info("[next] python preprocess.py --data_dir=%s%s", folder, " --multi_label" * multi_label)


if __name__ == "__main__":
    main()
