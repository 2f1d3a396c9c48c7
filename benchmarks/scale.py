"""More of everything: preprocess.py on corpora of millions of lines and with several processes; training with several.

Rates of one table are measured in turns in one run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measure import Sizes, available, figure, interleave, launch
from benchmarks.stages import ROOT, SPLITS, encode

WORKERS = (1, 2)
BATCH_SIZE = 128  # of all processes together

# ------------------------------------------------------------------------------------------------------- preprocess.py


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """preprocess.py on a corpus and on a larger one of the same vocabulary: peak memory and lines a second."""
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
    return {
        "notes": [f"generated corpora, {args.sizes.vocabulary:,} words by Zipf's law, --embedding_path none"],
        "figures": [
            figure(f"preprocess.py, peak memory, {large:,} : {small:,} lines", peaks[1] / peaks[0], "<= 1.1",
                   f"{peaks[1]:,.0f} : {peaks[0]:,.0f} MB"),
            figure(f"preprocess.py, lines a second, {large:,} : {small:,} lines", rates[1] / rates[0], "",
                   f"{rates[1]:,.0f} : {rates[0]:,.0f}"),
        ],
        "lines": sizes, "peak_mb": peaks, "lines_a_second": rates,
    }


def generate_data(folder: Path, lines: int, vocabulary: int) -> Path:
    """Write a data set with so many lines in train.txt."""
    data = folder / str(lines)
    data.mkdir()
    for name, count in zip(SPLITS, (lines, 1000, 1000), strict=True):
        generate_corpus(data / name, count, vocabulary)
    return data


def generate_corpus(path: Path, lines: int, vocabulary: int) -> None:
    """Write sentences of 3 to 15 words by Zipf's law; the label follows from the first word."""
    import numpy as np

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


def preprocessing(args: argparse.Namespace, folder: Path, vectors: str) -> dict[str, dict[str, list[float]]]:
    """Lines a second of preprocess.py by what it encodes for and the number of its processes."""
    sizes: Sizes = args.sizes
    ways = {"word vectors": (sizes.more_lines[0], [f"--config={args.config}", f"--embedding_path={vectors}"])}
    if Path(args.bert_model_name_or_path).is_dir():
        ways["transformer"] = (sizes.subword_lines, [f"--config={ROOT / 'configs/config-bert-cls.json'}",
                                                     f"--bert_model_name_or_path={args.bert_model_name_or_path}"])
    rates = {}
    for way, (lines, flags) in ways.items():
        data = generate_data(folder, lines, sizes.vocabulary)

        def rate(workers: int, data: Path = data, lines: int = lines, flags: list[str] = flags) -> float:
            seconds, _, _ = launch(str(ROOT / "preprocess.py"), f"--data_dir={data}", f"--num_workers={workers}",
                                   *flags)
            return lines / seconds

        rates[way] = interleave({str(workers): partial(rate, workers) for workers in WORKERS}, sizes.rounds,
                                warm_up=vectors != "none")  # which reads the vectors' text
        shutil.rmtree(data)
    return rates


# ------------------------------------------------------------------------------------------------------------ training


def training(args: argparse.Namespace, folder: Path, source: Path, vectors: str) -> tuple[int, dict[str, list[float]]]:
    """Sentences a second of train.py, evaluation included: one process of two threads, two processes of one.

    Returns:
        The sentences of the training data, and the rates.
    """
    data = folder / "data"
    encode(source, data, args.config, f"--embedding_path={vectors}")
    with open(data / SPLITS[0], "rb") as file:
        sentences = sum(1 for _ in file)

    def rate(processes: int) -> float:
        log = folder / f"{processes}.log"
        log.unlink(missing_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launch(*(launcher if processes > 1 else []), str(ROOT / "train.py"), f"--config={args.config}",
               f"--data_dir={data}", "--embedding_trainable", "--measure=last", f"--epoch={args.sizes.epochs}",
               f"--batch_size={BATCH_SIZE // processes}", "--device=cpu", f"--save_path={folder / 'model.pt'}",
               f"--log_dir={folder / 'runs'}", f"--log_path={log}", threads=2 // processes)
        (seconds,) = re.findall(r"\[trained \d+ steps in ([\d.]+) s\]", log.read_text(encoding="utf-8"))
        return sentences * args.sizes.epochs / max(float(seconds), 0.05)  # it is said with one decimal

    return sentences, interleave({"1 process of 2 threads": partial(rate, 1), "2 processes of 1 thread":
                                  partial(rate, 2)}, args.sizes.rounds, warm_up=False)


# --------------------------------------------------------------------------------------------------------------- scale


def measure_scale(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What more processes gain in preprocess.py and in training, and the memory of ten million lines."""
    sizes: Sizes = args.sizes
    source, vectors, notes = available(args)
    prepared = preprocessing(args, folder, vectors)
    sentences, trained = training(args, folder, source, vectors)
    corpus = corpus_figures(args, folder, sizes.more_lines)
    figures = []
    for way, rates in prepared.items():
        one, two = (statistics.median(rates[str(workers)]) for workers in WORKERS)
        figures.append(figure(f"preprocess.py, {way}, --num_workers 2 : 1", two / one, "",
                              f"{two:,.0f} : {one:,.0f} sentences a second"))
    (base, one), (name, two) = ((side, statistics.median(rates)) for side, rates in trained.items())
    figures.append(figure(f"train.py, {name} : {base}", two / one, "", f"{two:,.0f} : {one:,.0f} sentences a second"))
    notes += [f"preprocess.py: {sizes.more_lines[0]:,} generated lines for word vectors, {sizes.subword_lines:,} for "
              f"{Path(args.bert_model_name_or_path).name}", f"training: {Path(args.config).name} on {source.name}, "
              f"{sentences:,} sentences, {BATCH_SIZE} a step, {sizes.epochs} epochs with their evaluation",
              *corpus["notes"]]
    return {"notes": notes, "figures": figures + corpus["figures"], "preprocess_lines_a_second": prepared,
            "train_sentences_a_second": trained, "lines": corpus["lines"], "peak_mb": corpus["peak_mb"],
            "lines_a_second": corpus["lines_a_second"]}
