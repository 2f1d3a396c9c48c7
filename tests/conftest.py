"""Fixtures: each test runs in a folder of its own; tiny data, encoded data and a trained model are made once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, make_data, make_vectors, write_config
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, database=None, derandomize=True, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in tmp_path, so that runs/ and train.log land there, and with no accelerate state of another test."""
    monkeypatch.chdir(tmp_path)
    yield
    if "accelerate" in sys.modules:
        from training.distributed import reset_accelerate

        reset_accelerate(processes=True)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Make fsync cost nothing in this process; test_files.py sees that it is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """After `make test-matrix`: the table of all architectures that the matrix has figures of."""
    if "matrix" not in (config.option.markexpr or "") or "not matrix" in config.option.markexpr:
        return
    from helpers import code_hash

    rows = [json.loads(path.read_text()) for path in sorted((ROOT / ".matrix").glob(f"*-{code_hash()}.json"))]
    terminalreporter.write_line("\n| architecture | encoder | valid loss, first to best | test accuracy | "
                                "raw text | largest difference of a logit by padding |\n| --- | --- | --- | --- | --- "
                                "| --- |")
    for row in rows:
        terminalreporter.write_line(
            f"| {row['architecture']} | {row['encoder']} | {row['loss_before']:.2f} to {row['loss']:.2f} | "
            f"{row['accuracy']:.2f} | {row['raw_accuracy']:.2f} | {row['apart']:.0e} |")
    rows = [json.loads(path.read_text()) for path in sorted((ROOT / ".matrix/onnx").glob(f"*-{code_hash()}-*.json"))]
    terminalreporter.write_line(
        "\n| architecture | encoder | accuracy: PyTorch | ONNX | ONNX int8 | largest difference of a logit in ONNX | "
        "int8: share of the weights | predictions changed | how |\n|" + " --- |" * 9)
    for row in rows:
        accuracy, int8 = row["accuracy"], row["int8"]
        terminalreporter.write_line(
            f"| {row['architecture']} | {row['encoder']} | {accuracy['PyTorch']:.2f} | {accuracy['ONNX']:.2f} | "
            f"{accuracy['ONNX int8']:.2f} | {row['difference']:.0e} | {int8['share']:.1%} | {int8['changed']:.1%} | "
            f"{int8['setting']} |")
    rows = [json.loads(path.read_text()) for path in sorted((ROOT / ".matrix/int8").glob(f"*-{code_hash()}-*.json"))]
    if rows:
        ways = [row["way"] for row in rows[-1]["rows"]]
        terminalreporter.write_line("\ntest accuracy (predictions changed by int8, of 60) by way, from encoded text; "
                                    "raw text answers the same\n\n| model | encoder | " + " | ".join(ways) + " |\n| "
                                    + "--- | " * (2 + len(ways)))
    for row in rows:
        cells = ["no matrices" if "refused" in way else f"{way['pred']:.2f} ({way['pred_changed']})"
                 for way in row["rows"]]
        terminalreporter.write_line(f"| {row['architecture']} | {row['encoder']} | {' | '.join(cells)} |")


@dataclass
class Place:
    """A folder with `data`, word vectors, a config, and where a test wants them, encoded data and a model."""

    root: Path

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.root / "data"

    @property
    def vectors(self) -> Path:
        """The word vectors' file."""
        return self.root / "vectors.txt"

    @property
    def config(self) -> Path:
        """The config's file."""
        return self.root / "config.json"

    @property
    def model(self) -> Path:
        """The checkpoint's file."""
        return self.root / "model.pt"

    def preprocess_flags(self, *more: Any) -> list[str]:
        """Flags for preprocess.py."""
        return [f"--config={self.config}", f"--data_dir={self.data}", f"--embedding_path={self.vectors}",
                *map(str, more)]

    def train_flags(self, *more: Any) -> list[str]:
        """Flags for train.py: quick, on the CPU and in fp32."""
        return [f"--config={self.config}", f"--data_dir={self.data}", f"--save_path={self.model}", "--device=cpu",
                "--mixed_precision=no", "--batch_size=8", "--lr=1e-2", "--epoch=2", f"--log_dir={self.root / 'runs'}",
                f"--log_path={self.root / 'train.log'}", *map(str, more)]

    def evaluate_flags(self, *more: Any) -> list[str]:
        """Flags for evaluate.py."""
        return [f"--data_dir={self.data}", f"--model_path={self.model}", "--device=cpu", *map(str, more)]

    def copy(self, target: Path) -> Place:
        """The same in another folder."""
        shutil.copytree(self.root, target)
        return Place(target)


@pytest.fixture(scope="session")
def raw_once(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Raw text, vectors and a CNN's config. Not to be changed."""
    place = Place(tmp_path_factory.mktemp("raw"))
    make_data(place.data)
    make_vectors(place.vectors)
    write_config(place.config)
    return place


@pytest.fixture(scope="session")
def encoded_once(raw_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same with the encoded data. Not to be changed."""
    import preprocess

    place = raw_once.copy(tmp_path_factory.mktemp("encoded") / "place")
    preprocess.main(place.preprocess_flags())
    return place


@pytest.fixture(scope="session")
def trained_once(encoded_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same with a trained CNN. Not to be changed."""
    import train

    place = encoded_once.copy(tmp_path_factory.mktemp("trained") / "place")
    train.main(place.train_flags("--epoch=6"))
    return place


@pytest.fixture
def raw(raw_once: Place, tmp_path: Path) -> Place:
    """Raw text of the test's own."""
    return raw_once.copy(tmp_path / "raw")


@pytest.fixture
def encoded(encoded_once: Place, tmp_path: Path) -> Place:
    """Encoded data of the test's own."""
    return encoded_once.copy(tmp_path / "encoded")


@pytest.fixture
def trained(trained_once: Place, tmp_path: Path) -> Place:
    """A trained model of the test's own."""
    return trained_once.copy(tmp_path / "trained")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Case of a tiny BERT, hardly trained. Not to be changed."""
    from cases import train_case

    return train_case(tmp_path_factory.mktemp("bert") / "case", "BERT", "cls", 1)


@pytest.fixture(scope="session")
def tiny_bert_graph(tiny_bert: Any) -> tuple[Any, Any]:
    """The classifier and its ONNX graph as the exporter leaves it. Not to be changed."""
    from compression.onnx_export import export_graph
    from model import load_classifier
    from util import load_checkpoint

    model = load_classifier(load_checkpoint(tiny_bert.root / "model.pt"), []).eval()
    return model, export_graph(model)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data sets and vectors beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"the real data sets are not at {folder}")
    return folder
