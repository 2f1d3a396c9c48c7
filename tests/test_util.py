"""Checkpoints that are refused and kept, devices and precision."""

from __future__ import annotations

import pickle
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, Malicious, make_run_info, malicious_zip

import util
from cli.devices import choose_device, choose_precision
from sentence_classifier.errors import InputError
from util import CHECKPOINT_FORMAT, Checkpoint, load_checkpoint, peek_identity, save_checkpoint, versions


def saved(path: Path, identity: str = "a", number: float = 1.0) -> bytes:
    save_checkpoint(Checkpoint(run=make_run_info(identity=identity), model={"w": torch.full((3,), number)}, metrics={}),
                    path)
    return path.read_bytes()


def test_round_trip() -> None:
    saved(Path("model.pt"), number=2.5)
    assert torch.equal(load_checkpoint("model.pt").model["w"], torch.full((3,), 2.5))
    assert peek_identity("model.pt") == "a" and peek_identity("missing.pt") is None


def malicious_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious()))


def malicious_old_format(path: Path) -> None:
    torch.save({"format": CHECKPOINT_FORMAT, "model": Malicious()}, path, _use_new_zipfile_serialization=False)


def truncated(path: Path) -> None:
    path.write_bytes(saved(path)[:-40])


def other_version(path: Path) -> None:
    torch.save({"format": CHECKPOINT_FORMAT - 1, "run": make_run_info().to_json(), "model": {}, "metrics": {}}, path)


def no_dictionary(path: Path) -> None:
    torch.save([1, 2], path)


def text_file(path: Path) -> None:
    path.write_text("not a checkpoint")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [malicious_zip, malicious_pickle, malicious_old_format, truncated, other_version,
                                  no_dictionary, text_file, empty, Path.mkdir])
def test_files_that_are_no_checkpoint(make: Callable[[Path], None]) -> None:
    make(Path("model.pt"))
    with pytest.raises(InputError, match=r"^model\.pt: "):
        load_checkpoint("model.pt")
    assert peek_identity("model.pt") is None
    assert not Path("executed").exists()


def test_the_malicious_file_would_have_run_code() -> None:
    pickle.loads(pickle.dumps(Malicious()))
    assert Path("executed").exists()


def test_another_identity_is_kept_the_same_is_replaced() -> None:
    path = Path("model.pt")
    first = saved(path, "a", 1.0)
    second = saved(path, "b", 2.0)
    third = saved(path, "b", 3.0)
    assert Path("model.pt.previous").read_bytes() == first and path.read_bytes() == third != second
    saved(path, "c", 4.0)
    assert Path("model.pt.previous").read_bytes() == first
    assert Path("model.pt.previous.2").read_bytes() == third
    assert sorted(p.name for p in Path().iterdir()) == ["model.pt", "model.pt.previous", "model.pt.previous.2"]


def test_a_foreign_file_is_kept() -> None:
    Path("model.pt").write_text("somebody's notes")
    saved(Path("model.pt"))
    assert Path("model.pt.previous").read_text() == "somebody's notes"


def test_a_failed_save_leaves_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("model.pt")
    first = saved(path)

    def fails(value: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(InputError, match="No space"):
        saved(path, number=2.0)
    assert path.read_bytes() == first and len(list(Path().iterdir())) == 1


@pytest.mark.parametrize("name", ["cdua", "cuda:99", "xpu:77"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}"):
        choose_device(name)


def test_precision() -> None:
    cpu = choose_device("cpu")
    assert choose_precision("auto", cpu) in ("no", "bf16")
    assert choose_precision("bf16", cpu) == "bf16" and choose_precision("no", cpu) == "no"
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        choose_precision("fp16", cpu)


def test_versions() -> None:
    assert versions()["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------------------ memory

FAULTS = """
import resource, sys
import torch
from util import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):  # small pieces come to lie between the large ones at first
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to keep memory")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("no") / 2


@pytest.mark.parametrize("script", ["train.py", "fastformers.py"])
def test_training_scripts_keep_freed_memory(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(util, "keep_freed_memory", lambda: called.append(script))
    monkeypatch.setattr(sys, "argv", [script, "--config=no-such.json"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert called == [script]
