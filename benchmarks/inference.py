"""Answering one sentence at a time: PyTorch, ONNX Runtime, int8, against a plain session; cold starts and batches."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm

from benchmarks.accuracy import encoding_flags
from benchmarks.harness import SPLITS, encode, interleave, is_trained, launch, medians, run_stage
from benchmarks.recipes import CONFIGS, RECIPES
from compression.quantization import quantize
from dataset import pad
from model import load_classifier
from sentence_classifier.classifier import BUSY_WAIT, load
from sentence_classifier.tokenizers import make_tokenizer
from text.lines import Example, TsvReader
from util import ROOT, load_checkpoint

logger = logging.getLogger(__name__)

COLD = ("cnn", "minilm-cls")  # whose cold starts are measured
Answer = Callable[[str], str]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds a sentence of each model in each form, tokenization included; cold starts; sentences a second."""
    rounds = args.sizes.rounds
    notes = [f"data set {Path(args.data_dir).name}, test sentences one at a time on {args.num_threads} threads, "
             "medians; plain ONNX: torch.onnx.export with dynamic sizes, in a session with the default options"]
    points, cold, batches = [], {}, {}
    for name in args.inference_models:
        case = Case(name, args, folder / name)
        rows = time_answers(case.sides(), case.examples, rounds, name)
        points += [{"model": name, "form": form, **row} for form, row in rows.items()]
        batches[name] = case.batches(rounds)
        if name in COLD:
            cold[name] = case.cold_starts(rounds)
    return {"notes": notes, "points": points, "cold_seconds": cold, "sentences_a_second": batches,
            "threads": args.num_threads}


class Case:
    """One model of the accuracy table, exported, and measured in each form."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, model: Path | None = None) -> None:
        """Encode --data_dir; take the checkpoint `model`, or else the one in --checkpoints, or train one; export it."""
        self.name, self.args, self.folder, self.data = name, args, folder, folder / "data"
        self.model = model or Path(args.checkpoints or folder) / f"{name}.pt"
        self.onnx, self.int8 = folder / "model.onnx", folder / "model.int8.onnx"
        source = Path(args.data_dir)
        self.encoding = encoding_flags(args, source.name, name)
        encode(source, self.data, CONFIGS[name], *self.encoding)
        self.examples = list(TsvReader(self.data / SPLITS[2]))[: args.sizes.sentences or None]
        if is_trained(self.model):
            logger.info("[%s: trained before, %s]", name, self.model)
        else:
            self.train(self.model, "--epoch=2")
        run_stage("evaluate.py", f"--config={CONFIGS[name]}", f"--data_dir={self.data}", f"--model_path={self.model}",
                  "--convert_onnx", "--quantize_onnx", f"--onnx_path={self.onnx}",
                  f"--quantized_onnx_path={self.int8}", f"--num_threads={args.num_threads}")

    def train(self, path: Path, *flags: str) -> None:
        """Train a model to `path` by Snips' recipe, which the flags change; go on with one that was cut off."""
        pretrained = [flag for flag in self.encoding if flag.startswith("--bert_model_name_or_path")]
        run_stage("train.py", f"--config={CONFIGS[self.name]}", f"--data_dir={self.data}",
                  *RECIPES["snips", self.name][0].split(), *pretrained, "--seed=1", *flags,
                  *self.args.sizes.train_flags.split(), "--resume", f"--save_path={path}",
                  f"--log_dir={self.folder / 'runs'}", f"--log_path={self.folder / 'train.log'}",
                  f"--bert_output_dir={self.folder / path.stem}")

    def sides(self) -> dict[str, Answer]:
        """A function from a sentence to its label for each form."""
        torch.set_num_threads(self.args.num_threads)
        checkpoint = load_checkpoint(self.model)
        names = checkpoint.run.labels.names
        tokenizer = make_tokenizer(checkpoint.run.vocabulary, checkpoint.run.encoding)
        model = load_classifier(checkpoint, [str(self.data)]).eval()
        plain = plain_session(model, self.folder / "plain.onnx", self.args.num_threads)
        dynamic = quantize(load_classifier(checkpoint, [str(self.data)]).eval(), "dqm", checkpoint, 1)

        def by_torch(module: Any) -> Answer:
            def answer(sentence: str) -> str:
                with torch.inference_mode():
                    batch = pad([np.asarray(tokenizer(sentence))])
                    return names[int(module(batch.input_ids, batch.attention_mask).argmax())]

            return answer

        def by_plain(sentence: str) -> str:
            ids = np.asarray(tokenizer(sentence), dtype=np.int64)[None]
            logits = plain.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids, dtype=bool)})[0]
            return names[int(logits.argmax())]

        exact, int8 = load(self.onnx, self.args.num_threads), load(self.int8, self.args.num_threads)
        return {"plain ONNX": by_plain, "PyTorch": by_torch(model), "PyTorch dynamic int8": by_torch(dynamic),
                "ONNX": lambda sentence: exact.predict(sentence).label,
                "ONNX int8": lambda sentence: int8.predict(sentence).label}

    def batches(self, rounds: int) -> dict[str, float]:
        """Sentences a second in batches of 64 of like length, beside one at a time."""
        exact, int8 = load(self.onnx, self.args.num_threads), load(self.int8, self.args.num_threads)
        sentences = [example.sentence for example in self.examples]
        runs: dict[str, Callable[[], Any]] = {
            "ONNX, one at a time": lambda: [exact.predict(sentence) for sentence in sentences],
            "ONNX, batches of 64": lambda: exact.predict(sentences, batch_size=64),
            "ONNX int8, batches of 64": lambda: int8.predict(sentences, batch_size=64)}

        def rate(run: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            run()
            return len(sentences) / (time.perf_counter() - begin)

        return medians(interleave({side: partial(rate, run) for side, run in runs.items()}, rounds, warm_up=True))

    def cold_starts(self, rounds: int) -> dict[str, float]:
        """Seconds from the shell to the answer to one sentence: the whole process."""
        sentence = self.folder / "sentence.txt"
        sentence.write_text("play some jazz\n")
        onnx = ("--enable_ort", f"--num_threads={self.args.num_threads}")

        def start(*flags: str) -> float:
            return launch(str(ROOT / "evaluate.py"), f"--input_path={sentence}", *flags)[0]

        sides = {"PyTorch": partial(start, f"--model_path={self.model}", f"--data_dir={self.data}"),
                 "ONNX": partial(start, *onnx, f"--onnx_path={self.onnx}"),
                 "ONNX int8": partial(start, *onnx, f"--onnx_path={self.int8}")}
        return medians(interleave(sides, rounds, warm_up=True))


def time_answers(sides: dict[Any, Answer], examples: list[Example], rounds: int,
                 shown: str) -> dict[Any, dict[str, float]]:
    """Accuracy and milliseconds a sentence of each side, which answer in turns of fifty sentences.

    A turn begins when the threads of the side before, which wait busily for a while, have gone to sleep.
    """
    accuracies = {side: statistics.mean(answer(example.sentence) == example.label for example in examples)
                  for side, answer in sides.items()}  # warms up, too
    times: dict[Any, list[float]] = {side: [] for side in sides}
    with tqdm(total=rounds * len(examples), unit="sentence", desc=shown, disable=None) as bar:
        for _ in range(rounds):
            for start in range(0, len(examples), 50):
                turn = [example.sentence for example in examples[start : start + 50]]
                for side, answer in sides.items():
                    time.sleep(BUSY_WAIT)
                    for sentence in turn[:5]:  # the others have used the cache
                        answer(sentence)
                    for sentence in turn:
                        begin = time.perf_counter()
                        answer(sentence)
                        times[side].append(1000 * (time.perf_counter() - begin))
                bar.update(len(turn))
    return {side: {"median_ms": statistics.median(values), "mean_ms": statistics.mean(values),
                   "accuracy": accuracies[side]} for side, values in times.items()}


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
