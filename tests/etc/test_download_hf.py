"""Models from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import download_hf
import pytest
from helpers import ROOT, refusal, serving, snapshot

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BERT = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "vocab.txt": b"[PAD]\n",
        "model.safetensors": bytes(1000)}
SHARDED = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"one",
           "model-00002-of-00002.safetensors": b"two", "sentencepiece.bpe.model": b"pieces"}


class Hub:
    """What the hub on this machine has, and what it was asked."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {
            "tiny": BERT | {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "onnx/config.json": b"other",
                            "onnx/model.safetensors": b"other", "consolidated.safetensors": b"other"},
            "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
            "owner/sharded": SHARDED,
            "owner/unknown": {"model.safetensors": b""},
        }
        self.broken = ""  # part of an address that the hub refuses
        self.gated = ""  # likewise, until the user accepts its terms
        self.asked: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(path)
        status, content, head = 404, b"", {"X-Error-Code": "RepoNotFound"}
        api = re.fullmatch(r"/api/models/(.+)/(revision|tree)/(.+)", path)
        if self.broken and self.broken in path or self.gated and self.gated in path:
            status, head = 403, {"X-Error-Code": "GatedRepo"} if self.gated else {}
        elif api and api[1] in self.models and api[3] not in ("main", COMMIT):
            head = {"X-Error-Code": "RevisionNotFound"}
        elif api and api[1] in self.models:
            status, files = 200, self.models[api[1]].items()
            if api[2] == "tree":
                answer = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files]
            else:
                answer = {"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file, _ in files]}
            content = json.dumps(answer).encode()
        elif file := re.fullmatch(rf"/(.+)/resolve/{COMMIT}/(.+)", path):
            status, content = 200, self.models[file[1]][file[2]]
            head = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        handler.send_response(status)
        for key, value in {**head, "Content-Length": len(content)}.items():
            handler.send_header(key, str(value))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    there = Hub()
    with serving(there.answer) as there.url:
        yield there


def fetch_model(endpoint: str, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run download_hf.py into `models/it`, in a process of its own, since the library reads HF_ENDPOINT at import."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(Path("hf_home").absolute())}
    return subprocess.run([sys.executable, str(ROOT / "etc" / "download_hf.py"), f"--model_name_or_path={name}",
                           "--output_dir=models/it", *more], env=environment, capture_output=True, text=True)


def test_model(hub: Hub) -> None:
    done = fetch_model(hub.url, "tiny")
    assert done.returncode == 0, done.stderr
    assert snapshot(Path("models/it")) == BERT and os.listdir("models") == ["it"]
    assert "100%" in done.stderr and not done.stdout
    hub.asked.clear()
    again = fetch_model(hub.url, "owner/sharded")
    assert again.returncode == 2 and "models/it: already there" in again.stderr and not hub.asked
    assert snapshot(Path("models/it")) == BERT


def test_model_in_shards(hub: Hub) -> None:
    Path("models/it").mkdir(parents=True)  # empty, as good as none
    assert fetch_model(hub.url, "owner/sharded").returncode == 0
    assert snapshot(Path("models/it")) == SHARDED


def test_broken_model_download_is_resumed(hub: Hub) -> None:
    for hub.broken in (f"{COMMIT}/model.safetensors", f"tree/{COMMIT}"):
        done = fetch_model(hub.url, "tiny")
        assert done.returncode == 2 and "error: tiny: cannot be downloaded from" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not Path("models/it").exists()
        notes = Path(f"models/it.{COMMIT[:12]}.part/.cache")  # without them, the library may take what it has for all
        shutil.rmtree(notes)
        notes.mkdir()
    hub.broken = ""
    assert fetch_model(hub.url, "tiny").returncode == 0
    assert snapshot(Path("models/it")) == BERT and os.listdir("models") == ["it"]


@pytest.mark.parametrize("name, more, says", [
    ("owner/none", [], "owner/none: no such model or --revision at"),
    ("tiny", ["--revision=v9"], "tiny: no such model or --revision at"),
    ("a/b/c", [], "a/b/c: no such model or --revision at"),
    ("owner/gated", [], "owner/gated: gated; accept its terms at http://127.0.0.1:"),
    ("owner/pickled", [], "owner/pickled: no safetensors weights, and pickled ones (.bin) could run code"),
    ("owner/unknown", [], "owner/unknown: no config.json"),
])
def test_model_that_cannot_be_had(hub: Hub, name: str, more: list[str], says: str) -> None:
    hub.gated = "gated"
    done = fetch_model(hub.url, name, *more)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {says}"), done.stderr
    assert done.stderr.count("\n") == 1 and not Path("models").exists()


def test_model_without_a_network() -> None:
    done = fetch_model("http://127.0.0.1:9", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not Path("models").exists()
    assert "tiny: cannot be downloaded from http://127.0.0.1:9 (" in done.stderr and "https_proxy" in done.stderr


def test_model_that_is_a_folder() -> None:
    Path("mine").mkdir()
    assert "give it as --bert_model_name_or_path" in refusal(
        download_hf.main, "--model_name_or_path=mine", "--output_dir=it")
