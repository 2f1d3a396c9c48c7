"""From the teacher to the smallest student: accuracy, size and milliseconds, all answering in turns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.accuracy import kept_model
from benchmarks.inference import Answer, Case, summarize, time_answers
from benchmarks.recipes import BY_ONE, TAUGHT, TEACHER
from sentence_classifier.errors import InputError

FORMS = ("PyTorch", "ONNX", "ONNX int8")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each model of --checkpoints that was trained on --data_dir: the teacher first, then its students."""
    source = Path(args.data_dir)
    models = {TEACHER: kept_model(args.checkpoints, source.name, TEACHER)}
    for name in (name for name, by in TAUGHT.items() if by == BY_ONE):  # the others have more teachers
        try:
            models[name] = kept_model(args.checkpoints, source.name, name)
        except InputError:
            continue  # not trained: not measured
    sides: dict[tuple[str, str], Answer] = {}
    counts: dict[tuple[str, str], float] = {}
    megabytes: dict[tuple[str, str], float] = {}
    for name, model in models.items():
        case = Case(name, args, source, folder / name, model)
        case.prepare()
        own = {form: answer for form, answer in case.sides().items() if form in FORMS}
        right = case.accuracies(own)
        for form, path in zip(FORMS, (model, case.onnx, case.int8), strict=True):
            side = name, form
            sides[side], counts[side], megabytes[side] = own[form], right[form], path.stat().st_size / 1e6
    rows = summarize(time_answers(sides, case.sentences, 1, source.name), counts)  # many sentences: one round will do
    return {"notes": [f"data set {source.name}, test sentences one at a time on {args.num_threads} threads, medians"],
            "points": [{"model": side[0], "form": side[1], **row, "mb": megabytes[side]} for side, row in rows.items()],
            "threads": args.num_threads}
