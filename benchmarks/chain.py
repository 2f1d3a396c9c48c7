"""From the teacher to the smallest student: accuracy, size and milliseconds, all answering in turns."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from benchmarks.accuracy import kept_model
from benchmarks.inference import Answer, Case, time_answers
from benchmarks.recipes import TAUGHT, TEACHER
from sentence_classifier.errors import InputError


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each model of --checkpoints that was trained on --data_dir: the teacher first, then its students."""
    data_set = Path(args.data_dir).name
    models = {TEACHER: kept_model(args.checkpoints, data_set, TEACHER)}
    for name in (name for name, teaching in TAUGHT.items() if len(teaching["teachers"]) == 1):
        with contextlib.suppress(InputError):  # not trained: not measured
            models[name] = kept_model(args.checkpoints, data_set, name)
    sides: dict[tuple[str, str], Answer] = {}
    megabytes: dict[tuple[str, str], float] = {}
    for name, model in models.items():
        case = Case(name, args, folder / name, model)
        answers = case.sides()
        for form, path in (("PyTorch", model), ("ONNX", case.onnx), ("ONNX int8", case.int8)):
            sides[name, form], megabytes[name, form] = answers[form], path.stat().st_size / 1e6
    rows = time_answers(sides, case.examples, 1, data_set)  # many sentences: one round will do
    return {"notes": [f"data set {data_set}, test sentences one at a time on {args.num_threads} threads, medians"],
            "points": [{"model": side[0], "form": side[1], **row, "mb": megabytes[side]} for side, row in rows.items()],
            "threads": args.num_threads}
