"""Fetch a data set: train.txt, valid.txt and test.txt, one example a line, sentence TAB label.

Reads from the network. Writes data/NAME/{train,valid,test}.txt; files that are there already stay as they are.

    python etc/download_datasets.py snips
    python etc/download_datasets.py sst2

Snips (Coucke et al. 2018, arXiv 1805.10190): seven intents of a voice assistant. SST-2 (Socher et al. 2013): film
reviews, 1 for praise and 0 for blame. Both as the iclassifier repository keeps them, checked by SHA-256.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # text.py and arguments.py lie beside the stages

from download import fetch, say

from arguments import Parser
from text import InputError, fail_cleanly

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


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help="the data set: " + ", ".join(PLAIN))
    which.add_argument("--dataset_name", help="the same as a flag")
    parser.add_argument("--output_dir", type=Path, help="where the files go (default: data/NAME of this project)")
    parser.add_argument("--base_url", default=BASE_URL,
                        help="where they come from, {name} being the data set and {file} train.txt and so on; or a "
                             "folder that holds NAME/train.txt (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that differ from what is expected")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Fetch the data set that the command line names."""
    args = get_params(argv)
    name = args.name or args.dataset_name
    if name not in PLAIN:
        raise InputError(f"{name}: no such data set here; choose one of {', '.join(PLAIN)}.")
    fetch_plain(name, args.output_dir or ROOT / "data" / name, args.base_url, args.force)


if __name__ == "__main__":
    main()
