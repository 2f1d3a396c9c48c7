"""Fetch a data set: one example a line, sentence TAB label.

Reads from the network. Two data sets come as files, data/NAME/{train,valid,test}.txt; those that are there already stay
as they are. Any other is read from the Hugging Face hub (pip install datasets) and goes to standard output, for
etc/split.py:

    python etc/download_datasets.py snips
    python etc/download_datasets.py sst2
    python etc/download_datasets.py --dataset_name amazon_us_reviews --task_name Video_v1_00 --split train > total.txt
    python etc/download_datasets.py --dataset_name OWNER/NAME --text_column text --label_column label > total.txt

Of Amazon's reviews five stars are positive, one star is negative, and the rest is left out.

Snips (Coucke et al. 2018, arXiv 1805.10190): seven intents of a voice assistant. SST-2 (Socher et al. 2013): film
reviews, 1 for praise and 0 for blame. Both as the iclassifier repository keeps them, checked by SHA-256.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

from download import fetch
from root import ROOT
from tqdm import tqdm

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly

BASE_URL = "https://raw.githubusercontent.com/dsindex/iclassifier/HEAD/data"

# SHA-256 of the files of each data set that comes as plain text.
PLAIN: dict[str, dict[str, str]] = json.loads((ROOT / "etc" / "data_sets.json").read_text(encoding="utf-8"))

STARS = {"5": "positive", "1": "negative"}  # of Amazon's reviews
# What data sets call their columns. The first that is there is taken.
TEXT_COLUMNS = ("text", "sentence", "review_body")
LABEL_COLUMNS = ("label", "star_rating")


def hub_rows(dataset: str, task: str | None, split: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of a data set of the hub as a stream, with its columns' features; an InputError says what failed."""
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # versions before 4 could run a data set's own script
    try:
        import datasets
    except ImportError:
        raise InputError("the package datasets is missing; install it: pip install datasets.") from None
    try:
        opened = datasets.load_dataset(dataset, task, split=split, streaming=True)
        for row in opened:
            yield row, opened.features or {}
    except Exception as error:  # of the network, of many file formats: they share no base class
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{dataset}: cannot be read to its end from the hub ({reason}); correct --task_name and "
                         "--split, name a mirror (--dataset_name OWNER/NAME --text_column ... --label_column ...), or "
                         "put a file of sentence TAB label lines in place by hand.") from None


def find_column(given: str | None, usual: tuple[str, ...], row: dict[str, Any], flag: str) -> str:
    """The column that `flag` gives, or else the first of the usual names that is there."""
    for name in (given,) if given else usual:
        if name in row:
            return name
    raise InputError(f"no column {given or ' or '.join(usual)}; choose {flag} from {', '.join(row)}.")


def one_line(value: Any, column: str) -> str:
    """A cell's text with blanks, line ends and HTML's <br /> as single blanks; a list or the like is an InputError."""
    if not isinstance(value, str | int | float | None):
        raise InputError(f"the column {column} holds a {type(value).__name__}; choose --text_column and "
                         "--label_column that hold one text or number a row.")
    text = "" if value is None else str(value)
    return " ".join(re.sub(r"<br\s*/?>|\0", " ", text, flags=re.IGNORECASE).split())


def write_hub(args: argparse.Namespace, out: TextIO) -> None:
    """Write a data set of the hub to `out`, and count on standard error what was left out."""
    counts: Counter[str] = Counter()
    rows = hub_rows(args.dataset_name, args.task_name, args.split or "train")
    for row, features in tqdm(rows, desc=args.dataset_name, unit=" rows"):
        text_column = find_column(args.text_column, TEXT_COLUMNS, row, "--text_column")
        label_column = find_column(args.label_column, LABEL_COLUMNS, row, "--label_column")
        text, label = one_line(row[text_column], text_column), one_line(row[label_column], label_column)
        names = getattr(features.get(label_column), "names", None)
        if names and isinstance(row[label_column], int):  # a class by its number, -1 in test sets without labels
            label = one_line(dict(enumerate(names)).get(row[label_column]), label_column)
        if label_column == "star_rating" or args.dataset_name.rpartition("/")[2] == "amazon_us_reviews":
            text, label = shorten(text, 512, placeholder=""), STARS.get(label.removesuffix(".0"), "")
        kind = "without a text" if not text else "without a label that counts" if not label else "written"
        counts[kind] += 1
        if kind == "written":
            out.write(f"{text}\t{label}\n")
    out.flush()
    print(f"{args.dataset_name}: rows: " + ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common()),
          file=sys.stderr)
    if not counts["written"]:
        raise InputError(f"{args.dataset_name}: no usable row; choose another --split, --text_column or "
                         "--label_column.")


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", choices=PLAIN, help=f"The data set, {' or '.join(PLAIN)}.")
    which.add_argument("--dataset_name", help="The same as a flag, or a data set of the hub.")
    plain = parser.add_argument_group("for " + " and ".join(PLAIN))
    plain.add_argument("--output_dir", type=Path, help="The folder of the files (default: data/NAME of this project).")
    plain.add_argument("--base_url", help=f"A folder on a server that holds NAME/train.txt (default: {BASE_URL}).")
    plain.add_argument("--force", action="store_true", help="Replace files that differ from what is expected.")
    hub = parser.add_argument_group("for data sets of the hub")
    hub.add_argument("--task_name", help="The configuration, where the data set has several.")
    hub.add_argument("--split", help="The part of the data set (default: train).")
    hub.add_argument("--text_column", help=f"The column of the sentence (default: {' or '.join(TEXT_COLUMNS)}).")
    hub.add_argument("--label_column", help=f"The column of the label (default: {' or '.join(LABEL_COLUMNS)}).")
    args = parser.parse_args(argv)
    name = args.name or args.dataset_name
    for action in (hub if name in PLAIN else plain)._group_actions:
        if getattr(args, action.dest) not in (None, False):
            parser.error(f"--{action.dest} has no meaning for {name}.")
    return args


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Fetch the data set that the command line names."""
    args = get_params(argv)
    name = args.name or args.dataset_name
    if name in PLAIN:
        folder, base_url = args.output_dir or ROOT / "data" / name, (args.base_url or BASE_URL).rstrip("/")
        for file, checksum in PLAIN[name].items():
            fetch(f"{base_url}/{name}/{file}", folder / file, checksum, args.force)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever the library prints is no data
        write_hub(args, out)


if __name__ == "__main__":
    main()
