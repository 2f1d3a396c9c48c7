"""preprocess.py on corpora of millions of lines: its memory does not grow with them."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.harness import SPLITS, figure, launch
from util import ROOT


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory and lines a second of preprocess.py, in one process, at two sizes of the training text."""
    small, large = args.sizes.lines
    peaks, rates = [], []
    for lines in (small, large):
        data = generate_data(folder, lines, args.sizes.vocabulary)
        seconds, peak, _ = launch(str(ROOT / "preprocess.py"), f"--config={args.config}", f"--data_dir={data}",
                                  "--embedding_path=none")
        peaks.append(peak)
        rates.append(lines / seconds)
        shutil.rmtree(data)
    compared = f"{large:,} : {small:,} lines"
    figures = [figure(f"preprocess.py, peak memory, {compared}", peaks[1] / peaks[0],
                      f"{peaks[1]:,.0f} : {peaks[0]:,.0f} MB"),
               figure(f"preprocess.py, lines a second, {compared}", rates[1] / rates[0],
                      f"{rates[1]:,.0f} : {rates[0]:,.0f}")]
    notes = [f"generated corpora, {args.sizes.vocabulary:,} words by Zipf's law, --embedding_path none"]
    return {"notes": notes, "figures": figures, "lines": (small, large), "peak_mb": peaks, "lines_a_second": rates}


def generate_data(folder: Path, lines: int, vocabulary: int) -> Path:
    """Write a data set with so many lines in train.txt."""
    data = folder / str(lines)
    data.mkdir()
    for name, count in zip(SPLITS, (lines, 1000, 1000), strict=True):
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
