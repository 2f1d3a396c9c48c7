"""Fetch a file over HTTP: resumed where it stopped, checked, and under its final name only when it is whole.

Shared by the download_*.py scripts beside it; no command of its own. Proxies come from http_proxy, https_proxy and
no_proxy. Runs on Linux and macOS (file locks).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import importlib
import json
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what is imported below lies beside the stages

from sentence_classifier.errors import InputError
from util import atomic_write, sha256, sync_folder

ATTEMPTS = 4
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
CHUNK = 1 << 18  # bytes
RETRIED_STATUS = {408, 429, 500, 502, 503, 504}


class Interrupted(Exception):
    """The transfer stopped and is worth another attempt; with `anew`, from the first byte."""

    def __init__(self, reason: str, anew: bool = False) -> None:
        super().__init__(reason)
        self.anew = anew


def say(message: str) -> None:
    """A line for the user on standard error; standard output is for data."""
    print(message, file=sys.stderr)


def optional(package: str) -> Any:
    """A package that only one of the scripts needs, imported.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"the package {package} is missing; install it: pip install {package}") from None


def split_url(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        InputError: it is not one that `fetch` takes.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    raise InputError(f"{url}: not an http or https address.")


def fetch(url: str, path: Path, checksum: str | None = None, force: bool = False) -> bool:
    """Download `url` to `path`, or leave alone what is there already.

    A transfer that breaks off leaves `path.part`, and the next call goes on from there if the server still has the
    same file (If-Range, RFC 9110 section 13.1.5).

    Args:
        url: http or https.
        path: the final name. It appears when all bytes have come and the checksum is right.
        checksum: SHA-256 in hexadecimal; None takes what the server sends, and a file at `path` as it is.
        force: replace a file at `path` that has another checksum, or that cannot be checked.

    Returns:
        whether the file was downloaded.

    Raises:
        InputError: what failed, and what to do by hand.
    """
    split_url(url)
    if path.exists() and not (force and checksum is None):
        found = sha256(path) if checksum is not None else None
        if found == checksum:
            say(f"{path}: already there" + ("" if checksum is not None else ", taken as it is"))
            return False
        if not force:
            raise InputError(f"{path}: already there, but not the expected file (SHA-256 {found} in place of "
                             f"{checksum}); move it away, or pass --force to replace it.")
    by_hand = f"download it by hand and put it at {path}"
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(part) as file:
            transfer(url, file, path, by_hand)
            file.flush()
            os.fsync(file.fileno())
            found = sha256(part) if checksum is not None else None
            if found != checksum:
                note_of(part).unlink(missing_ok=True)
                part.unlink()
                raise InputError(f"{url}: what came has SHA-256 {found} in place of {checksum}, and was thrown away; "
                                 f"try again, or {by_hand}.")
            os.replace(part, path)
            note_of(part).unlink(missing_ok=True)
            sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "choose another --output_dir"
        raise InputError(f"{path}: cannot be written ({error.strerror}); {advice} and run the command again, "
                         f"or {by_hand}.") from None
    return True


@contextlib.contextmanager
def locked(part: Path) -> Iterator[IO[bytes]]:
    """The partial file, open for appending, held by this process alone.

    Without the lock a second download could go on writing into the file after the first has given it its final name.
    """
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        # Between open and flock another process may have given the file its final name.
        if taken or not still_at(part, file):
            raise InputError(f"{part}: another process is downloading to it; wait until it has ended.")
        try:
            yield file
        finally:
            file.flush()
            if still_at(part, file) and not part.stat().st_size:
                part.unlink()


def still_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def note_of(part: Path) -> Path:
    """The file beside a partial file that says which version of which address it belongs to."""
    return part.with_name(f"{part.name}.json")


def transfer(url: str, file: IO[bytes], path: Path, by_hand: str) -> None:
    """Append to the partial `file` until it is whole, in a few attempts.

    Raises:
        InputError: the server or the network refuses.
        OSError: the disk refuses.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return attempt_transfer(url, file, path, by_hand)
        except Interrupted as error:
            reason = str(error)
            file.flush()
            if error.anew:
                file.truncate(0)
            if attempt + 1 < ATTEMPTS:
                say(f"{url}: {reason}; trying again")
    size = os.fstat(file.fileno()).st_size
    kept = f"run the command again to go on from byte {size:,}" if size else "try again later"
    raise InputError(f"{url}: {reason}, {ATTEMPTS} times; {kept}, or {by_hand}.")


def attempt_transfer(url: str, file: IO[bytes], path: Path, by_hand: str) -> None:
    """Ask for what is missing and append it.

    Raises:
        Interrupted: worth another attempt.
        InputError: not worth one.
        OSError: from the disk; whatever the network raises becomes one of the above.
    """
    part = path.with_name(f"{path.name}.part")
    start = os.fstat(file.fileno()).st_size
    version = known_version(url, part) if start else None
    # Some hosts turn away urllib's own name.
    headers = {"User-Agent": "Mozilla/5.0 (etc/download.py)", "Accept-Encoding": "identity"}
    if version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with contextlib.ExitStack() as stack:
        with network_errors(url, by_hand):
            # A fresh opener reads the proxies of the environment as they are now.
            opener = urllib.request.build_opener()
            response = stack.enter_context(opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT))
        if response.status == 206:
            if version_of(response.headers) not in (None, version) or range_start(response.headers) != start:
                raise Interrupted("the server sent another part than was asked for", anew=True)
        else:
            # The whole file: the server knows no ranges, or has another version by now.
            if start:
                say(f"{path.name}: the partial download cannot be resumed, starting anew")
            file.truncate(0)
            start = 0
            write_note(url, part, version_of(response.headers))
        missing = response.headers.get("Content-Length")
        size = start + int(missing) if missing and missing.isdigit() else None
        bar = stack.enter_context(tqdm(total=size, initial=start, desc=path.name, unit="B", unit_scale=True))
        received = start
        while True:
            with network_errors(url, by_hand):
                block = response.read(CHUNK)
            if not block:
                break
            file.write(block)
            received += len(block)
            bar.update(len(block))
    if size is not None and received < size:
        raise Interrupted(f"the connection ended after {received:,} of {size:,} bytes")


@contextlib.contextmanager
def network_errors(url: str, by_hand: str) -> Iterator[None]:
    """Turn what urllib raises into Interrupted, where another attempt may help, or InputError."""
    host = urlsplit(url).hostname
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 or error.code in RETRIED_STATUS:  # 416: the file there ends before our part does
            raise Interrupted(f"the server answers {error.code} ({error.reason})", anew=error.code == 416) from None
        raise InputError(f"{url}: the server answers {error.code} ({error.reason}); check the address, "
                         f"or {by_hand}.") from None
    except (http.client.InvalidURL, UnicodeError):
        raise InputError(f"{url}: not a usable address; correct it, or {by_hand}.") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, socket.gaierror):
            reason = f"the name {host} cannot be resolved (no network, or a proxy is needed: set https_proxy)"
        elif isinstance(cause, ConnectionRefusedError):
            reason = f"{host} refuses the connection"
        elif isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"the certificate of {host} cannot be verified ({cause.verify_message})"
        elif isinstance(cause, TimeoutError):
            raise Interrupted(f"no answer within {TIMEOUT:g} seconds") from None
        else:
            raise Interrupted(f"the connection broke ({cause or type(cause).__name__})") from None
        raise InputError(f"{url}: {reason}; {by_hand}.") from None


def version_of(headers: Message) -> str | None:
    """What names this version of the file in If-Range: a strong ETag, else the date of the last change."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def range_start(headers: Message) -> int | None:
    """The first byte of a partial answer."""
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


def write_note(url: str, part: Path, version: str | None) -> None:
    """Say what the partial file belongs to. Without a version it can only be started anew."""
    with atomic_write(note_of(part)) as file:
        json.dump({"url": url, "version": version}, file)


def known_version(url: str, part: Path) -> str | None:
    """The version of `url` that the partial file belongs to, None where it cannot be gone on with."""
    try:
        note = json.loads(note_of(part).read_text(encoding="utf-8"))
        return note["version"] if note["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
