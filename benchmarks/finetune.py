"""Fine-tuning: bucketed, in reduced precision, against fp32 padded to n_ctx and against transformers' own Trainer."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import harness
from benchmarks.speed import training_rate
from cli.devices import choose_device, choose_precision
from dataset import EncodedData
from model import Classifier, TransformerEmbedding, build_model
from pretrained.checks import classification_token
from pretrained.loading import load_pretrained
from sentence_classifier.errors import InputError
from text.lines import TsvReader
from training.speedups import speed_up_training
from util import ROOT, keep_freed_memory

CONFIG = ROOT / "configs/config-bert-cls.json"
BATCH_SIZE = 64


@dataclass(frozen=True)
class Setup:
    """What is fine-tuned: a pretrained model, flags and config as train.py resolved them, encoded data."""

    name: str
    flags: dict[str, Any]
    config: dict[str, Any]
    data: Path
    device: str
    precision: str
    sizes: harness.Sizes

    def classifier(self) -> Classifier:
        """An untrained one."""
        data, transformer = EncodedData(self.data), load_pretrained(self.name)
        classify_by = classification_token(transformer, data.encoding.leading_special)
        return build_model(self.config, len(data.labels), TransformerEmbedding(transformer, classify_by))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second of --bert_model_name_or_path on --data_dir, and the memory that it takes."""
    sizes: harness.Sizes = args.sizes
    source, flags = prepare(args, folder)
    steps = sizes.warm_up_steps + sizes.padded_steps
    _, peak, _ = harness.launch(str(ROOT / "train.py"), *flags, f"--max_train_steps={steps}")
    resolved = json.loads((folder / "model.pt.train.json").read_text())
    device = choose_device(resolved["flags"]["device"])
    precision = choose_precision("auto", device)
    data = EncodedData(folder / "data/train.txt.fs")
    setup = Setup(args.bert_model_name_or_path, resolved["flags"], resolved["config"], data.path, device.type,
                  precision, sizes)
    base, ours, theirs = "fp32, padded to n_ctx", f"{precision}, bucketed", f"transformers' Trainer, {precision}"
    rates = harness.interleave({base: partial(alone, plain_rate, setup), ours: partial(alone, our_rate, setup),
                                theirs: partial(alone, trainer_rate, setup, folder)}, sizes.rounds)
    middle = harness.medians(rates)
    notes = [f"{Path(setup.name).name}, {CONFIG.name}, data set {source.name}: {len(data):,} sentences of "
             f"{data.lengths.mean():.1f} tokens, n_ctx {setup.config['n_ctx']}, batches of {BATCH_SIZE}"]
    return {"notes": notes, "device": device.type, "sentences_a_second": rates, "peak_mb": peak, "figures": [
        harness.rate_figure("fine-tuning, ", middle, ours, base),
        harness.rate_figure("fine-tuning, ", middle, ours, theirs),
        harness.figure("peak memory of fine-tuning : 2,000 MB", peak / 2000, f"{peak:,.0f} MB")]}


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """Encode --data_dir in FOLDER/data. Returns the data set, and train.py's flags that train FOLDER/model.pt on it."""
    source = harness.find_data(args)
    data, pretrained = folder / "data", f"--bert_model_name_or_path={args.bert_model_name_or_path}"
    harness.encode(source, data, str(CONFIG), pretrained)
    return source, [f"--config={CONFIG}", f"--data_dir={data}", pretrained, "--lr=1e-4",
                    f"--batch_size={BATCH_SIZE}", *harness.output_flags(folder)]


def alone(measure: Callable[..., Any], *args: Any) -> Any:
    """A measurement in a process of its own, which another one's settings do not reach."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def our_rate(setup: Setup) -> float:
    """Sentences a second as train.py trains."""
    keep_freed_memory()

    def make_model() -> Classifier:
        model = setup.classifier()
        speed_up_training(model.embedding.transformer, torch.device(setup.device), EncodedData(setup.data).token_ids)
        return model

    return training_rate(make_model, setup.flags, setup.data, setup.precision, 0, setup.sizes)


def plain_rate(setup: Setup) -> float:
    """Sentences a second in fp32, padded to n_ctx, with torch's own dropout and the C library's own use of memory."""
    return training_rate(setup.classifier, setup.flags, setup.data, "no", setup.config["n_ctx"], setup.sizes)


def trainer_rate(setup: Setup, folder: Path) -> float:
    """Sentences a second of transformers' Trainer with the best that it offers off the shelf.

    Batches of like length padded to their longest, reduced precision, fused AdamW, no evaluation, no files.
    """
    examples = list(TsvReader(setup.data.with_name("train.txt")))
    labels = sorted({example.label for example in examples})
    tokenizer = transformers.AutoTokenizer.from_pretrained(setup.name)
    encoded = tokenizer([example.sentence for example in examples], truncation=True, max_length=setup.config["n_ctx"])
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels.index(example.label)}
            for ids, example in zip(encoded["input_ids"], examples, strict=True)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(setup.name, num_labels=len(labels),
                                                                            dtype="float32")
    warm_up, steps = setup.sizes.warm_up_steps, setup.sizes.bucketed_steps or -(-len(rows) // BATCH_SIZE)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    settings = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH_SIZE, learning_rate=1e-4,
        max_steps=warm_up + steps, bf16=setup.precision == "bf16", fp16=setup.precision == "fp16",
        use_cpu=setup.device == "cpu", optim="adamw_torch_fused", train_sampling_strategy="group_by_length",
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no")
    transformers.Trainer(model, settings, train_dataset=rows, callbacks=[Clock()],
                         data_collator=transformers.DataCollatorWithPadding(tokenizer)).train()
    if len(times) != warm_up + steps:
        raise InputError("transformers' Trainer did not train all of its steps.")
    # The last batch of an epoch is smaller; over whole epochs the sentences are those of the file.
    sentences = len(rows) if not setup.sizes.bucketed_steps else steps * BATCH_SIZE
    return sentences / (times[-1] - times[warm_up - 1])
