"""A GPU: fine-tuning and answering in fp32, in bf16 and compiled, and whether it answers as the processor does."""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel

from benchmarks.finetune import BATCH_SIZE, CONFIG, make_classifier, prepare
from benchmarks.harness import SPLITS, figure, rate_figure, run_stage
from benchmarks.speed import training_rate
from dataset import EncodedData, pad
from pretrained.loading import load_pretrained
from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)

SENTENCES = 300  # that are answered one at a time
WAYS = {"fp32": ("no", False), "bf16": ("bf16", False), "bf16, compiled": ("bf16", True)}  # precision, --compile


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second, milliseconds a sentence and the logits' distance from the CPU's, by model and way."""
    if not torch.cuda.is_available():
        raise InputError("benchmark.py gpu measures a CUDA device, and there is none.")
    sizes, name = args.sizes, args.bert_model_name_or_path
    source, flags = prepare(args, folder)
    run_stage("train.py", *flags, "--max_train_steps=1")
    resolved = json.loads((folder / "model.pt.train.json").read_text())
    train, test = (EncodedData(folder / "data" / f"{split}.fs") for split in (SPLITS[0], SPLITS[2]))
    # An epoch warms up: a GPU's libraries choose and load kernels when a batch of a new length comes.
    sizes = replace(sizes, warm_up_steps=sizes.bucketed_steps or math.ceil(len(train) / BATCH_SIZE))
    models: dict[str, Callable[[], Any]] = {
        Path(name).name: partial(load_pretrained, name),
        f"random BERT of {sizes.layers} layers": lambda: BertModel(BertConfig(num_hidden_layers=sizes.layers),
                                                                   add_pooling_layer=False)}
    rows = test.rows(range(min(len(test), sizes.sentences or SENTENCES)))
    found: dict[str, dict[str, dict[str, float]]] = {label: {} for label in models}
    runs = [(way, label) for way in WAYS for label in models]  # what takes minutes to compile comes last
    for way, label in tqdm(runs, unit="run", disable=None):
        precision, compiled = WAYS[way]
        model = make_classifier(models[label](), resolved["config"], train)
        torch.compiler.reset()  # below, train() returns the model
        rate = training_rate(model.train, {**resolved["flags"], "compile": compiled}, train.path,
                             precision, 0, sizes)
        found[label][way] = {"sentences_a_second": rate, **answer(model, rows, precision, compiled)}
        logger.info("[%s, %s] %s", label, way, found[label][way])
    figures = []
    for label, ways in found.items():
        base, rates = ways["fp32"], {way: got["sentences_a_second"] for way, got in ways.items()}
        for way, got in ways.items():
            if got is not base:
                figures += [rate_figure(f"{label}, fine-tuning, ", rates, way, "fp32"),
                            figure(f"{label}, a sentence, fp32 : {way}", base["median_ms"] / got["median_ms"],
                                   f"{base['median_ms']:.2f} : {got['median_ms']:.2f} ms")]
            figures.append(figure(f"{label}, share of answers that are the CPU's in fp32, {way}", got["agreeing"],
                                  f"logits at most {got['distance']:.1e} apart"))
    notes = [f"{torch.cuda.get_device_name()}; {CONFIG.name}, data set {source.name}, batches of {BATCH_SIZE}; "
             f"{len(rows)} test sentences, tokenized before, one at a time"]
    return {"notes": notes, "device": "cuda", "figures": figures, "found": found}


def answer(model: Any, rows: list[Any], precision: str, compiled: bool) -> dict[str, float]:
    """Median milliseconds of a sentence on the GPU; the share of the CPU's answers in fp32; the logits' distance."""
    batches = [pad([row]) for row in rows]
    model = model.cpu().eval()
    with torch.inference_mode():
        expected = torch.cat([model(batch.input_ids, batch.attention_mask) for batch in batches])
    model = model.cuda()
    call = torch.compile(model, dynamic=True) if compiled else model

    def one(batch: Any) -> torch.Tensor:
        batch = batch.to(torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            return call(batch.input_ids, batch.attention_mask).float().cpu()

    times, logits = [], []
    with torch.inference_mode():
        for batch in batches[:10]:
            one(batch)
        for batch in batches:
            start = time.perf_counter()
            logits.append(one(batch))
            times.append(1000 * (time.perf_counter() - start))
    found = torch.cat(logits)
    return {"median_ms": statistics.median(times), "distance": float((found - expected).abs().max()),
            "agreeing": float((found.argmax(-1) == expected.argmax(-1)).double().mean())}
