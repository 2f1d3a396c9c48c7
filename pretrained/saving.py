"""A trained transformer on disk: its folder appears, and is replaced, whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from sentence_classifier.errors import InputError
from util import IDENTITY, RUN_ID, previous_name, refuse_full_disk, saved_fact, sweep, sync_folder

logger = logging.getLogger(__name__)


def check_output_folder(folder: str, data_dir: str) -> None:
    """Refuse, before training, a place where save_pretrained could not write or would move aside what is no model."""
    target = Path(folder).absolute()
    _recover(target)
    if target.exists() and not (target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir()))):
        raise InputError(f"--bert_output_dir={folder}: is there already and holds no model; name another folder.")
    if any(target == place or target in place.parents for place in (Path.cwd(), Path(data_dir).absolute())):
        raise InputError(f"--bert_output_dir={folder}: name a folder of its own.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"--bert_output_dir={folder}: {target.parent} cannot be written to.")


def save_pretrained(model: Any, tokenizer: Any, labels: list[str], run_id: str, identity: str, folder: str) -> None:
    """Write model and tokenizer in the hub's layout, whole or not at all.

    A folder that is there already and was not written by a run on the same config and data moves aside.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    sweep(target.parent, _hidden(target))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as place:
        made = Path(place) / "model"
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        setattr(model.config, RUN_ID, run_id)
        setattr(model.config, IDENTITY, identity)
        try:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            for file in made.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        except Exception as error:
            refuse_full_disk(target, error)
            raise
        if not target.exists():
            os.rename(made, target)
        else:
            if any(target.iterdir()) and saved_fact(target, IDENTITY) != identity:
                aside = previous_name(target)
                logger.warning("[%s came from elsewhere and is kept as %s]", target, aside)
                os.rename(made, aside)  # from there the two change places: neither is ever without a name
                made = aside
            _exchange(made, target, Path(place) / _OLD)
    sync_folder(target.parent)


_OLD = "old"  # in a hidden folder beside the target: the target itself, between two renames


def _exchange(one: Path, other: Path, between: Path) -> None:
    """Let two folders change places: at once where the system can, else by way of a third name."""
    try:
        _exchange_at_once(one, other)
    except OSError:
        os.rename(other, between)
        try:
            os.rename(one, other)
        finally:
            os.rename(between, one if other.exists() else other)


def _exchange_at_once(one: Path, other: Path) -> None:
    """Linux's renameat2 with RENAME_EXCHANGE; OSError if the system or its file system has no such thing."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError("no renameat2")
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange):
        raise OSError(ctypes.get_errno(), "renameat2")


def _recover(target: Path) -> None:
    """Give a folder its name back that a killed process took from it between two renames."""
    for old in target.parent.glob(f"{_hidden(target)}/{_OLD}"):
        os.rename(old, previous_name(target) if target.exists() else target)


def _hidden(target: Path) -> str:
    return f".{glob.escape(target.name)}-*"
