"""Every way of int8 of each model, as evaluate.py runs them on raw text, and how many threads are worth having."""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import interleave, is_trained, medians, run_stage
from benchmarks.inference import Case
from util import load_checkpoint

logger = logging.getLogger(__name__)

THREADS = (1, 2, 4)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracy, milliseconds a sentence and megabytes by model and way, each in a process of its own."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    sweep: dict[str, dict[str, float]] = {}
    for name in args.inference_models:
        case = Case(name, args, folder / name)
        found[name] = answer_each_way(case)
        for form, path in (("ONNX", case.onnx), ("ONNX int8", case.int8)):
            sides = {str(threads): partial(median_ms, case, path, threads) for threads in THREADS}
            sweep[f"{name}, {form}"] = medians(interleave(sides, args.sizes.rounds))
    notes = [f"data set {Path(args.data_dir).name}, test sentences one at a time, tokenization included, medians; "
             f"{args.num_threads} threads but in the sweep; quantization-aware training: one more epoch of the fp32 "
             "model; MB: the file that answers, of DiffQ what its bits come to"]
    return {"notes": notes, "ways": found, "threads": sweep}


def answer_each_way(case: Case) -> dict[str, dict[str, float]]:
    """Figures by way, the fp32 model first; those that need training are trained an epoch more, beside it."""
    qat, diffq = (case.model.with_name(f"{case.name}-{way}.pt") for way in ("qat", "diffq"))
    for flag, path in (("--enable_qat", qat), ("--enable_diffq", diffq)):
        if not is_trained(path):
            case.train(path, "--rdrop=0", "--epoch=1", flag, f"--restore_path={case.model}")
    by_scales = case.folder / "model.qat.onnx"
    run_stage("evaluate.py", f"--model_path={qat}", f"--data_dir={case.data}", "--convert_onnx", "--quantize_onnx",
              f"--onnx_path={case.folder / 'model.qat.fp32.onnx'}", f"--quantized_onnx_path={by_scales}",
              f"--num_threads={case.args.num_threads}")
    ways = {"PyTorch": (case.model, []), "dynamic int8": (case.model, ["--enable_dqm"]), "ONNX": (case.onnx, []),
            "ONNX int8": (case.int8, []), "QAT": (qat, ["--enable_qat"]),
            "QAT, compiled graph": (qat, ["--enable_qat_fx"]), "QAT, ONNX int8": (by_scales, []),
            "DiffQ": (diffq, ["--enable_diffq"])}
    found = {}
    for way, (path, flags) in tqdm(ways.items(), unit="way", desc=case.name, disable=None):
        got = evaluate(case, path, case.args.num_threads, *flags)
        size = path.stat().st_size / 1e6
        if way == "DiffQ":
            size = (load_checkpoint(path).quantization or {})["size_mb"] * 2**20 / 1e6
        found[way] = {"accuracy": got["accuracy"], "median_ms": got["timing"]["median_ms"], "mb": size,
                      "changed": got.get("changed")}
        logger.info("[%s, %s] %s", case.name, way, found[way])
    return found


def median_ms(case: Case, path: Path, threads: int) -> float:
    """Median milliseconds a sentence of a file."""
    return evaluate(case, path, threads)["timing"]["median_ms"]


def evaluate(case: Case, path: Path, threads: int, *flags: str) -> dict[str, Any]:
    """What evaluate.py writes of a file's answers to raw text."""
    model = ["--enable_ort", f"--onnx_path={path}"] if path.suffix == ".onnx" else [f"--model_path={path}"]
    run_stage("evaluate.py", *model, f"--data_dir={case.data}", "--enable_inference", f"--num_threads={threads}",
              f"--num_examples={case.args.sizes.sentences}", *flags)
    return json.loads(Path(f"{path}.test.json").read_text(encoding="utf-8"))
