"""From the teacher to the smallest student: accuracy, size and milliseconds, all answering in turns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness import figure
from benchmarks.inference import Answer, Case, summarize, time_answers
from benchmarks.recipes import BY_ONE, TAUGHT, TEACHER
from benchmarks.runs import kept_model
from sentence_classifier.errors import InputError

FORMS = ("PyTorch", "ONNX", "ONNX int8")
AIMS = {"minilm-3-pruned": ("minilm-3-augmented", ">= 1.5")}  # how many times as fast in ONNX as which other


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each model of --checkpoints that was trained on --data_dir: the teacher first, then its students."""
    source = Path(args.data_dir)
    sides: dict[str, Answer] = {}
    counts: dict[str, float] = {}
    megabytes: dict[str, float] = {}
    models = {TEACHER: kept_model(args.checkpoints, source.name, TEACHER)}
    for name in (name for name, by in TAUGHT.items() if by == BY_ONE):  # the others have more teachers
        try:
            models[name] = kept_model(args.checkpoints, source.name, name)
        except InputError:
            continue  # not trained: not measured
    for name, model in models.items():
        case = Case(name, args, source, folder / name, model)
        case.prepare()
        own = {form: answer for form, answer in case.sides().items() if form in FORMS}
        right = case.accuracies(own)
        for form, path in zip(FORMS, (model, case.onnx, case.int8), strict=True):
            side = f"{name}, {form}"
            sides[side], counts[side], megabytes[side] = own[form], right[form], path.stat().st_size / 1e6
    rows = summarize(time_answers(sides, case.sentences, 1, source.name), counts)  # many sentences: one round will do
    points = [{"model": side.rpartition(", ")[0], "form": side.rpartition(", ")[2], **row, "mb": megabytes[side]}
              for side, row in rows.items()]
    figures = [beside(f"{TEACHER}, ONNX", side, rows, megabytes) for side in rows]
    figures += [beside(f"{other}, ONNX", f"{name}, ONNX", rows, megabytes, aim) for name, (other, aim) in AIMS.items()
                if name in models and other in models]
    return {"notes": [f"data set {source.name}, test sentences one at a time on {args.num_threads} threads, medians"],
            "figures": figures, "points": points, "threads": args.num_threads}


def beside(one: str, other: str, rows: dict[str, dict[str, float]], megabytes: dict[str, float],
           aim: str = "") -> dict[str, Any]:
    """How many times as fast as `one` `other` is."""
    says = [f"{rows[side]['median_ms']:.3f} ms, {100 * rows[side]['accuracy']:.2f} %, {megabytes[side]:.1f} MB"
            for side in (one, other)]
    return figure(f"{one} : {other}", rows[one]["median_ms"] / rows[other]["median_ms"], aim, " : ".join(says))
