"""What more processes gain in preprocess.py and in training."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, memory
from util import ROOT

BATCH_SIZE = 128  # of all processes together


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ratios of two processes to one."""
    sizes, source, bert = args.sizes, Path(args.data_dir), Path(args.bert_model_name_or_path)
    vectors = f"--embedding_path={args.embedding_path}"
    harness.encode(source, folder / "data", args.config, vectors)  # which reads the vectors' text
    kinds = {"word vectors": (sizes.lines[0], [f"--config={args.config}", vectors])}
    if bert.is_dir():
        kinds["transformer"] = (sizes.subword_lines, [f"--config={ROOT / 'configs/config-bert-cls.json'}",
                                                     f"--bert_model_name_or_path={bert}"])
    prepared = {}
    for kind, (lines, flags) in kinds.items():
        data = memory.generate_data(folder, lines, sizes.vocabulary)
        sides = {str(workers): partial(preprocessing_rate, lines, f"--data_dir={data}", f"--num_workers={workers}",
                                       *flags) for workers in (1, 2)}
        prepared[kind] = harness.interleave(sides, sizes.rounds)
        shutil.rmtree(data)
    names = one, two = ("1 process of 2 threads", "2 processes of 1 thread")
    trained = harness.interleave({side: partial(training_rate, args, folder, processes)
                                  for processes, side in enumerate(names, 1)}, sizes.rounds)
    figures = [harness.rate_figure(f"preprocess.py, {kind}, --num_workers ", harness.medians(rates), "2", "1")
               for kind, rates in prepared.items()]
    figures.append(harness.rate_figure("train.py, ", harness.medians(trained), two, one))
    notes = [f"preprocess.py: {sizes.lines[0]:,} generated lines for word vectors, {sizes.subword_lines:,} for "
             f"{bert.name}", f"training: {Path(args.config).name} on {source.name}, {BATCH_SIZE} a step, "
             f"{sizes.epochs} epochs with their evaluation"]
    return {"notes": notes, "figures": figures, "preprocess_lines_a_second": prepared,
            "train_sentences_a_second": trained}


def preprocessing_rate(lines: int, *flags: str) -> float:
    """Lines a second of preprocess.py."""
    return lines / harness.launch(str(ROOT / "preprocess.py"), *flags)[0]


def training_rate(args: argparse.Namespace, folder: Path, processes: int) -> float:
    """Sentences a second of train.py, evaluation included: one process of two threads, or two of one."""
    data = folder / "data"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
    harness.launch(*launcher, str(ROOT / "train.py"), f"--config={args.config}", f"--data_dir={data}",
                   "--embedding_trainable", "--measure=last", "--device=cpu", f"--epoch={args.sizes.epochs}",
                   f"--batch_size={BATCH_SIZE // processes}", *harness.output_flags(folder), threads=2 // processes)
    seconds = json.loads((folder / "model.pt.train.json").read_text(encoding="utf-8"))["seconds"]
    return (data / harness.SPLITS[0]).read_bytes().count(b"\n") * args.sizes.epochs / seconds
