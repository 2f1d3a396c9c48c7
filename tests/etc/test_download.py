"""Files over HTTP from a server on this machine: any file, the plain data sets, GloVe."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import socket
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import download
import download_datasets
import download_embeddings
import pytest
from helpers import refusal, serving, snapshot

from sentence_classifier.errors import InputError

CONTENT = os.urandom(1 << 20)


class Remote:
    """What the server on this machine has, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files = {"/file.bin": CONTENT}
        self.knows_range = True
        self.hang_up_after: int | None = None  # bytes of the next answer
        self.asked: list[tuple[str, str | None]] = []  # address, range
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append((handler.path, asked))
        content = self.files.get(re.sub("^http://[^/]+", "", handler.path))
        start = int(asked[6:-1]) if asked and self.knows_range else 0
        if content is None or start >= len(content):
            return handler.send_error(404 if content is None else 416)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end, self.hang_up_after = self.hang_up_after, None
        with contextlib.suppress(OSError):
            handler.wfile.write(content[start:][:end])


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    there = Remote()
    with serving(there.answer) as there.url:
        yield there


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(remote: Remote, content: bytes = CONTENT, force: bool = False) -> None:
    """Fetch file.bin into new/, and expect `content`."""
    download.fetch(f"{remote.url}/file.bin", Path("new/file.bin"), digest(content), force)


def interrupt(remote: Remote) -> None:
    remote.hang_up_after = 400_000
    with pytest.raises(InputError, match=r"400,000 of 1,048,576 bytes came.*run the command again, which resumes"):
        fetch(remote)
    assert snapshot(Path("new")) == {"file.bin.part": CONTENT[:400_000]}


def test_download(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(remote)
    assert snapshot(Path("new")) == {"file.bin": CONTENT}
    out, err = capsys.readouterr()
    assert "file.bin" in err and "100%" in err and not out


@pytest.mark.parametrize("knows_range", [True, False])
def test_interrupted_download_is_resumed(remote: Remote, knows_range: bool) -> None:
    remote.knows_range = knows_range
    interrupt(remote)
    fetch(remote)
    assert snapshot(Path("new")) == {"file.bin": CONTENT}
    assert remote.asked == [("/file.bin", None), ("/file.bin", "bytes=400000-")]


def test_a_file_that_changed_in_between_is_not_mixed(remote: Remote) -> None:
    interrupt(remote)
    remote.files["/file.bin"] = CONTENT[::-1]
    with pytest.raises(InputError, match="was thrown away; run the command again"):
        fetch(remote, CONTENT[::-1])
    fetch(remote, CONTENT[::-1])
    assert snapshot(Path("new")) == {"file.bin": CONTENT[::-1]}


@pytest.mark.parametrize("content", [b"short", CONTENT[:400_000]])
def test_a_partial_file_with_nothing_to_come_is_started_anew(remote: Remote, content: bytes) -> None:
    interrupt(remote)
    remote.files["/file.bin"] = content
    fetch(remote, content)
    assert snapshot(Path("new")) == {"file.bin": content}


def test_wrong_checksum_leaves_nothing(remote: Remote) -> None:
    with pytest.raises(InputError, match=f"SHA-256 {digest(CONTENT)} in place of {digest(b'other')}"):
        fetch(remote, b"other")
    assert not snapshot(Path("new"))


@pytest.mark.parametrize("url, reason", [
    ("{server}/none", "HTTP Error 404: Not Found"), ("http://127.0.0.1:{closed}/x", "Connection refused"),
    ("http://data.invalid/x", "not known"), ("snips", "unknown url type"), ("http://[/", "Invalid IPv6"),
])
def test_no_file(remote: Remote, monkeypatch: pytest.MonkeyPatch, url: str, reason: str) -> None:
    def unresolved(host: str, *more: object, lookup=socket.getaddrinfo, **options: object) -> object:
        if host == "data.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = url.format(server=remote.url, closed=closed.getsockname()[1])
        with pytest.raises(InputError, match=rf"cannot be downloaded \(.*{reason}.*\); .* by hand and put it at new/x"):
            download.fetch(url, Path("new/x"))
    assert not snapshot(Path("new"))


def test_what_is_there_stays(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(remote)
    fetch(remote)
    fetch(remote, force=True)
    assert len(remote.asked) == 1 and capsys.readouterr().err.count("already there") == 2
    Path("new/file.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="not the expected file.*--force"):
        fetch(remote)
    assert snapshot(Path("new")) == {"file.bin": b"mine"}
    fetch(remote, force=True)
    assert snapshot(Path("new")) == {"file.bin": CONTENT}


def test_full_disk(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        fetch(remote)
    assert not Path("new/file.bin").exists()


# --------------------------------------------------------------------------------------------------- plain data sets


@pytest.fixture
def toy(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A data set "toy" on the server."""
    texts = {f"{split}.txt": f"{split} it\tyes\n".encode() for split in ("train", "valid", "test")}
    remote.files = {f"/data/toy/{name}": text for name, text in texts.items()}
    monkeypatch.setitem(download_datasets.PLAIN, "toy", {name: digest(text) for name, text in texts.items()})
    return remote


@pytest.mark.parametrize("name", [["toy"], ["--dataset_name", "toy"]])
def test_plain_dataset(toy: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: list[str]) -> None:
    monkeypatch.setattr(download_datasets, "ROOT", tmp_path)
    for flags, folder in (([], "data/toy"), (["--output_dir=there"], "there")):
        download_datasets.main([*name, f"--base_url={toy.url}/data/", *flags])
        assert {f"/data/toy/{name}": text for name, text in snapshot(Path(folder)).items()} == toy.files


def test_plain_dataset_that_cannot_be_had(toy: Remote) -> None:
    Path("valid.txt").write_text("mine\n")
    for arguments, says in ((["imdb"], "choose from"), ([], "required"), (["toy"], "valid.txt: already"),
                            (["toy", "--dataset_name", "snips"], "not allowed"), (["toy", "--forse"], "--force"),
                            (["toy", "--split=test"], "--split has no meaning for toy")):
        assert says in refusal(download_datasets.main, *arguments, f"--base_url={toy.url}/data", "--output_dir=.")
    assert Path("valid.txt").read_text() == "mine\n"


@pytest.mark.real
@pytest.mark.parametrize("name", ["snips", "sst2"])
def test_real_datasets_have_the_expected_checksums(remote: Remote, shared: Path, name: str) -> None:
    remote.files = {f"/{name}/{path.name}": path.read_bytes() for path in (shared / "data" / name).glob("*.txt")}
    download_datasets.main([name, "--output_dir=it", f"--base_url={remote.url}"])
    assert sorted(snapshot(Path("it"))) == ["test.txt", "train.txt", "valid.txt"]


# ------------------------------------------------------------------------------------------------------------ GloVe

VECTORS = "".join(f"word{number} 0.25 -{number}.5\n" for number in range(20_000)).encode()


def zipped(damage: bool = False) -> bytes:
    """A zip file like GloVe's; damaged, one with a flipped bit in the middle of the 300d table."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("glove.6B.50d.txt", b"word 1.0\n")
        archive.writestr("glove.6B.300d.txt", VECTORS)
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= damage
    return bytes(content)


@pytest.fixture
def glove(remote: Remote) -> list[str]:
    """Flags of download_embeddings.py."""
    remote.files = {"/data/glove.6B.zip": zipped()}
    return [f"--url={remote.url}/data/glove.6B.zip", "--output_dir=it"]


def test_embeddings(remote: Remote, glove: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    download_embeddings.main(glove)
    assert snapshot(Path("it")) == {"glove.6B.300d.txt": VECTORS, "glove.6B.zip": zipped()}
    assert "unpack glove.6B.300d.txt: 100%" in capsys.readouterr().err
    download_embeddings.main([*glove, "--name=glove.6B.50d", f"--sha256={digest(zipped()).upper()}"])
    assert Path("it/glove.6B.50d.txt").read_bytes() == b"word 1.0\n" and len(remote.asked) == 1
    Path("it/glove.6B.300d.txt").write_bytes(b"mine 1.0\n")
    download_embeddings.main(glove)
    assert "glove.6B.300d.txt: already there" in capsys.readouterr().err
    assert Path("it/glove.6B.300d.txt").read_bytes() == b"mine 1.0\n"
    download_embeddings.main([*glove, "--force"])
    assert Path("it/glove.6B.300d.txt").read_bytes() == VECTORS


@pytest.mark.parametrize("bad", [zipped(damage=True), zipped()[:-30], b"<html>sorry</html>"])
def test_embeddings_of_a_damaged_zip(remote: Remote, glove: list[str], bad: bytes) -> None:
    remote.files["/data/glove.6B.zip"] = bad
    for _ in range(2):
        assert re.search("glove.6B.zip: not a whole zip file.*delete it", refusal(download_embeddings.main, *glove))
        assert snapshot(Path("it")) == {"glove.6B.zip": bad}
    assert len(remote.asked) == 1


def test_embeddings_that_cannot_be_had(glove: list[str]) -> None:
    assert f"in place of {digest(b'')}" in refusal(download_embeddings.main, *glove, f"--sha256={digest(b'')}")
    assert not snapshot(Path("it"))
    assert ("choose --name from glove.6B.50d, glove.6B.300d"
            in refusal(download_embeddings.main, *glove, "--name=glove.6B.1d"))
