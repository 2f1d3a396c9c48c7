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
    """Peak memory and lines a second of preprocess.py on a corpus and on a larger one of the same vocabulary."""
    return corpus_figures(args, folder, args.sizes.lines)


def corpus_figures(args: argparse.Namespace, folder: Path, sizes: tuple[int, int]) -> dict[str, Any]:
    """Peak memory and lines a second of preprocess.py, in one process, at two sizes of the training text."""
    peaks, rates = [], []
    for lines in sizes:
        data = generate_data(folder, lines, args.sizes.vocabulary)
        seconds, peak, _ = launch(str(ROOT / "preprocess.py"), f"--config={args.config}", f"--data_dir={data}",
                                  "--embedding_path=none")
        peaks.append(peak)
        rates.append(lines / seconds)
        shutil.rmtree(data)
    small, large = sizes
    figures = [figure(f"preprocess.py, {what}, {large:,} : {small:,} lines", found[1] / found[0], aim,
                      f"{found[1]:,.0f} : {found[0]:,.0f}{unit}")
               for what, found, aim, unit in (("peak memory", peaks, "<= 1.1", " MB"),
                                              ("lines a second", rates, "", ""))]
    notes = [f"generated corpora, {args.sizes.vocabulary:,} words by Zipf's law, --embedding_path none"]
    return {"notes": notes, "figures": figures, "lines": sizes, "peak_mb": peaks, "lines_a_second": rates}


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
    words = [f"word{number}" for number in range(vocabulary)]
    weights = 1 / np.arange(1, vocabulary + 1)
    steps = np.cumsum(weights / weights.sum())
    with (open(path, "w", encoding="utf-8") as file,
          tqdm(total=lines, desc=f"making {path.name}", unit="line", unit_scale=True, disable=None) as bar):
        for start in range(0, lines, 100_000):
            lengths = random.integers(3, 16, min(100_000, lines - start)).tolist()
            ids = np.minimum(np.searchsorted(steps, random.random(sum(lengths))), vocabulary - 1).tolist()
            end = 0
            for length in lengths:
                row = ids[end : end + length]
                end += length
                file.write(f"{' '.join([words[i] for i in row])}\tlabel{row[0] % 7}\n")
            bar.update(len(lengths))
