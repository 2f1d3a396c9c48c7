"""Fine-tuning: bucketed, in reduced precision, against fp32 padded to n_ctx and against transformers' own Trainer."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from benchmarks import harness
from benchmarks.speed import Setup, prepare
from cli.devices import choose_device
from dataset import EncodedData
from model import Classifier, TransformerEmbedding, build_model
from pretrained.checks import classification_token
from pretrained.loading import load_pretrained
from text.lines import TsvReader
from training.speedups import speed_up_training
from util import ROOT, keep_freed_memory

CONFIG = ROOT / "configs/config-bert-cls.json"
BATCH_SIZE = 64


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second of --bert_model_name_or_path on --data_dir, and the memory that it takes."""
    pretrained = f"--bert_model_name_or_path={args.bert_model_name_or_path}"
    setup, peak = prepare(args, folder, str(CONFIG), pretrained, pretrained, "--lr=1e-4", f"--batch_size={BATCH_SIZE}",
                          f"--max_train_steps={args.sizes.warm_up_steps + args.sizes.padded_steps}")
    data, precision = EncodedData(setup.data), setup.flags["precision"]
    base, ours, theirs = "fp32, padded to n_ctx", f"{precision}, bucketed", f"transformers' Trainer, {precision}"
    rates = harness.interleave({base: partial(alone, plain_rate, setup), ours: partial(alone, our_rate, setup),
                                theirs: partial(alone, trainer_rate, setup, folder)}, args.sizes.rounds)
    middle = harness.medians(rates)
    notes = [f"{Path(args.bert_model_name_or_path).name}, {CONFIG.name}, data set {Path(args.data_dir).name}: "
             f"{len(data):,} sentences of {data.lengths.mean():.1f} tokens, n_ctx {setup.config['n_ctx']}, batches of "
             f"{BATCH_SIZE}"]
    return {"notes": notes, "sentences_a_second": rates, "peak_mb": peak, "figures": [
        harness.rate_figure("fine-tuning, ", middle, ours, base),
        harness.rate_figure("fine-tuning, ", middle, ours, theirs),
        harness.figure("peak memory of fine-tuning : 2,000 MB", peak / 2000, f"{peak:,.0f} MB")]}


def alone(measure: Callable[..., Any], *args: Any) -> Any:
    """A measurement in a process of its own, which another one's settings do not reach."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def classifier(setup: Setup) -> Classifier:
    """An untrained one."""
    data, transformer = EncodedData(setup.data), load_pretrained(setup.flags["bert_model_name_or_path"])
    classify_by = classification_token(transformer, data.encoding.leading_special)
    return build_model(setup.config, len(data.labels), TransformerEmbedding(transformer, classify_by))


def our_rate(setup: Setup) -> float:
    """Sentences a second as train.py trains."""
    keep_freed_memory()

    def make_model() -> Classifier:
        model, device = classifier(setup), choose_device(setup.flags["device"])
        speed_up_training(model.embedding.transformer, device, EncodedData(setup.data).token_ids)
        return model

    return setup.rate(make_model, setup.flags["precision"])


def plain_rate(setup: Setup) -> float:
    """Sentences a second in fp32, padded to n_ctx, with torch's own dropout and the C library's own use of memory."""
    return setup.rate(partial(classifier, setup), "no", padded=True)


def trainer_rate(setup: Setup, folder: Path) -> float:
    """Sentences a second of transformers' Trainer with the best that it offers off the shelf.

    Batches of like length padded to their longest, reduced precision, fused AdamW, no evaluation, no files.
    """
    examples = list(TsvReader(setup.data.with_name("train.txt")))
    labels = sorted({example.label for example in examples})
    name, precision = setup.flags["bert_model_name_or_path"], setup.flags["precision"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    encoded = tokenizer([example.sentence for example in examples], truncation=True, max_length=setup.config["n_ctx"])
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels.index(example.label)}
            for ids, example in zip(encoded["input_ids"], examples, strict=True)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels),
                                                                            dtype="float32")
    warm_up, steps = setup.sizes.warm_up_steps, setup.sizes.bucketed_steps or -(-len(rows) // BATCH_SIZE)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    settings = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH_SIZE, learning_rate=1e-4,
        max_steps=warm_up + steps, bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=choose_device(setup.flags["device"]).type == "cpu", optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length", report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no")
    transformers.Trainer(model, settings, train_dataset=rows, callbacks=[Clock()],
                         data_collator=transformers.DataCollatorWithPadding(tokenizer)).train()
    # The last batch of an epoch is smaller; over whole epochs the sentences are those of the file.
    sentences = len(rows) if not setup.sizes.bucketed_steps else steps * BATCH_SIZE
    return sentences / (times[-1] - times[warm_up - 1])
