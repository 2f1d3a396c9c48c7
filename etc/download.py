"""Fetch a file over HTTP, for the scripts beside this one. Proxies come from http_proxy, https_proxy and no_proxy."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import root  # noqa: F401 (puts the folder above on the path)
from tqdm import tqdm

from sentence_classifier.errors import InputError
from util import sha256, sync_folder


def fetch(url: str, path: Path, checksum: str | None = None, force: bool = False) -> None:
    """Download `url` to `path`, or leave alone what is there already.

    The name appears when all bytes have come and the checksum is right. A transfer that breaks off leaves `path.part`,
    and the next call resumes it. Without a checksum, the caller must check what came: the server may have another
    version by then. An InputError says what failed, and what to do.

    Args:
        checksum: SHA-256 in hexadecimal.
        force: replace a file at `path` that has another checksum, or that cannot be checked.
    """
    if path.exists() and not (force and checksum is None):
        found = checksum and sha256(path)
        if found == checksum:
            print(f"{path}: already there", file=sys.stderr)
            return
        if not force:
            raise InputError(f"{path}: already there, but not the expected file (SHA-256 {found} in place of "
                             f"{checksum}); move it away, or pass --force to replace it.")
    part = path.with_name(f"{path.name}.part")
    by_hand = f"download it by hand and put it at {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        receive(url, part)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise InputError(f"{url}: cannot be downloaded ({reason or type(error).__name__}); check the address and the "
                         "network (a proxy: set https_proxy) and run the command again, which resumes the download, "
                         f"or {by_hand}.") from None
    if checksum and (found := sha256(part)) != checksum:
        part.unlink()
        raise InputError(f"{url}: what came has SHA-256 {found} in place of {checksum} and was thrown away; run the "
                         f"command again, or {by_hand}.")
    os.replace(part, path)
    sync_folder(path.parent)


def receive(url: str, part: Path) -> None:
    """Download to `part`, from the byte on where it ends; the errors are those of urllib and of the disk."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (etc/download.py)"})  # else some refuse
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=30)  # seconds without a byte
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # the file on the server has no byte after `start`
        return receive(url, part)
    with response:
        start = start if response.status == 206 else 0  # a server without ranges sends all of it
        size = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        with (open(part, "ab" if start else "wb") as file,
              tqdm.wrapattr(response, "read", total=size, initial=start, desc=part.stem) as source):
            shutil.copyfileobj(source, file, 1 << 18)
            file.flush()
            os.fsync(file.fileno())
    received = part.stat().st_size
    if size is not None and received != size:
        raise OSError(f"{received:,} of {size:,} bytes came")
