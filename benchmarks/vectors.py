"""Reading a vector file, the first time and from its cache, against numpy line by line, each in a new process."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.harness import figure, interleave, launch, medians
from text.vectors import read_vectors


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each way of reading a generated file, and the peak memory of the first reading."""
    path = folder / "vectors.txt"
    generate_vectors(path, args.sizes.words, args.sizes.dimension)
    peaks: list[float] = []

    def read(how: str) -> float:
        if how == "first":
            path.with_name(f"{path.name}.cache").unlink(missing_ok=True)
        call = f"from benchmarks import vectors; print(vectors.reading_seconds({str(path)!r}, {how == 'numpy'}))"
        _, peak, output = launch("-c", call)
        if how == "first":
            peaks.append(peak)
        return float(output)

    seconds = interleave({how: partial(read, how) for how in ("numpy", "first", "second")}, args.sizes.rounds)
    middle = medians(seconds)
    figures = [figure(f"reading vectors, numpy line by line : {name} reading", middle["numpy"] / middle[name],
                      f"{middle['numpy']:.2f} : {middle[name]:.3f} s") for name in ("first", "second")]
    megabytes = path.stat().st_size / 1e6
    figures.append(figure("peak memory of the first reading : size of the text", max(peaks) / megabytes,
                          f"{max(peaks):,.0f} : {megabytes:,.0f} MB"))
    notes = [f"{args.sizes.words:,} x {args.sizes.dimension} vectors, {megabytes:,.0f} MB of text; numpy: "
             "np.array(line.split()[1:], dtype=np.float32) on all lines"]
    return {"notes": notes, "figures": figures, "seconds": seconds, "peak_mb": peaks, "file_mb": megabytes}


def generate_vectors(path: Path, words: int, dimension: int) -> None:
    """Write vectors as GloVe 6B prints them. Half rows, formatted once, are combined."""
    random = np.random.default_rng(0)
    halves = [" ".join(f"{x:.5g}" for x in row) for row in random.normal(0, 0.4, (4000, dimension // 2))]
    picks = random.integers(0, len(halves), (words, 2)).tolist()
    with open(path, "w", encoding="utf-8") as file:
        for number, (left, right) in enumerate(tqdm(picks, "making vectors", unit="word", disable=None)):
            file.write(f"word{number} {halves[left]} {halves[right]}\n")


def reading_seconds(path: str, by_numpy: bool) -> float:
    """Read a vector file and return the seconds that it took."""
    start = time.perf_counter()
    if by_numpy:
        words, rows = [], []
        with open(path, encoding="utf-8") as file:
            for line in file:
                words.append(line.split(" ", 1)[0])
                rows.append(np.array(line.split()[1:], dtype=np.float32))
    else:
        read_vectors(path)
    return time.perf_counter() - start
