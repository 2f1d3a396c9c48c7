"""A trained transformer on disk: its folder appears, and is replaced, whole or not at all."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from sentence_classifier.errors import InputError
from util import IDENTITY, RUN_ID, keep_previous, refuse_full_disk, saved_fact, sweep, sync_folder

logger = logging.getLogger(__name__)


def check_output_folder(folder: str, data_dir: str) -> None:
    """Refuse, before training, a place where save_pretrained could not write or would move aside what is no model."""
    target = Path(folder).absolute()
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
    sweep(target.parent, f".{target.name}-*")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as place:
        made, old = Path(place) / "model", Path(place) / "old"
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
        if target.exists():
            if saved_fact(target, IDENTITY) == identity or not any(target.iterdir()):
                os.rename(target, old)
            else:
                logger.warning("[%s came from elsewhere and is kept as %s]", target, keep_previous(target))
        os.rename(made, target)
    sync_folder(target.parent)
