"""Fetch GloVe word vectors: download the zip file and unpack one table of it.

Reads from the network. Writes embeddings/glove.6B.zip (862 MB, delete it if you need no other table of it) and
embeddings/NAME.txt, one word and its vector a line. Files that are there already stay as they are.

    python etc/download_embeddings.py --name glove.6B.300d

GloVe: Pennington, Socher and Manning 2014, https://nlp.stanford.edu/projects/glove/, public domain (PDDL 1.0). The zip
file's own checksums (CRC-32) are verified while it is unpacked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from download import fetch
from root import ROOT
from tqdm import tqdm

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import atomic_write

URL = "https://nlp.stanford.edu/data/glove.6B.zip"


def unpack(archive: Path, name: str, path: Path) -> None:
    """Unpack the member `name` of a zip file, whose CRC-32 zipfile verifies; an InputError says what is wrong."""
    try:
        with zipfile.ZipFile(archive) as opened:
            if name not in opened.namelist():
                tables = ", ".join(other.removesuffix(".txt") for other in opened.namelist())
                raise InputError(f"{archive}: no {name} in it; choose --name from {tables}.")
            size = opened.getinfo(name).file_size
            with (opened.open(name) as member, atomic_write(path, "wb") as file,
                  tqdm.wrapattr(member, "read", total=size, desc=f"unpack {name}") as source):
                shutil.copyfileobj(source, file, 1 << 18)
    # RuntimeError: encrypted, or compressed in a way that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{archive}: not a whole zip file ({error}); delete it and run the command again.") from None


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--name", default="glove.6B.300d",
                        help="The table to unpack, glove.6B. and 50d, 100d, 200d or 300d (default: %(default)s).")
    parser.add_argument("--url", default=URL, help="The address of the zip file (default: %(default)s).")
    parser.add_argument("--sha256", type=str.lower, help="The SHA-256 of the zip file, where you know it.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "embeddings",
                        help="The folder of both files (default: embeddings of this project).")
    parser.add_argument("--force", action="store_true", help="Replace both files if they are there already.")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Fetch the zip file and unpack the table that the command line names."""
    args = get_params(argv)
    name = args.name.removesuffix(".txt") + ".txt"
    archive = args.output_dir / (args.url.partition("?")[0].rpartition("/")[2] or "embeddings.zip")
    path = args.output_dir / name
    if path.exists() and not args.force:
        print(f"{path}: already there; --force replaces it", file=sys.stderr)
        return
    fetch(args.url, archive, args.sha256, args.force)
    unpack(archive, name, path)


if __name__ == "__main__":
    main()
