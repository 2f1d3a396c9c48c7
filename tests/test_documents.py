"""The documents are current: the tables between marks are what results/ gives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from benchmarks import tables


def documents() -> list[str]:
    """The Markdown files of the repository."""
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split() or [path.name for path in ROOT.glob("*.md")]


@pytest.mark.parametrize("name", documents())
def test_tables_are_current(name: str) -> None:
    path = Path(ROOT, name)
    text = path.read_text(encoding="utf-8")
    assert tables.with_tables(path, text) == text, "run python benchmark.py table"
