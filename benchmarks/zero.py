"""ZeRO: the memory that each of two processes takes to train a transformer of BERT-base's size, by stage."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel

from benchmarks.harness import figure, launch
from model import TransformerEmbedding, build_model
from training.distributed import make_accelerator, prepare
from training.losses import parameter_groups

PROCESSES, STEPS = 2, 2


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes of optimizer state and peak memory, each stage in processes of its own."""
    found = {}
    for stage in tqdm(range(4), unit="stage", disable=None):
        _, peak, printed = launch("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", "-m",
                                  "benchmarks.zero", str(stage), str(args.sizes.layers))
        rows = [json.loads(row) for row in re.findall("{.*?}", printed)]  # two may have got into a line
        found[stage] = {**{key: max(row[key] for row in rows) for key in rows[0]}, "peak": peak * 1e6}
    whole = found[0]
    figures = [figure(f"{what} of a process, ZeRO stage {stage} to no DeepSpeed", found[stage][key] / whole[key],
                      f"{found[stage][key] / 1e6:.0f} to {whole[key] / 1e6:.0f} MB")
               for key, what in (("state", "optimizer state"), ("peak", "peak resident memory"))
               for stage in (1, 2, 3)]
    notes = [f"a random BERT with {whole['parameters'] / 1e6:.0f} M parameters, {PROCESSES} processes, {STEPS} steps "
             "in fp32 on the CPU; of the processes the one that takes more"]
    return {"figures": figures, "notes": notes, "stages": found}


def work(stage: int, layers: int) -> None:
    """Train a few steps and print what this process took."""
    flags = argparse.Namespace(zero_stage=stage, offload_optimizer=None, batch_size=1, gradient_accumulation_steps=1,
                               max_grad_norm=1.0, compile=False, enable_qat=False, enable_qat_fx=False,
                               enable_diffq=False, ema_decay=0.0, lora_r=None)
    accelerator = make_accelerator(flags, torch.device("cpu"), "no")
    transformer = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
    model = build_model({"enc_class": "cls", "dropout": 0.1}, 4, TransformerEmbedding(transformer, "first"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    wrapped, optimizer = prepare(model, torch.optim.AdamW(parameter_groups(model, 0.01, 1e-5), fused=True), accelerator)
    ids = torch.ones(1, 8, dtype=torch.int64)
    for _ in range(STEPS):
        accelerator.backward(wrapped(ids, ids.bool()).sum())
        optimizer.step()
        optimizer.zero_grad()
    inner = optimizer.optimizer
    states = (inner.optimizer if stage else inner).state.values()
    state = sum(value.numel() * value.element_size() for one in states for value in one.values())
    print(json.dumps({"state": state, "parameters": parameters}), flush=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    work(*map(int, sys.argv[1:]))
