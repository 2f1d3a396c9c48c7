"""The stages, run as a user runs them: each in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from sentence_classifier.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train.txt", "valid.txt", "test.txt")


def run_stage(script: str, *flags: str) -> None:
    """Run one of the stages in a process of its own. Its log and progress bar show; its report does not."""
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(f"{script} ended with exit status {done.returncode}; its message stands above.")


def is_trained(model: Path) -> bool:
    """Whether a training that writes to `model` has come to its end, not merely to its first checkpoint."""
    return Path(f"{model}.train.json").exists()


def copy_splits(source: Path, folder: Path) -> None:
    """Copy a data set's raw text into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        if not (source / name).is_file():
            raise InputError(f"{source / name}: no such file; fetch data sets with python etc/download_datasets.py.")
        shutil.copyfile(source / name, folder / name)


def encode(source: Path, folder: Path, config: str, *flags: str) -> None:
    """Copy a data set into `folder` and encode it there."""
    copy_splits(source, folder)
    run_stage("preprocess.py", f"--config={config}", f"--data_dir={folder}", *flags)
