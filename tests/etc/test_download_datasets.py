"""Data sets of the hub, through a made-up `datasets` package; the plain ones are in test_download.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import download_datasets
import pytest
from helpers import ROOT, refusal


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


Tables = dict[tuple[str, str | None, str], Table]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    """What the `datasets` package knows, by data set, configuration and split."""
    known: Tables = {}

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Table:
        assert streaming and os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] == "0"
        if (path, name, split) not in known:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.")
        return known[path, name, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    return known


def dataset(capfd: pytest.CaptureFixture[str], name: str, *more: str) -> tuple[list[str], str]:
    """Run download_datasets.py: the lines on standard output, and standard error."""
    download_datasets.main([f"--dataset_name={name}", *more])
    out, err = capfd.readouterr()
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n"), err


@pytest.mark.parametrize("name, column, flags", [("amazon_us_reviews", "star_rating", []),
                                                 ("owner/mirror", "star_rating", []),
                                                 ("owner/amazon_us_reviews", "stars", ["--label_column=stars"])])
def test_amazon(tables: Tables, capfd: pytest.CaptureFixture[str], name: str, column: str,
                flags: list[str]) -> None:
    texts = [(5, "A <br />great\tfilm<BR>\r\n\u2028twice "), (1, "bad\0"), (3, "so so"), (5, " <br/> "), (1, None),
             ("1", "bad " * 200), (5, "x" * 600), (4, "fine"), (5.0, "y" * 300 + " " + "z" * 211)]
    rows = [{"review_headline": "no", column: stars, "review_body": text} for stars, text in texts]
    tables[name, "Video_v1_00", "train"] = Table(rows)
    lines, err = dataset(capfd, name, "--task_name=Video_v1_00", "--split=train", *flags)
    assert lines == ["A great film twice\tpositive", "bad\tnegative", " ".join(["bad"] * 128) + "\tnegative",
                     "x" * 512 + "\tpositive", "y" * 300 + " " + "z" * 211 + "\tpositive"]
    assert "rows: 5 written, 2 without a label that counts, 2 without a text" in err
    assert "the library's own words" in err and "9 rows" in err


def test_class_labels_by_name(tables: Tables, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": number, "sentence": f"s{number}", "label": label} for number, label in enumerate((1, 0, -1, None))]
    features = {"id": SimpleNamespace(), "label": SimpleNamespace(names=["not\tgood", "good"])}
    tables["glue", "sst2", "validation"] = Table(rows, features)
    assert dataset(capfd, "glue", "--task_name=sst2", "--split=validation")[0] == ["s0\tgood", "s1\tnot good"]


def test_columns_given(tables: Tables, capfd: pytest.CaptureFixture[str]) -> None:
    long = "word " * 200
    tables["it", None, "train"] = Table([{"text": "not this", "says": long, "label": 0, "kind": 3.5}])
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
def test_datasets_that_cannot_be_had(tables: Tables, name: str, flags: list[str], says: str) -> None:
    tables["broken", None, "train"] = Table([{"text": "a", "label": "b"}], breaks=True)
    tables["odd", None, "train"] = Table([{"says": "a", "label": None, "many": [1, 2]}])
    assert re.search(says, refusal(download_datasets.main, f"--dataset_name={name}", *flags))


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(download_datasets.main, "--dataset_name=imdb")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "etc").glob("*_*.py")) + ["split.py"])
def test_scripts_run_from_the_root_and_from_etc(script: str) -> None:
    for folder, path in ((ROOT, f"etc/{script}"), (ROOT / "etc", script)):
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
    parts = [Path(f"data.{name}").read_text(encoding="utf-8").splitlines() for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [14, 2, 4]
    assert set(sum(parts, [])) == {f"très bien {i}\t{'positive' if i % 5 else 'negative'}" for i in range(50)
                                   if i % 5 in (0, 4)}
