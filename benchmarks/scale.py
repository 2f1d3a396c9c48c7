"""What more processes gain in preprocess.py and in training, and preprocess.py's memory at two sizes of its text."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from util import ROOT

BATCH_SIZE = 128  # of all processes together


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ratios of two processes to one, and of preprocess.py's memory at two sizes of its text."""
    sizes, source, bert = args.sizes, Path(args.data_dir), Path(args.bert_model_name_or_path)
    vectors = f"--embedding_path={args.embedding_path}"
    harness.encode(source, folder / "data", args.config, vectors)  # which reads the vectors' text
    small, large = sizes.lines
    words = (f"--config={args.config}", vectors)
    subwords = (f"--config={ROOT / 'configs/config-bert-cls.json'}", f"--bert_model_name_or_path={bert}")
    peaks: dict[int, float] = {}  # of one process, by lines

    def preprocess(lines: int, data: Path, workers: int, *flags: str) -> float:
        seconds, peak, _ = harness.launch(str(ROOT / "preprocess.py"), f"--data_dir={data}",
                                          f"--num_workers={workers}", *flags)
        if workers == 1:
            peaks[lines] = peak
        return lines / seconds

    prepared = {}
    for kind, lines, flags in (("transformer", sizes.subword_lines, subwords), ("word vectors", small, words)):
        data = generate_data(folder, lines, sizes.vocabulary)
        prepared[kind] = harness.interleave({str(workers): partial(preprocess, lines, data, workers, *flags)
                                             for workers in (1, 2)}, sizes.rounds)
        shutil.rmtree(data)
    preprocess(large, generate_data(folder, large, sizes.vocabulary), 1, *words)
    names = one, two = ("1 process of 2 threads", "2 processes of 1 thread")
    trained = harness.interleave({side: partial(training_rate, args, folder, processes)
                                  for processes, side in enumerate(names, 1)}, sizes.rounds)
    figures = [harness.rate_figure(f"preprocess.py, {kind}, --num_workers ", harness.medians(rates), "2", "1")
               for kind, rates in prepared.items()]
    figures += [harness.rate_figure("train.py, ", harness.medians(trained), two, one),
                harness.figure(f"preprocess.py, peak memory, {large:,} : {small:,} lines", peaks[large] / peaks[small],
                               f"{peaks[large]:,.0f} : {peaks[small]:,.0f} MB")]
    notes = [f"preprocess.py: {small:,} generated lines for word vectors, {sizes.subword_lines:,} for {bert.name}, of "
             f"{sizes.vocabulary:,} words by Zipf's law", f"training: {Path(args.config).name} on {source.name}, "
             f"{BATCH_SIZE} a step, {sizes.epochs} epochs with their evaluation"]
    return {"notes": notes, "figures": figures, "preprocess_lines_a_second": prepared,
            "train_sentences_a_second": trained}


def training_rate(args: argparse.Namespace, folder: Path, processes: int) -> float:
    """Sentences a second of train.py, evaluation included: one process of two threads, or two of one."""
    data = folder / "data"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
    harness.launch(*launcher, str(ROOT / "train.py"), f"--config={args.config}", f"--data_dir={data}",
                   "--embedding_trainable", "--measure=last", "--device=cpu", f"--epoch={args.sizes.epochs}",
                   f"--batch_size={BATCH_SIZE // processes}", *harness.output_flags(folder), threads=2 // processes)
    seconds = json.loads((folder / "model.pt.train.json").read_text(encoding="utf-8"))["seconds"]
    return (data / harness.SPLITS[0]).read_bytes().count(b"\n") * args.sizes.epochs / seconds


def generate_data(folder: Path, lines: int, vocabulary: int) -> Path:
    """Write a data set with so many lines in train.txt."""
    data = folder / str(lines)
    data.mkdir()
    for name, count in zip(harness.SPLITS, (lines, 1000, 1000), strict=True):
        generate_corpus(data / name, count, vocabulary)
    return data


def generate_corpus(path: Path, lines: int, vocabulary: int) -> None:
    """Write sentences of 3 to 15 words by Zipf's law; the label follows from the first word."""
    random = np.random.default_rng(lines)
    weights = 1 / np.arange(1, vocabulary + 1)
    with open(path, "w", encoding="utf-8") as file:
        for start in tqdm(range(0, lines, 100_000), f"making {path.name}", disable=None):
            lengths = random.integers(3, 16, min(100_000, lines - start))
            ids = random.choice(vocabulary, lengths.sum(), p=weights / weights.sum())
            for row in np.split(ids, lengths.cumsum()[:-1]):
                file.write(f"{' '.join(f'word{number}' for number in row.tolist())}\tlabel{row[0] % 7}\n")
