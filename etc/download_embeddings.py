"""Fetch GloVe word vectors: download the zip file and unpack one table of it.

Reads from the network. Writes embeddings/glove.6B.zip (862 MB, delete it if you need no other table of it) and
embeddings/NAME.txt, one word and its vector a line; files that are there already stay as they are.

    python etc/download_embeddings.py --name glove.6B.300d

GloVe: Pennington, Socher and Manning 2014, https://nlp.stanford.edu/projects/glove/, public domain (PDDL 1.0). The zip
file's own checksums (CRC-32) are verified while it is unpacked.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what is imported below lies beside the stages

from download import CHUNK, fetch, say, split_url

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import atomic_write

ROOT = Path(__file__).resolve().parent.parent
URL = "https://nlp.stanford.edu/data/glove.6B.zip"


class DamagedZip(InputError):
    """The zip file cannot be unpacked; another download may help."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file for reading.

    Raises:
        DamagedZip: it is none.
        InputError: it cannot be read.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError):
        raise DamagedZip(f"{path}: not a whole zip file; delete it and run the command again.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def same_content(path: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file's content is a zip member's, by size and CRC-32."""
    if path.stat().st_size != member.file_size:
        return False
    crc = 0
    with open(path, "rb") as file, tqdm(total=member.file_size, desc=f"check {path.name}", unit="B",
                                        unit_scale=True) as bar:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
            bar.update(len(block))
    return crc == member.CRC


def unpack(archive: Path, name: str, path: Path, force: bool) -> None:
    """Unpack the member `name` of a zip file to `path`, verifying its CRC-32 on the way.

    Args:
        archive: the zip file.
        name: the member, for example glove.6B.300d.txt.
        path: where its content goes.
        force: replace a file at `path` that has another content.

    Raises:
        DamagedZip: the zip file is broken.
        InputError: there is no such member, `path` holds something else, or cannot be written.
    """
    with open_zip(archive) as opened:
        if name not in opened.namelist():
            tables = ", ".join(other.removesuffix(".txt") for other in opened.namelist())
            raise InputError(f"{archive}: no {name} in it; choose --name from {tables}.")
        member = opened.getinfo(name)
        if path.exists():
            if same_content(path, member):
                say(f"{path}: already there")
                return
            if not force:
                raise InputError(f"{path}: already there, but not the {name} of {archive}; move it away, or pass "
                                 "--force to replace it.")
        try:
            with atomic_write(path, "wb") as file, tqdm(total=member.file_size, desc=f"unpack {name}", unit="B",
                                                        unit_scale=True) as bar:
                try:
                    with opened.open(member) as source:
                        while block := source.read(CHUNK):
                            file.write(block)
                            bar.update(len(block))
                # RuntimeError: encrypted, or compressed in a way that zipfile does not know.
                except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                    raise DamagedZip(f"{archive}: damaged ({error}); delete it and run the command again.") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); make room, or choose another "
                             f"--output_dir, and unzip {name} from {archive} there.") from None


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--name", default="glove.6B.300d",
                        help="the table to unpack, 50d, 100d, 200d or 300d (default: %(default)s)")
    parser.add_argument("--url", default=URL, help="the zip file's address (default: %(default)s)")
    parser.add_argument("--sha256", help="the zip file's SHA-256, where you know it")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "embeddings",
                        help="where both files go (default: embeddings of this project)")
    parser.add_argument("--force", action="store_true", help="replace files that are damaged or hold something else")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Fetch the zip file and unpack the table that the command line names."""
    args = get_params(argv)
    checksum = args.sha256.lower() if args.sha256 else None
    if checksum is not None and not re.fullmatch("[0-9a-f]{64}", checksum):
        raise InputError(f"--sha256 {args.sha256}: 64 hexadecimal digits are expected.")
    name = args.name.removesuffix(".txt") + ".txt"
    if PurePosixPath(name).name != name:
        raise InputError(f"--name {args.name}: the name of one table is expected, without folders.")
    archive = args.output_dir / (PurePosixPath(split_url(args.url).path).name or "embeddings.zip")
    path = args.output_dir / name
    if path.exists() and not archive.exists() and not args.force:
        say(f"{path}: already there, not compared ({archive.name} is not beside it); --force fetches it anew")
        return
    new = fetch(args.url, archive, checksum, force=args.force and checksum is not None)
    try:
        unpack(archive, name, path, args.force)
    except DamagedZip:
        if new or not args.force:
            raise
        fetch(args.url, archive, checksum, force=True)
        unpack(archive, name, path, args.force)


if __name__ == "__main__":
    main()
