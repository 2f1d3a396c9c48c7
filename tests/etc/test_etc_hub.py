"""etc/: models and data sets of the Hugging Face hub (a server on this machine, a made-up `datasets`); the split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, refusal, serving, snapshot
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "etc"))

import download_datasets
import download_hf
import split

from text.lines import TsvReader

# ----------------------------------------------------------------------------------------------------------- split


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def outputs(folder: Path, base: str = "data") -> dict[str, list[str]]:
    """The lines of the three outputs, without their ends."""
    texts = {name: (folder / f"{base}.{name}").read_bytes().decode() for name in ("train", "valid", "test")}
    assert all(text.endswith("\n") and "\r" not in text for text in texts.values())
    return {name: text.removesuffix("\n").split("\n") for name, text in texts.items()}


WORD = st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() == text != "" and not text.startswith("\ufeff"))


@given(lines=st.lists(st.tuples(WORD, WORD, st.sampled_from(["\n", "\r\n"])), min_size=3, max_size=60),
       last_end=st.booleans(), seed=st.integers(0, 1 << 40))
def test_split_deals_out_every_line_once(tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str, str]],
                                         last_end: bool, seed: int) -> None:
    folder = tmp_path_factory.mktemp("split")
    text = "".join(f"{sentence}\t{label}{end}" for sentence, label, end in lines)
    path = write(folder / "total.txt", text if last_end else text.removesuffix("\n").removesuffix("\r"))
    split.main([f"--data_path={path}", f"--base_path={folder / 'data'}", f"--seed={seed}"])
    parts = outputs(folder)
    assert (Counter(line for part in parts.values() for line in part)
            == Counter(f"{sentence}\t{label}" for sentence, label, _ in lines))
    split.main([f"--data_path={path}", f"--base_path={folder / 'again'}", f"--seed={seed}"])
    assert outputs(folder, "again") == parts


def test_split_shares_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "total.txt", "".join(f"sentence {number}\tlabel\n" for number in range(1003)))
    for base, seed in (("data", []), ("same", ["--seed=42"]), ("other", ["--seed=43"])):
        split.main([f"--data_path={path}", f"--base_path={base}", *seed])
    parts = outputs(tmp_path)
    assert {name: len(part) for name, part in parts.items()} == {"train": 703, "valid": 100, "test": 200}
    assert parts == outputs(tmp_path, "same") and parts != outputs(tmp_path, "other")
    order = [int(re.findall(r"\d+", line)[0]) for line in parts["train"]]
    assert order != sorted(order) and max(order[:100]) > 500  # shuffled, not merely cut


def test_split_into_a_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "total.txt", "one\tyes\ntwo \t no\r\nthree\tin part")
    split.main([f"--data_path={path}", "--output_dir=new"])
    assert {path.name for path in Path("new").iterdir()} == {"train.txt", "valid.txt", "test.txt"}
    read = [example[1:] for name in ("train", "valid", "test") for example in TsvReader(f"new/{name}.txt")]
    assert sorted(read) == [("one", "yes"), ("three", "in part"), ("two", "no")]
    assert not capsys.readouterr().out


def test_split_refuses_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "total.txt", "a\tx\nno label\nb\tx\n\nc\tx\n")
    assert "total.txt:2: no TAB" in refusal(split.main, f"--data_path={path}", "--base_path=data")
    assert list(tmp_path.iterdir()) == [path]
    split.main([f"--data_path={path}", "--base_path=data", "--skip_bad_lines"])
    assert sorted(sum(outputs(tmp_path).values(), [])) == ["a\tx", "b\tx", "c\tx"]
    assert "2 bad lines left out" in capsys.readouterr().err
    two = write(tmp_path / "two.txt", "a\tx\nb\tx\n")
    assert "2 usable lines are too few" in refusal(split.main, f"--data_path={two}", "--base_path=two")


def test_split_overwrites_only_when_told(tmp_path: Path) -> None:
    path = write(tmp_path / "total.txt", "a\tx\nb\tx\nc\tx\n")
    write(tmp_path / "data.test", "mine\n")
    before = snapshot(tmp_path)
    assert "data.test: already there" in refusal(split.main, f"--data_path={path}", "--base_path=data")
    assert snapshot(tmp_path) == before
    split.main([f"--data_path={path}", "--base_path=data", "--force"])
    assert sorted(sum(outputs(tmp_path).values(), [])) == ["a\tx", "b\tx", "c\tx"]
    path.rename(tmp_path / "train.txt")
    before = snapshot(tmp_path)
    assert "is the file to split" in refusal(split.main, "--data_path=train.txt", "--output_dir=.", "--force")
    assert snapshot(tmp_path) == before


# -------------------------------------------------------------------------------------------------- models of the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BERT = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "vocab.txt": b"[PAD]\n",
        "model.safetensors": bytes(1000)}


class Hub:
    """What the hub on this machine has, and what it was asked."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {
            "tiny": BERT | {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "onnx/config.json": b"other"},
            "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
            "owner/sharded": {"config.json": b"{}", "model.safetensors.index.json": b"{}",
                              "model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two",
                              "sentencepiece.bpe.model": b"pieces"},
            "owner/weightless": {"config.json": b"{}"},
            "owner/gated": {},
        }
        self.broken = ""  # a file that the hub fails to send
        self.gated_files = False  # anybody may see the list of files, but not load them
        self.asked: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{handler.command} {handler.path}")
        head: dict[str, Any] = {}
        status, content = 404, b""
        if info := re.fullmatch(r"/api/models/(.+)/revision/(.+?)(\?.*)?", handler.path):
            name, revision = info[1], info[2]
            if name not in self.models:
                head["X-Error-Code"] = "RepoNotFound"
            elif name == "owner/gated":
                status, head["X-Error-Code"] = 403, "GatedRepo"
            elif revision != "main":
                head["X-Error-Code"] = "RevisionNotFound"
            else:
                files = [{"rfilename": name, "size": len(data)} for name, data in self.models[name].items()]
                status, content = 200, json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()
        elif file := re.fullmatch(rf"/(.+)/resolve/{COMMIT}/(.+)", handler.path):
            status, content = 200, self.models[file[1]][file[2]]
            head = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if self.gated_files:
                status, content, head = 403, b"", {"X-Error-Code": "GatedRepo"}
            elif file[2] == self.broken and handler.command == "GET":
                status, content = 403, b""
        handler.send_response(status)
        for key, value in {**head, "Content-Length": len(content)}.items():
            handler.send_header(key, str(value))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
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


def fetched() -> dict[str, bytes | None]:
    return snapshot(Path("models/it"))


def test_model(hub: Hub) -> None:
    done = fetch_model(hub.url, "tiny")
    assert done.returncode == 0, done.stderr
    assert fetched() == BERT and os.listdir("models") == ["it"]
    assert "4 files" in done.stderr and "model.safetensors" in done.stderr and not done.stdout
    hub.asked.clear()
    again = fetch_model(hub.url, "owner/sharded")
    assert again.returncode == 2 and "models/it: already there" in again.stderr and not hub.asked
    assert fetched() == BERT


def test_model_in_shards(hub: Hub) -> None:
    Path("models/it").mkdir(parents=True)  # empty, as good as none
    assert fetch_model(hub.url, "owner/sharded").returncode == 0
    assert fetched() == hub.models["owner/sharded"]


def test_broken_model_download_is_gone_on_with(hub: Hub) -> None:
    hub.broken = "model.safetensors"
    done = fetch_model(hub.url, "tiny")
    assert done.returncode == 2 and "tiny: cannot be fetched from" in done.stderr and "Traceback" not in done.stderr
    assert not Path("models/it").exists()
    hub.broken = ""
    hub.asked.clear()
    assert fetch_model(hub.url, "tiny").returncode == 0
    assert fetched() == BERT and os.listdir("models") == ["it"]
    assert not any("config.json" in asked for asked in hub.asked)


@pytest.mark.parametrize("name, more, says", [
    ("owner/none", [], "owner/none: no such model at"),
    ("owner/gated", [], "owner/gated: gated; accept its terms at"),
    ("tiny", ["--revision=v9"], "tiny: no such --revision"),
    ("a/b/c", [], "a/b/c: not a model's name"),
    ("owner/pickled", [], "owner/pickled: no safetensors weights, only pytorch_model.bin, which could run code"),
    ("owner/weightless", [], "owner/weightless: no safetensors weights; take another"),
])
def test_model_that_cannot_be_had(hub: Hub, name: str, more: list[str], says: str) -> None:
    done = fetch_model(hub.url, name, *more)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {says}"), done.stderr
    assert done.stderr.count("\n") == 1 and not Path("models").exists()
    assert not any("resolve" in asked for asked in hub.asked)


def test_model_whose_files_are_gated(hub: Hub) -> None:
    hub.gated_files = True
    done = fetch_model(hub.url, "tiny")
    assert done.returncode == 2 and f"error: tiny: gated; accept its terms at {hub.url}/tiny" in done.stderr
    assert not Path("models/it").exists()


def test_model_without_a_network() -> None:
    pytest.importorskip("huggingface_hub")
    done = fetch_model("http://127.0.0.1:9", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not Path("models").exists()
    assert "tiny: cannot be fetched from http://127.0.0.1:9 (" in done.stderr and "https_proxy" in done.stderr


def test_model_that_is_a_folder() -> None:
    Path("mine").mkdir()
    assert "give it as --bert_model_name_or_path" in refusal(
        download_hf.main, "--model_name_or_path=mine", "--output_dir=it")


def test_choose_takes_no_file_out_of_a_folder() -> None:
    files = ["config.json", "model.safetensors", "../config.json", "sub/vocab.txt", "model.onnx", "modeling.py"]
    assert download_hf.choose(files, "it") == ["config.json", "model.safetensors"]


# ----------------------------------------------------------------------------------------------- data sets of the hub


class Table:
    """What load_dataset answers: rows, and their features where they are known."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any] | None = None,
                 breaks: bool = False) -> None:
        self.rows, self.features, self.breaks = rows, features, breaks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        print("the library's own words")
        yield from self.rows
        if self.breaks:
            raise ConnectionError("the line went dead\nand more")


class FakeDatasets(ModuleType):
    """The `datasets` package, as far as it is used."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.tables: dict[tuple[str, str | None, str], Table] = {}

    def load_dataset(self, path: str, name: str | None, *, split: str, streaming: bool) -> Table:
        assert streaming and os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] == "0"
        if (path, name, split) not in self.tables:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.")
        return self.tables[path, name, split]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    return fake


def dataset(capfd: pytest.CaptureFixture[str], name: str, *more: str) -> tuple[list[str], str]:
    """Run download_datasets.py: the lines on standard output, and standard error."""
    capfd.readouterr()
    download_datasets.main([f"--dataset_name={name}", *more])
    out, err = capfd.readouterr()
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n"), err


@pytest.mark.parametrize("name, column, flags", [("amazon_us_reviews", "star_rating", []),
                                                 ("owner/mirror", "star_rating", []),
                                                 ("owner/amazon_us_reviews", "stars", ["--label_column=stars"])])
def test_amazon(library: FakeDatasets, capfd: pytest.CaptureFixture[str], name: str, column: str,
                flags: list[str]) -> None:
    texts = [(5, "A <br />great\tfilm<BR>\r\n\u2028twice "), (1, "bad\0"), (3, "so so"), (5, " <br/> "), (1, None),
             ("1", "bad " * 200), (5, "x" * 600), (4, "fine"), (5.0, "y" * 300 + " " + "z" * 211)]
    rows = [{"review_headline": "no", column: stars, "review_body": text} for stars, text in texts]
    library.tables[name, "Video_v1_00", "train"] = Table(rows)
    lines, err = dataset(capfd, name, "--task_name=Video_v1_00", "--split=train", *flags)
    assert lines == ["A great film twice\tpositive", "bad\tnegative", " ".join(["bad"] * 128) + "\tnegative",
                     "x" * 512 + "\tpositive", "y" * 300 + " " + "z" * 211 + "\tpositive"]
    assert "rows: 5 written, 2 without a label that counts, 2 without a text" in err
    assert "the library's own words" in err and "9 rows" in err


def test_class_labels_by_name(library: FakeDatasets, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": number, "sentence": f"s{number}", "label": label} for number, label in enumerate((1, 0, -1, None))]
    features = {"id": SimpleNamespace(), "label": SimpleNamespace(names=["not\tgood", "good"])}
    library.tables["glue", "sst2", "validation"] = Table(rows, features)
    assert dataset(capfd, "glue", "--task_name=sst2", "--split=validation")[0] == ["s0\tgood", "s1\tnot good"]


def test_columns_given(library: FakeDatasets, capfd: pytest.CaptureFixture[str]) -> None:
    long = "word " * 200
    library.tables["it", None, "train"] = Table([{"text": "not this", "says": long, "label": 0, "kind": 3.5}])
    lines, _ = dataset(capfd, "it", "--text_column=says", "--label_column=kind")
    assert lines == [f"{long.strip()}\t3.5"]


@pytest.mark.parametrize("name, flags, says", [
    ("gone", [], r"gone: cannot be read to its end from the hub \(Dataset 'gone' doesn't exist on the Hub\); .*mirror "
                 r"\(--dataset_name OWNER/NAME --text_column .* by hand"),
    ("broken", [], r"\(the line went dead\); "),
    ("odd", [], "no column text or sentence or review_body; choose --text_column from says, label, many"),
    ("odd", ["--text_column=sais"], "no column sais; choose --text_column from says"),
    ("odd", ["--text_column=says", "--label_column=many"], "the column many holds a list"),
    ("odd", ["--text_column=says"], "odd: no usable row"),
    ("sst2", ["--task_name=x"], "--task_name has no meaning for sst2"),
    ("odd", ["--output_dir=x"], "--output_dir has no meaning for odd"),
])
def test_datasets_that_cannot_be_had(library: FakeDatasets, name: str, flags: list[str], says: str) -> None:
    library.tables["broken", None, "train"] = Table([{"text": "a", "label": "b"}], breaks=True)
    library.tables["odd", None, "train"] = Table([{"says": "a", "label": None, "many": [1, 2]}])
    assert re.search(says, refusal(download_datasets.main, f"--dataset_name={name}", *flags))


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(download_datasets.main, "--dataset_name=imdb")


# --------------------------------------------------------------------------------------------------------- scripts


def test_scripts_run_from_the_root_and_from_etc() -> None:
    for folder, path in ((ROOT, "etc/download_hf.py"), (ROOT / "etc", "download_hf.py"), (ROOT, "etc/split.py")):
        done = subprocess.run([sys.executable, path, "--help"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "--output_dir" in done.stdout and not done.stderr


def test_reviews_from_the_hub_to_three_files(tmp_path: Path) -> None:
    """The user's commands: downloaded inside etc/ and redirected, split inside the data folder."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "datasets.py").write_text(
        "from collections import UserList\n"
        "class Table(UserList): features = None\n"
        "def load_dataset(path, name, split, streaming):\n"
        "    print('Downloading')\n"
        "    return Table({'review_body': f'très bien {i}', 'star_rating': 1 + i % 5} for i in range(50))\n",
        encoding="utf-8")
    # A terminal that is not set to UTF-8 changes nothing.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "library"), "PYTHONIOENCODING": "latin-1"}
    with open("total.txt", "wb") as total:
        subprocess.run([sys.executable, "download_datasets.py", "--dataset_name=amazon_us_reviews",
                        "--task_name=Video_v1_00", "--split=train"], cwd=ROOT / "etc", env=environment, stdout=total,
                       stderr=subprocess.DEVNULL, check=True)
    subprocess.run([sys.executable, str(ROOT / "etc" / "split.py"), "--data_path=total.txt", "--base_path=data"],
                   env=environment, capture_output=True, check=True)
    parts = outputs(tmp_path)
    assert {name: len(part) for name, part in parts.items()} == {"train": 14, "valid": 2, "test": 4}
    assert set(sum(parts.values(), [])) == {f"très bien {i}\t{'positive' if i % 5 else 'negative'}"
                                            for i in range(50) if i % 5 in (0, 4)}
