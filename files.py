"""Files that appear under their names whole or not at all, and how one is opened, summed and kept aside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from errors import FullDisk, InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that takes `path`'s place, whole and synced to disk, when the block ends well.

    When the block raises, or the process dies in it, whatever stood at `path` stays as it was.

    Raises:
        InputError: `path` cannot be written to; FullDisk: there is no room.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, f".{path.name}.*.tmp")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        text = "b" not in mode
        file = open(temporary, mode, encoding="utf-8" if text else None, newline="\n" if text else None)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place.") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        refuse_full_disk(path, error)
        raise


def refuse_full_disk(path: Path, error: BaseException | None) -> None:
    """Raise FullDisk if it was for want of room on the disk that writing `path` failed, however that was reported."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # as safetensors says it
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FullDisk(path, os.strerror(number)) from None
        error = error.__context__  # torch.save reports what comes of it


def sweep(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that nobody has touched for a day: processes that were killed left them."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_previous(path: Path) -> Path:
    """Give the file at `path` a second name that no later file takes, `path.previous`, and return that name.

    A hard link where the file system has them, so that `path` itself never goes missing in between.
    """
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.previous" + (f".{number}" if number > 1 else ""))
        try:
            os.link(path, aside)
            return aside
        except FileExistsError:
            number += 1
        except OSError:
            if aside.exists():
                number += 1
                continue
            os.replace(path, aside)
            return aside


def second_name(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in the place of a file that may be there."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 checksum of a file's content, in hexadecimal."""
    with open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def open_input(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading bytes.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
