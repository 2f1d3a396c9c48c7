"""etc/: the sample data set, and the downloads against a server on this machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from helpers import serving

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "etc"))

import download
import download_datasets
import download_embeddings
import make_sample_data

from sentence_classifier.errors import InputError
from text.lines import TsvReader

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"  # the real data sets, where this checkout has them beside it

# ----------------------------------------------------------------------------------------------------- sample data

SAMPLE = ROOT / "data" / "sample"


def sample(split: str) -> tuple[list[str], list[str]]:
    """Sentences and labels of a split."""
    examples = list(TsvReader(SAMPLE / f"{split}.txt"))
    return [example.sentence for example in examples], [example.label for example in examples]


def test_sample_is_what_the_script_writes(tmp_path: Path) -> None:
    for run in ("first", "second"):
        make_sample_data.main(["--output_dir", str(tmp_path / run)])
    for split in ("train", "valid", "test"):
        written = (tmp_path / "first" / f"{split}.txt").read_bytes()
        assert written == (tmp_path / "second" / f"{split}.txt").read_bytes()
        assert written == (SAMPLE / f"{split}.txt").read_bytes()


def test_sample_does_not_hang_on_the_hash_seed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "make_sample_data.py", "--output_dir", str(tmp_path)], check=True,
                   cwd=ROOT / "etc", env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True)
    assert (tmp_path / "train.txt").read_bytes() == (SAMPLE / "train.txt").read_bytes()


def test_sample_splits_are_clean_and_disjoint() -> None:
    sentences = [sentence for split in ("train", "valid", "test") for sentence in sample(split)[0]]
    assert len(set(sentences)) == len(sentences)
    for sentence in sentences:
        assert re.fullmatch(r"[a-z0-9']+( [a-z0-9']+)+", sentence), sentence


def test_sample_sizes_and_intents() -> None:
    counts = {split: Counter(sample(split)[1]) for split in ("train", "valid", "test")}
    assert {split: count.total() for split, count in counts.items()} == {"train": 3000, "valid": 400, "test": 400}
    assert sum((SAMPLE / f"{split}.txt").stat().st_size for split in counts) < 500_000
    intents = set(counts["train"])
    assert len(intents) >= 8 and make_sample_data.NONE in intents
    for count in counts.values():
        assert set(count) == intents
        assert min(count.values()) > count.total() / len(intents) / 2


def test_sample_test_split_has_words_and_templates_of_its_own() -> None:
    words = {split: {word for sentence in sample(split)[0] for word in sentence.split()} for split in ("train", "test")}
    assert len(words["test"] - words["train"]) > 50
    for name, pool in {**make_sample_data.SLOTS, **make_sample_data.INTENTS}.items():
        separator = "\n" if name in make_sample_data.INTENTS else "|"
        parts = [set(pool.options(split, separator)[number]) for split, number in
                 (("train", 0), ("valid", 1), ("test", 1))]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]), name


def test_sample_is_not_free_for_a_linear_model() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    svm = pytest.importorskip("sklearn.svm")
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    train, valid, test = sample("train"), sample("valid"), sample("test")
    features = vectorizer.fit_transform(train[0])
    models = [svm.LinearSVC(C=c).fit(features, train[1]) for c in (0.3, 1.0, 3.0)]
    best = max(models, key=lambda model: model.score(vectorizer.transform(valid[0]), valid[1]))
    assert 0.80 < best.score(vectorizer.transform(test[0]), test[1]) < 0.97


# -------------------------------------------------------------------------------------------------------- downloads

CONTENT = os.urandom(1 << 20)


class Remote:
    """What the server on this machine has, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files = {"/file.bin": CONTENT}
        self.etag: str | None = '"one"'
        self.knows_range = True
        self.knows_if_range = True
        self.script: list[int] = []  # for the next requests: a status to answer, or bytes after which to hang up
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = {name.lower(): value for name, value in handler.headers.items()}
        self.asked.append((handler.path, asked))
        step = self.script.pop(0) if self.script else 0
        content = self.files.get(re.sub("^http://[^/]+", "", handler.path))
        if content is None or 400 <= step < 600:
            return handler.send_error(404 if content is None else step)
        start = int(asked.get("range", "bytes=0-")[6:-1]) if self.knows_range else 0
        if self.knows_if_range and asked.get("if-range", self.etag) != self.etag:
            start = 0
        if start >= len(content):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        body = content[start:start + step] if step else content[start:]
        self.sent += len(body)
        with contextlib.suppress(OSError):
            handler.wfile.write(body)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    there = Remote()

    with serving(there.answer) as there.url:
        yield there


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(remote: Remote, path: Path, content: bytes | None = CONTENT, force: bool = False) -> bool:
    """Fetch file.bin and expect `content`."""
    return download.fetch(f"{remote.url}/file.bin", path, None if content is None else digest(content), force)


def interrupt(remote: Remote, path: Path, monkeypatch: pytest.MonkeyPatch, sent: int = 400_000) -> None:
    """Fetch file.bin, but the server hangs up on the way."""
    remote.script = [sent]
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(InputError, match=rf"ended after {sent:,} of {len(CONTENT):,} bytes.*run the command again"):
            fetch(remote, path)
    assert not path.exists()
    assert path.with_name("file.bin.part").read_bytes() == CONTENT[:sent]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(remote, tmp_path / "new" / "file.bin")
    assert (tmp_path / "new" / "file.bin").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["file.bin"]
    out, err = capsys.readouterr()
    assert "file.bin" in err and "100%" in err and not out


def test_interrupted_download_is_resumed(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(remote, tmp_path / "file.bin", monkeypatch)
    assert fetch(remote, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and names(tmp_path) == ["file.bin"]
    headers = remote.asked[1][1]
    assert headers["range"] == "bytes=400000-" and headers["if-range"] == '"one"'
    assert remote.sent == len(CONTENT)


def test_broken_connections_are_retried(remote: Remote, tmp_path: Path) -> None:
    remote.script = [100, 503, 300_000]
    assert fetch(remote, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [headers.get("range") for _, headers in remote.asked] == [None, "bytes=100-", "bytes=100-", "bytes=300100-"]


def test_attempts_come_to_an_end(remote: Remote, tmp_path: Path) -> None:
    remote.script = [503] * 100
    with pytest.raises(InputError, match=r"answers 503.*4 times; try again later, or download it by hand"):
        fetch(remote, tmp_path / "file.bin")
    assert len(remote.asked) == download.ATTEMPTS and not names(tmp_path)


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_a_changed_file_is_started_anew(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        knows_if_range: bool) -> None:
    interrupt(remote, tmp_path / "file.bin", monkeypatch)
    changed = CONTENT[::-1]
    remote.files["/file.bin"], remote.etag, remote.knows_if_range = changed, '"two"', knows_if_range
    assert fetch(remote, tmp_path / "file.bin", None)
    assert (tmp_path / "file.bin").read_bytes() == changed


def test_a_shorter_file_is_started_anew(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(remote, tmp_path / "file.bin", monkeypatch)
    remote.files["/file.bin"], remote.knows_if_range = b"short", False  # answers 416
    assert fetch(remote, tmp_path / "file.bin", b"short")


@pytest.mark.parametrize("how", ["no ranges", "no version", "other address", "lost note"])
def test_what_cannot_be_resumed_is_started_anew(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                how: str) -> None:
    remote.knows_range = how != "no ranges"
    if how == "no version":
        remote.etag = None
    interrupt(remote, tmp_path / "file.bin", monkeypatch)
    note = tmp_path / "file.bin.part.json"
    if how == "other address":
        note.write_text(note.read_text().replace("file.bin", "else.bin"))
    elif how == "lost note":
        note.unlink()
    assert fetch(remote, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and names(tmp_path) == ["file.bin"]
    assert ("range" in remote.asked[1][1]) == (how == "no ranges")


def test_wrong_checksum_leaves_nothing(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"SHA-256 {digest(CONTENT)} in place of {digest(b'other')}"):
        fetch(remote, tmp_path / "file.bin", b"other")
    assert not names(tmp_path)


def test_404(remote: Remote, tmp_path: Path) -> None:
    path = tmp_path / "none.bin"
    with pytest.raises(InputError, match=f"answers 404.*by hand and put it at {path}"):
        download.fetch(f"{remote.url}/none.bin", path)
    assert len(remote.asked) == 1 and not names(tmp_path)


def test_no_connection(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="127.0.0.1 refuses the connection; download it by hand"):
            download.fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/file.bin", tmp_path / "file.bin")

    def unresolved(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(InputError, match="the name data.invalid cannot be resolved"):
        download.fetch("http://data.invalid/file.bin", tmp_path / "file.bin")
    assert not names(tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "snips", "http://", "http://127.0.0.1:1/a b", "http://[/"])
def test_bad_address(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^[^;]*: not an? (http or https|usable) address"):
        download.fetch(url, tmp_path / "file.bin")
    assert not names(tmp_path)


def test_proxy_of_the_environment(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", remote.url)
    assert download.fetch("http://data.invalid/file.bin", tmp_path / "file.bin", digest(CONTENT))
    assert remote.asked[0][0] == "http://data.invalid/file.bin"


def test_what_is_there_stays(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    assert not fetch(remote, path) and not fetch(remote, path, force=True) and not remote.asked
    assert "already there" in capsys.readouterr().err
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="not the expected file.*--force"):
        fetch(remote, path)
    assert path.read_bytes() == b"mine" and not remote.asked
    assert fetch(remote, path, force=True) and path.read_bytes() == CONTENT


def test_full_disk(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device\); make room"):
        fetch(remote, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


def test_two_downloads_of_one_file(remote: Remote, tmp_path: Path) -> None:
    with download.locked(tmp_path / "file.bin.part") as file:
        with pytest.raises(InputError, match="another process"):
            fetch(remote, tmp_path / "file.bin")
        assert download.still_at(tmp_path / "file.bin.part", file)
    assert fetch(remote, tmp_path / "file.bin")


# --------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def toy(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A data set "toy" on the server."""
    texts = {f"{split}.txt": f"{split} it\tyes\n".encode() for split in ("train", "valid", "test")}
    remote.files = {f"/data/toy/{name}": text for name, text in texts.items()}
    monkeypatch.setitem(download_datasets.PLAIN, "toy", {name: digest(text) for name, text in texts.items()})
    return remote


@pytest.mark.parametrize("name", [["toy"], ["--dataset_name", "toy"]])
@pytest.mark.parametrize("base", ["/data", "/data/", "/data/{name}/{file}"])
def test_dataset(toy: Remote, tmp_path: Path, name: list[str], base: str) -> None:
    download_datasets.main([*name, "--output_dir", str(tmp_path), f"--base_url={toy.url}{base}"])
    assert {f"/data/toy/{path.name}": path.read_bytes() for path in tmp_path.iterdir()} == toy.files


def test_dataset_goes_to_the_data_folder(toy: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_datasets, "ROOT", tmp_path)
    download_datasets.main(["toy", f"--base_url={toy.url}/data"])
    assert names(tmp_path / "data" / "toy") == ["test.txt", "train.txt", "valid.txt"]


def test_dataset_errors_end_with_status_2(toy: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "valid.txt").write_text("mine\n")
    for arguments, says in ((["imdb"], "choose one of snips, sst2"), ([], "required"), (["toy"], "valid.txt: already"),
                            (["toy", "--dataset_name", "snips"], "not allowed"), (["toy", "--forse"], "--force")):
        with pytest.raises(SystemExit) as stop:
            download_datasets.main([*arguments, f"--base_url={toy.url}/data", f"--output_dir={tmp_path}"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and says in err and "Traceback" not in err
    assert (tmp_path / "valid.txt").read_text() == "mine\n"


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real data sets in {SHARED}")
@pytest.mark.parametrize("name", ["snips", "sst2"])
def test_real_datasets_have_the_expected_checksums(remote: Remote, tmp_path: Path, name: str) -> None:
    remote.files = {f"/{name}/{path.name}": path.read_bytes() for path in (SHARED / name).glob("*.txt")}
    download_datasets.main([name, f"--output_dir={tmp_path}", f"--base_url={remote.url}"])
    assert names(tmp_path) == ["test.txt", "train.txt", "valid.txt"]


# ------------------------------------------------------------------------------------------------------- embeddings

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
def glove(remote: Remote) -> Remote:
    remote.files = {"/data/glove.6B.zip": zipped()}
    return remote


def embeddings(glove: Remote, folder: Path, *more: str) -> None:
    download_embeddings.main([f"--url={glove.url}/data/glove.6B.zip", f"--output_dir={folder}", *more])


def refused(capsys: pytest.CaptureFixture[str], glove: Remote, folder: Path, *more: str) -> str:
    """The one sentence with which the script ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        embeddings(glove, folder, *more)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("error: "))


def test_embeddings(glove: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeddings(glove, tmp_path)
    assert (tmp_path / "glove.6B.300d.txt").read_bytes() == VECTORS
    assert names(tmp_path) == ["glove.6B.300d.txt", "glove.6B.zip"]
    assert "unpack glove.6B.300d.txt: 100%" in capsys.readouterr().err
    embeddings(glove, tmp_path)
    assert "glove.6B.300d.txt: already there" in capsys.readouterr().err
    embeddings(glove, tmp_path, "--name=glove.6B.50d", f"--sha256={digest(zipped()).upper()}")
    assert (tmp_path / "glove.6B.50d.txt").read_bytes() == b"word 1.0\n"
    assert len(glove.asked) == 1


def test_embeddings_already_there_are_kept(glove: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "glove.6B.300d.txt"
    path.write_bytes(b"mine 1.0\n")
    embeddings(glove, tmp_path)
    assert "not compared" in capsys.readouterr().err and not glove.asked
    (tmp_path / "glove.6B.zip").write_bytes(zipped())
    assert "not the glove.6B.300d.txt of" in refused(capsys, glove, tmp_path)
    path.write_bytes(VECTORS[:-2] + b"6\n")  # of the same size
    assert "not the glove.6B.300d.txt of" in refused(capsys, glove, tmp_path)
    assert path.read_bytes() != VECTORS
    embeddings(glove, tmp_path, "--force")
    assert path.read_bytes() == VECTORS and not glove.asked


@pytest.mark.parametrize("bad", [zipped(damage=True), zipped()[:-30], b"<html>sorry</html>"])
def test_embeddings_of_a_damaged_zip(glove: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     bad: bytes) -> None:
    glove.files["/data/glove.6B.zip"] = bad
    assert re.search("glove.6B.zip: (damaged|not a whole zip file).*delete it", refused(capsys, glove, tmp_path))
    assert names(tmp_path) == ["glove.6B.zip"]
    assert "delete it" in refused(capsys, glove, tmp_path) and len(glove.asked) == 1
    glove.files["/data/glove.6B.zip"] = zipped()
    embeddings(glove, tmp_path, "--force")
    assert (tmp_path / "glove.6B.300d.txt").read_bytes() == VECTORS and len(glove.asked) == 2


def test_embeddings_flags(glove: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not an http or https address" in refused(capsys, glove, tmp_path, "--url=http://[/glove.zip")
    assert "64 hexadecimal digits" in refused(capsys, glove, tmp_path, "--sha256=abc")
    assert "without folders" in refused(capsys, glove, tmp_path, "--name=../glove")
    assert not glove.asked
    assert f"in place of {digest(b'')}" in refused(capsys, glove, tmp_path, f"--sha256={digest(b'')}")
    assert not names(tmp_path)
    assert "choose --name from glove.6B.50d, glove.6B.300d" in refused(capsys, glove, tmp_path, "--name=glove.6B.1d")


# ---------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", ["download_datasets.py", "download_embeddings.py", "make_sample_data.py"])
def test_scripts_run_from_the_root_and_from_etc(script: str) -> None:
    for folder, path in ((ROOT, f"etc/{script}"), (ROOT / "etc", script)):
        done = subprocess.run([sys.executable, path, "--help"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "--output_dir" in done.stdout and not done.stderr
