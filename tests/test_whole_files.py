"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sentence_classifier.errors import InputError
from util import atomic_write, previous_name, second_name, sha256, sweep


def test_atomic_write_leaves_what_stood_there_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as file:
        file.write("first\r\né")
    assert path.read_bytes() == "first\r\né".encode()
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "wb") as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == "first\r\né".encode()
        raise KeyboardInterrupt
    assert path.read_bytes() == "first\r\né".encode() and os.listdir(path.parent) == ["file.txt"]


def test_atomic_write_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    with atomic_write(tmp_path / "file.txt") as file:
        file.write("x")
    assert order == ["sync", "rename", "sync"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), atomic_write(tmp_path / "file" / "below"):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_the_earlier_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        def refuse(*names: object) -> None:
            raise PermissionError("no hard links here")
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "model.pt"
    for number in range(3):
        with atomic_write(path) as file:
            file.write(str(number))
        second_name(path, previous_name(path))
    kept = [(tmp_path / f"model.pt.previous{end}").read_text() for end in ("", ".2", ".3")]
    assert kept == ["0", "1", "2"]


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sweep_removes_what_is_a_day_old(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".a.1.tmp", tmp_path / ".a.2.tmp", tmp_path / ".b.1.tmp"
    for path in (old, new, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    sweep(tmp_path, ".a.*.tmp")
    assert not old.exists() and new.exists() and other.exists()
