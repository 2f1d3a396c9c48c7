"""Answering one sentence at a time: PyTorch, ONNX Runtime, int8, against a plain session; cold starts and batches."""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from benchmarks.harness import SPLITS, encode, figure, interleave, is_trained, medians, rate_figure, run_stage
from benchmarks.recipes import CONFIGS, RECIPES
from benchmarks.runs import encoding_flags
from cli.config import encoded_kind, load_config
from compression.quantization import quantize
from dataset import pad
from model import load_classifier
from sentence_classifier.classifier import BUSY_WAIT, load
from sentence_classifier.classifier import pad as pad_arrays
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import SUBWORDS, make_tokenizer
from text.lines import TsvReader
from util import ROOT, load_checkpoint

logger = logging.getLogger(__name__)

# What is measured, and how many times as fast as the plain session each model's answers are to be.
AIMS: dict[str, dict[str, str]] = {
    "minilm-cls": {"ONNX": ">= 1.3", "ONNX int8": ">= 5.5"},
    "cnn": {"best": ">= 4"},
    "densenet-cnn": {"best": ">= 2"},
    "densenet-dsa": {"best": ">= 2"},
}
PLAIN = "plain ONNX"
COLD_LIMITS = {"cnn": ("ONNX", 1.0), "minilm-cls": ("ONNX int8", 1.5)}  # seconds from the shell to the answer
Answer = Callable[[str], int]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds a sentence of each model in each form, tokenization included; cold starts; sentences a second."""
    rounds = args.sizes.rounds
    source = Path(args.data_dir)
    notes = [f"data set {source.name}, test sentences one at a time on {args.num_threads} threads, medians; plain "
             "ONNX: torch.onnx.export with dynamic sizes, in a session with the default options"]
    figures: list[dict[str, Any]] = []
    points, cold, batches = [], {}, {}
    for name in args.inference_models:
        case = Case(name, args, source, folder / name)
        case.prepare()
        sides = case.sides()
        counts = case.accuracies(sides)  # warms up, too
        rows = summarize(time_answers(sides, case.sentences, rounds, name), counts)
        points += [{"model": name, "form": side, **row} for side, row in rows.items()]
        figures += ratios(name, rows)
        batches[name] = case.batches(rounds)
        if name in COLD_LIMITS:
            cold[name] = case.cold_starts(rounds)
    for name, seconds in cold.items():
        form, limit = COLD_LIMITS[name]
        figures.append(figure(f"{name}, {form}, cold start : {limit:g} s", seconds[form] / limit, "<= 1",
                              f"{seconds[form]:.2f} s, by PyTorch {seconds['PyTorch']:.2f} s"))
    for name, rates in batches.items():
        figures += [rate_figure(f"{name}, ", rates, side, "ONNX, one at a time") for side in list(rates)[1:]]
    return {"notes": notes, "figures": figures, "points": points, "cold_seconds": cold, "sentences_a_second": batches,
            "threads": args.num_threads}


def summarize(times: dict[str, list[float]], counts: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds a sentence and accuracy by form."""
    return {side: {"median_ms": statistics.median(values), "mean_ms": statistics.mean(values),
                   "accuracy": counts[side]} for side, values in times.items()}


def ratios(name: str, rows: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """How many times as fast as the plain session each form is."""
    plain = rows[PLAIN]
    shown = {side: side for side in rows if side != PLAIN}
    if "best" in AIMS[name]:
        best = min(shown, key=lambda side: rows[side]["median_ms"])
        shown[f"the best of these, {best}"] = best
    return [figure(f"{name}, {PLAIN} : {words}", plain["median_ms"] / rows[side]["median_ms"],
                   AIMS[name].get(words if words == side else "best", ""),
                   f"{plain['median_ms']:.3f} : {rows[side]['median_ms']:.3f} ms; by means "
                   f"{plain['mean_ms'] / rows[side]['mean_ms']:.2f}; accuracy "
                   f"{100 * plain['accuracy']:.2f} : {100 * rows[side]['accuracy']:.2f} %")
            for words, side in shown.items()]


class Case:
    """One model: trained if need be, exported, and measured in each form.

    Args:
        name: as the accuracy table has it.
        source: the data set's raw text.
        folder: to work in.
        model: its checkpoint; None: in --checkpoints, or to be trained.
    """

    def __init__(self, name: str, args: argparse.Namespace, source: Path, folder: Path,
                 model: Path | None = None) -> None:
        self.name, self.args, self.source = name, args, source
        self.folder, self.data = folder, folder / "data"
        self.model = model or Path(args.checkpoints or folder) / f"{name}.pt"
        self.onnx, self.int8 = folder / "model.onnx", folder / "model.int8.onnx"
        examples = list(TsvReader(source / SPLITS[2]))[: args.sizes.sentences]
        self.sentences = [example.sentence for example in examples]
        self.written = [example.label for example in examples]
        self.targets: list[int] = []

    def prepare(self) -> None:
        """Encode, train where --checkpoints has no model yet, export."""
        config = CONFIGS[self.name]
        encoding = encoding_flags(self.args, self.source.name, self.name)
        encode(self.source, self.data, config, *encoding)
        common = (f"--config={config}", f"--data_dir={self.data}")
        if is_trained(self.model):
            logger.info("[%s: trained before, %s]", self.name, self.model)
        else:
            self.train(self.model, "--epoch=2")
        run_stage("evaluate.py", *common, f"--model_path={self.model}", "--convert_onnx", "--quantize_onnx",
                  f"--onnx_path={self.onnx}", f"--quantized_onnx_path={self.int8}",
                  f"--num_threads={self.args.num_threads}")

    def train(self, path: Path, *flags: str) -> None:
        """Train a model to `path` by Snips' recipe, which the flags change; go on with one that was cut off."""
        config = CONFIGS[self.name]
        pretrained = [f"--bert_model_name_or_path={self.args.bert_model_name_or_path}"]
        run_stage("train.py", f"--config={config}", f"--data_dir={self.data}", *RECIPES["snips", self.name][0].split(),
                  *(pretrained if encoded_kind(load_config(config)) == SUBWORDS else []), "--seed=1", *flags,
                  *self.args.sizes.train_flags.split(), "--resume", f"--save_path={path}",
                  f"--log_dir={self.folder / 'runs'}", f"--log_path={self.folder / 'train.log'}",
                  f"--bert_output_dir={self.folder / path.stem}")

    def sides(self) -> dict[str, Answer]:
        """A function from a sentence to its class id for each form."""
        torch.set_num_threads(self.args.num_threads)
        checkpoint = load_checkpoint(self.model)
        tokenizer = make_tokenizer(checkpoint.run.vocabulary, checkpoint.run.encoding)
        model = load_classifier(checkpoint, [str(self.data)]).eval()
        plain = plain_session(model, self.folder / "plain.onnx", self.args.num_threads)
        dynamic = quantize(load_classifier(checkpoint, [str(self.data)]).eval(), "dqm", checkpoint, 1)

        def by_torch(module: Any) -> Answer:
            def answer(sentence: str) -> int:
                with torch.inference_mode():
                    batch = pad([np.asarray(tokenizer(sentence))])
                    return int(module(batch.input_ids, batch.attention_mask).argmax())

            return answer

        def by_plain(sentence: str) -> int:
            ids = np.asarray(tokenizer(sentence), dtype=np.int64)[None]
            return int(plain.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids, dtype=bool)})[0].argmax())

        def by_onnx(path: Path) -> Answer:
            classifier = load(path, self.args.num_threads)
            places = {label: place for place, label in enumerate(classifier.labels.names)}
            return lambda sentence: places[classifier.predict(sentence).label]

        self.targets = [checkpoint.run.labels.names.index(label) for label in self.written]
        return {PLAIN: by_plain, "PyTorch": by_torch(model), "PyTorch dynamic int8": by_torch(dynamic),
                "ONNX": by_onnx(self.onnx), "ONNX int8": by_onnx(self.int8)}

    def accuracies(self, sides: dict[str, Answer]) -> dict[str, float]:
        """The share of sentences that each side gets right."""
        return {side: sum(answer(s) == t for s, t in zip(self.sentences, self.targets, strict=True)) / len(self.targets)
                for side, answer in sides.items()}

    def batches(self, rounds: int) -> dict[str, float]:
        """Sentences a second in batches of 64 of like length, beside one at a time and beside OpenVINO's."""
        exact, int8 = load(self.onnx, self.args.num_threads), load(self.int8, self.args.num_threads)
        runs: dict[str, Callable[[], Any]] = {
            "ONNX, one at a time": lambda: [exact.predict(sentence) for sentence in self.sentences],
            "ONNX, batches of 64": lambda: exact.predict(self.sentences, batch_size=64),
            "ONNX int8, batches of 64": lambda: int8.predict(self.sentences, batch_size=64)}
        if other := openvino_batches(self.folder / "plain.onnx", exact.tokenizer, self.args.num_threads):
            runs["OpenVINO on the plain export, one at a time"] = partial(other, self.sentences, 1)
            runs["OpenVINO on the plain export, batches of 64"] = partial(other, self.sentences, 64)

        def rate(run: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            run()
            return len(self.sentences) / (time.perf_counter() - begin)

        return medians(interleave({side: partial(rate, run) for side, run in runs.items()}, rounds, warm_up=True))

    def cold_starts(self, rounds: int) -> dict[str, float]:
        """Seconds from the shell to the answer to one sentence: the whole process."""
        onnx = ["--enable_ort", "--enable_inference", f"--num_threads={self.args.num_threads}"]
        ways = {"PyTorch": [f"--model_path={self.model}", f"--data_dir={self.data}"],
                "ONNX": [*onnx, f"--onnx_path={self.onnx}"],
                "ONNX int8": [*onnx, "--quantize_onnx", f"--quantized_onnx_path={self.int8}"]}

        def start(flags: list[str]) -> float:
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--input_path=-", *flags], text=True,
                                  input="play some jazz\n", stdout=subprocess.PIPE)
            if done.returncode or '"label"' not in done.stdout:
                raise InputError(f"evaluate.py ended with exit status {done.returncode}; its message stands above.")
            return time.perf_counter() - begin

        sides = {way: partial(start, flags) for way, flags in ways.items()}
        return medians(interleave(sides, rounds, warm_up=True))


def time_answers(sides: dict[str, Answer], sentences: list[str], rounds: int, shown: str) -> dict[str, list[float]]:
    """Milliseconds of each sentence by each side, in turns of fifty sentences.

    A turn begins when the threads of the side before, which wait busily for a while, have gone to sleep.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    with tqdm(total=rounds * len(sentences), unit="sentence", desc=shown, disable=None) as bar:
        for _ in range(rounds):
            for start in range(0, len(sentences), 50):
                turn = sentences[start : start + 50]
                for side, answer in sides.items():
                    time.sleep(BUSY_WAIT)
                    for sentence in turn[:5]:  # the others have used the cache
                        answer(sentence)
                    for sentence in turn:
                        begin = time.perf_counter()
                        answer(sentence)
                        times[side].append(1000 * (time.perf_counter() - begin))
                bar.update(len(turn))
    return times


def plain_session(model: Any, path: Path, num_threads: int) -> Any:
    """What somebody would do by hand: torch's exporter with dynamic sizes, a session with the default options."""
    ids = torch.arange(1, 22).view(3, 7)
    mask = torch.arange(7) < torch.tensor([[7], [5], [3]])
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        torch.onnx.export(model, (ids * mask, mask), str(path), dynamo=True, verbose=False, external_data=False,
                          input_names=["input_ids", "attention_mask"], output_names=["logits"],
                          dynamic_shapes=(dynamic, dynamic))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino_batches(path: Path, tokenizer: Any, num_threads: int) -> Callable[[list[str], int], None] | None:
    """A function that classifies sentences in batches of like length with OpenVINO, None where it is not installed."""
    try:
        import openvino
    except ImportError:
        logger.warning("[OpenVINO is not installed: pip install openvino==2026.4.1 to measure it, too]")
        return None
    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": num_threads,
                                                     "PERFORMANCE_HINT": "LATENCY"})

    def run(sentences: list[str], size: int) -> None:
        rows = [row for row, _ in tokenizer.encode_batch(sentences)]
        order = np.argsort([-len(row) for row in rows], kind="stable")
        for start in range(0, len(rows), size):
            ids, mask = pad_arrays([rows[i] for i in order[start : start + size]])
            compiled({"input_ids": ids, "attention_mask": mask})

    return run
