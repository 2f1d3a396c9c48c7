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
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what is imported below lies beside the stages

from download import fetch, optional, say

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly

ROOT = Path(__file__).resolve().parent.parent
BASE_URL = "https://raw.githubusercontent.com/dsindex/iclassifier/HEAD/data/{name}/{file}"

# SHA-256 of the files of each data set that comes as plain text.
PLAIN = {
    "snips": {
        "train.txt": "b88219c9d1de39c43902a929fc40156bd5226bbe3917c8ef27741f81adb337a7",
        "valid.txt": "57485f76ed00717ff6bfb775ac30128e8b285d21eed3125ce5f681bf42148e4a",
        "test.txt": "f89d9eda3074066f22e52a665b001af48c1840bd8fb544e49b8a2c68fab581b2",
    },
    "sst2": {
        "train.txt": "10a92a297ec38e262386e5a2713b4bc70e5d18ced88b7f54bd171a26e5b34ab5",
        "valid.txt": "9a6c7403b71a9b762158387afe4431253ae10cdfb2319b5275289f3766f48291",
        "test.txt": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    },
}


def fetch_plain(name: str, output_dir: Path, base_url: str, force: bool) -> None:
    """Download the three files of a data set of PLAIN.

    Args:
        name: a key of PLAIN.
        output_dir: where the files go.
        base_url: an address in which {name} and {file} stand for the data set and the file; without {file}, a folder
            that holds NAME/train.txt and so on.
        force: replace files that differ from what is expected.

    Raises:
        InputError: a file cannot be had; those before it are there.
    """
    if "{file}" not in base_url:
        base_url = base_url.rstrip("/") + "/{name}/{file}"
    for file, checksum in PLAIN[name].items():
        fetch(base_url.replace("{name}", name).replace("{file}", file), output_dir / file, checksum, force)
    say(f"{output_dir}: {', '.join(PLAIN[name])} are complete")


# --------------------------------------------------------------------------------------------------------- the hub

AMAZON = "amazon_us_reviews"
STARS = {"5": "positive", "1": "negative"}
AMAZON_LIMIT = 512  # characters
# What data sets call their columns, the first that is there being taken.
TEXT_COLUMNS = ("text", "sentence", "review_body")
LABEL_COLUMNS = ("label", "star_rating")


def hub_rows(dataset: str, task: str | None, split: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of a data set of the hub, as a stream, each with the data set's features by column.

    Raises:
        InputError: it cannot be had.
    """
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # versions before 4 could run a data set's own script
    package = optional("datasets")
    try:
        opened = package.load_dataset(dataset, task, split=split, streaming=True)
        for row in opened:
            yield row, opened.features or {}
    except Exception as error:  # of the network, of many file formats: they share no base class
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"{dataset}: cannot be read to its end from the hub ({reason}); correct --task_name and --split, name a "
            "mirror (--dataset_name OWNER/NAME --text_column ... --label_column ...), or put a file of sentence TAB "
            "label lines in place by hand."
        ) from None


def find_column(given: str | None, usual: tuple[str, ...], columns: list[str], flag: str) -> str:
    """The column that `flag` gives, or else the first of the usual names that is there."""
    for name in (given,) if given else usual:
        if name in columns:
            return name
    raise InputError(f"no column {given or ' or '.join(usual)}; choose {flag} from {', '.join(columns)}.")


def fold(text: str) -> str:
    """Text with blanks, line ends and HTML's <br /> as single blanks, so that it fits on a line."""
    return " ".join(re.sub(r"<br\s*/?>|\0", " ", text, flags=re.IGNORECASE).split())


def cut(text: str, limit: int) -> str:
    """The words of a folded text that fit into so many characters; of a longer single word, its beginning."""
    return text if len(text) <= limit else text[:limit + 1].rpartition(" ")[0] or text[:limit]


def as_text(value: Any, column: str) -> str:
    """The folded text of a cell; empty where there is none.

    Raises:
        InputError: it holds a list or the like.
    """
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise InputError(f"the column {column} holds a {type(value).__name__}; choose --text_column and "
                         "--label_column that hold one text or number a row.")
    return fold(str(value))


def write_hub(args: argparse.Namespace, out: TextIO) -> None:
    """Write a data set of the hub to `out` and count on standard error what was left out.

    Raises:
        InputError: it cannot be had, or has no usable row.
    """
    counts: Counter[str] = Counter()
    columns: tuple[str, str] | None = None
    rows = hub_rows(args.dataset_name, args.task_name, args.split or "train")
    for row, features in tqdm(rows, desc=args.dataset_name, unit=" rows"):
        text_column, label_column = columns = columns or (
            find_column(args.text_column, TEXT_COLUMNS, list(row), "--text_column"),
            find_column(args.label_column, LABEL_COLUMNS, list(row), "--label_column"),
        )
        text, label = as_text(row[text_column], text_column), as_text(row[label_column], label_column)
        names = getattr(features.get(label_column), "names", None)  # of a ClassLabel: the cell is a number
        if names and isinstance(row[label_column], int):
            # Test sets without labels have -1 in their place.
            label = fold(names[row[label_column]]) if 0 <= row[label_column] < len(names) else ""
        if label_column == "star_rating" or args.dataset_name.rpartition("/")[2] == AMAZON:
            text, label = cut(text, AMAZON_LIMIT), STARS.get(label.removesuffix(".0"), "")
        kind = "without a text" if not text else "without a label that counts" if not label else "written"
        counts[kind] += 1
        if kind == "written":
            out.write(f"{text}\t{label}\n")
    out.flush()
    say(f"{args.dataset_name}: rows: " + ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common()))
    if not counts["written"]:
        raise InputError(f"{args.dataset_name}: no usable row; choose another --split, --text_column or "
                         "--label_column.")


# ------------------------------------------------------------------------------------------------ the command line


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help="the data set: " + ", ".join(PLAIN))
    which.add_argument("--dataset_name", help="the same as a flag, or a data set of the hub")
    plain = parser.add_argument_group("for " + " and ".join(PLAIN))
    plain.add_argument("--output_dir", type=Path, help="where the files go (default: data/NAME of this project)")
    plain.add_argument("--base_url",
                       help="where they come from, {name} being the data set and {file} train.txt and so on; or a "
                            f"folder that holds NAME/train.txt (default: {BASE_URL})")
    plain.add_argument("--force", action="store_true", help="replace files that differ from what is expected")
    hub = parser.add_argument_group("for data sets of the hub")
    hub.add_argument("--task_name", help="which of its configurations, where it has several")
    hub.add_argument("--split", help="which part of it (default: train)")
    hub.add_argument("--text_column", help=f"where the sentence stands (default: {' or '.join(TEXT_COLUMNS)})")
    hub.add_argument("--label_column", help=f"where the label stands (default: {' or '.join(LABEL_COLUMNS)})")
    args = parser.parse_args(argv)
    name = args.name or args.dataset_name
    if args.name and name not in PLAIN:
        parser.error(f"{name}: no such data set here; choose one of {', '.join(PLAIN)}, or name a data set of the hub "
                     "with --dataset_name.")
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
        return fetch_plain(name, args.output_dir or ROOT / "data" / name, args.base_url or BASE_URL, args.force)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever the library prints is no data
        write_hub(args, out)


if __name__ == "__main__":
    main()
