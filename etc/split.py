"""Split a labelled file at random: of each label 70 % for training, 10 % for validation, 20 % for the test.

Reads sentence TAB label lines; `-` is standard input. Writes BASE.train, BASE.valid and BASE.test, or with --output_dir
the train.txt, valid.txt and test.txt that preprocess.py reads. The same seed gives the same split. Memory holds all
lines.

    python etc/split.py --data_path total.txt --base_path data
    python etc/split.py --data_path total.txt --output_dir data/reviews
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections import Counter
from pathlib import Path

import root  # noqa: F401 (puts the folder above on the path)

from cli.flags import Parser, natural_int
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.lines import Example
from text.lines import TsvReader
from text.splitting import apportion
from util import atomic_write


def split(examples: list[Example], seed: int) -> dict[str, list[str]]:
    """Deal three examples or more by a seed: of each label a tenth to valid, a fifth to test, the rest to train.

    Each of the three gets at least one; what whole numbers cannot divide goes by the largest remainders.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    left = apportion(Counter(example.label for example in examples), {"test": 0.2, "valid": 0.1}, spare=0)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for example in shuffled:
        name = next((name for name, quota in left.items() if quota[example.label]), "train")
        if name != "train":
            left[name][example.label] -= 1
        parts[name].append(f"{example.sentence}\t{example.label}\n")
    return parts


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data_path", required=True, help="The file to split, or - for standard input.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base_path", help="Write BASE.train, BASE.valid and BASE.test.")
    where.add_argument("--output_dir", type=Path, help="Write train.txt, valid.txt and test.txt into this folder.")
    parser.add_argument("--seed", type=natural_int, default=42,
                        help="Another seed gives another split (default: %(default)s).")
    parser.add_argument("--skip_bad_lines", action="store_true", help="Leave unusable lines out and count them.")
    parser.add_argument("--force", action="store_true", help="Replace outputs that are there already.")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Split the file that the command line names."""
    args = get_params(argv)
    paths = {name: args.output_dir / f"{name}.txt" if args.output_dir else Path(f"{args.base_path}.{name}")
             for name in ("train", "valid", "test")}
    for path in paths.values():
        if path.exists() and Path(args.data_path).exists() and path.samefile(args.data_path):
            raise InputError(f"{path}: is the file to split; choose another --base_path or --output_dir.")
        if path.exists() and not args.force:
            raise InputError(f"{path}: already there; move it away, or pass --force to replace it.")
    reader = TsvReader(args.data_path, args.skip_bad_lines)
    examples = list(reader)
    if len(examples) < len(paths):
        raise InputError(f"{args.data_path}: {len(examples)} usable lines are too few for three files.")
    parts = split(examples, args.seed)
    with contextlib.ExitStack() as stack:  # the files get their final names after all have been written
        for name, path in paths.items():
            stack.enter_context(atomic_write(path)).writelines(parts[name])
    print("; ".join(f"{path}: {len(parts[name]):,} lines" for name, path in paths.items())
          + (f"; {reader.skipped:,} bad lines left out" if reader.skipped else ""), file=sys.stderr)


if __name__ == "__main__":
    main()
