"""A GPU: fine-tuning and answering in fp32, in bf16 and compiled, and whether it answers as the processor does."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel

from benchmarks import harness
from benchmarks.finetune import BATCH_SIZE, CONFIG
from benchmarks.speed import prepare
from dataset import EncodedData, pad
from model import Classifier, TransformerEmbedding, build_model
from pretrained.loading import load_pretrained
from sentence_classifier.errors import InputError
from training.speedups import speed_up_training

SENTENCES = 300  # that are answered one at a time
WAYS = {"fp32": ("no", False), "bf16": ("bf16", False), "bf16, compiled": ("bf16", True)}  # precision, --compile


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second, milliseconds a sentence and the logits' distance from the CPU's, by model and way."""
    if not torch.cuda.is_available():
        raise InputError("benchmark.py gpu measures a CUDA device, and there is none.")
    device, pretrained = torch.device("cuda"), f"--bert_model_name_or_path={args.bert_model_name_or_path}"
    setup, _ = prepare(args, folder, str(CONFIG), pretrained, pretrained, "--max_train_steps=1",
                       f"--batch_size={BATCH_SIZE}")
    data, test = EncodedData(setup.data), EncodedData(setup.data.with_name("test.txt.fs"))
    # An epoch warms up: a GPU's libraries choose and load kernels when a batch of a new length comes.
    sizes = replace(setup.sizes, warm_up_steps=setup.sizes.bucketed_steps or math.ceil(len(data) / BATCH_SIZE))
    rows = test.rows(range(min(len(test), SENTENCES)))
    models = {Path(args.bert_model_name_or_path).name: lambda: load_pretrained(args.bert_model_name_or_path),
              f"random BERT of {sizes.layers} layers": lambda: BertModel(BertConfig(num_hidden_layers=sizes.layers),
                                                                         add_pooling_layer=False)}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    runs = [(way, name) for way in WAYS for name in models]  # what takes minutes to compile comes last
    for way, name in tqdm(runs, unit="run", disable=None):
        precision, compiled = WAYS[way]
        transformer = models[name]()
        speed_up_training(transformer, device, data.token_ids)
        model = build_model(setup.config, len(data.labels), TransformerEmbedding(transformer, "first"))
        torch.compiler.reset()
        run = replace(setup, flags={**setup.flags, "compile": compiled}, sizes=sizes)
        rate = run.rate(partial(lambda made: made, model), precision)
        found[name][way] = {"sentences_a_second": rate, **answer(model, rows, device, precision, compiled)}
    figures = []
    for name, ways in found.items():
        base, rates = ways["fp32"], {way: got["sentences_a_second"] for way, got in ways.items()}
        for way, got in ways.items():
            if got is not base:
                figures += [harness.rate_figure(f"{name}, fine-tuning, ", rates, way, "fp32"),
                            harness.figure(f"{name}, a sentence, fp32 : {way}", base["median_ms"] / got["median_ms"],
                                           f"{base['median_ms']:.2f} : {got['median_ms']:.2f} ms")]
            figures.append(harness.figure(f"{name}, share of answers that are the CPU's in fp32, {way}",
                                          got["agreeing"], f"logits at most {got['distance']:.1e} apart"))
    notes = [f"{torch.cuda.get_device_name()}; {CONFIG.name}, data set {Path(args.data_dir).name}, batches of "
             f"{BATCH_SIZE}; {len(rows)} test sentences, tokenized before, one at a time"]
    return {"notes": notes, "figures": figures, "found": found}


def answer(model: Classifier, rows: list[Any], device: torch.device, precision: str,
           compiled: bool) -> dict[str, float]:
    """Median milliseconds of a sentence on a device; the share of the CPU's answers in fp32; the logits' distance."""
    batches = [pad([row]) for row in rows]
    model = model.cpu().eval()
    times, logits = [], []
    with torch.inference_mode():
        expected = torch.cat([model(batch.input_ids, batch.attention_mask) for batch in batches])
        model.to(device)
        call = torch.compile(model, dynamic=True) if compiled else model
        for batch in batches[:10] + batches:
            start = time.perf_counter()
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits.append(call(batch.input_ids, batch.attention_mask).float().cpu())
            times.append(1000 * (time.perf_counter() - start))
    found = torch.cat(logits[-len(rows) :])
    return {"median_ms": statistics.median(times[-len(rows) :]), "distance": float((found - expected).abs().max()),
            "agreeing": float((found.argmax(-1) == expected.argmax(-1)).double().mean())}
