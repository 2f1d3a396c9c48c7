"""What `pip install .` installs: the runtime alone, which needs nothing else of this repository."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import Place
from helpers import ROOT

import evaluate

NEEDED = {"numpy", "onnxruntime", "tokenizers"}
SOURCES = sorted((ROOT / "sentence_classifier").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_imports_nothing_of_ours(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom))
    assert {name.split(".")[0] for name in named} <= {*sys.stdlib_module_names, *NEEDED, "pyarrow",  # for parquet
                                                      "sentence_classifier"}


def test_the_wheel(trained: Place, tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "sentence_classifier", source / "sentence_classifier",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "evaluate.py", "util.py"):
        shutil.copy(ROOT / name, source)
    (source / "text").mkdir()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(source / done.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"sentence_classifier"}
    info = next(site.glob("*.dist-info"))
    metadata = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    assert {requirement.split(">=")[0] for requirement in metadata.get_all("Requires-Dist") or ()} == NEEDED
    assert "sentence-classifier = sentence_classifier.command_line:main" in (info / "entry_points.txt").read_text()
    assert all(version(name) for name in NEEDED)

    onnx = tmp_path / "model.onnx"
    evaluate.main(trained.evaluate_flags("--convert_onnx", f"--onnx_path={onnx}"))
    program = ("import sys; sys.path.insert(0, sys.argv[1]); import sentence_classifier as s;"
               "print(s.__file__); print(s.load(sys.argv[2]).predict('play some jazz').label);"
               "print([name for name in ('torch', 'cli', 'text', 'util') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-I", "-c", program, site, onnx], cwd=tmp_path, capture_output=True,
                          text=True, check=True)
    place, label, ours = done.stdout.splitlines()
    assert place == str(site / "sentence_classifier/__init__.py") and ours == "[]"
    answered = subprocess.run([sys.executable, "-m", "sentence_classifier", onnx], cwd=site, capture_output=True,
                              input="play some jazz\n", text=True, check=True)
    assert json.loads(answered.stdout)["label"] == label
