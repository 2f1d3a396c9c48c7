"""What more processes gain in preprocess.py and in training, and the memory of ten million lines."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.memory import corpus_figures, generate_data
from util import ROOT

WORKERS = (1, 2)
BATCH_SIZE = 128  # of all processes together


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ratios of two processes to one, and preprocess.py's memory at two sizes of its text."""
    sizes = args.sizes
    (source, notes), (vectors, more) = harness.find_data(args), harness.find_vectors(args)
    prepared = preprocessing(args, folder, vectors)
    sentences, trained = training(args, folder, source, vectors)
    corpus = corpus_figures(args, folder, sizes.more_lines)
    one, two = map(str, WORKERS)
    figures = [harness.rate_figure(f"preprocess.py, {kind}, --num_workers ", harness.medians(rates), two, one)
               for kind, rates in prepared.items()]
    figures.append(harness.rate_figure("train.py, ", harness.medians(trained), *reversed(trained)))
    notes += [*more, f"preprocess.py: {sizes.more_lines[0]:,} generated lines for word vectors, "
              f"{sizes.subword_lines:,} for {Path(args.bert_model_name_or_path).name}",
              f"training: {Path(args.config).name} on {source.name}, {sentences:,} sentences, {BATCH_SIZE} a step, "
              f"{sizes.epochs} epochs with their evaluation",
              *corpus["notes"]]
    return {**corpus, "notes": notes, "figures": figures + corpus["figures"], "preprocess_lines_a_second": prepared,
            "train_sentences_a_second": trained}


def preprocessing(args: argparse.Namespace, folder: Path, vectors: str) -> dict[str, dict[str, list[float]]]:
    """Lines a second of preprocess.py by what it encodes for and the number of its processes."""
    sizes = args.sizes
    kinds = {"word vectors": (sizes.more_lines[0], [f"--config={args.config}", f"--embedding_path={vectors}"])}
    if Path(args.bert_model_name_or_path).is_dir():
        kinds["transformer"] = (sizes.subword_lines, [f"--config={ROOT / 'configs/config-bert-cls.json'}",
                                                     f"--bert_model_name_or_path={args.bert_model_name_or_path}"])
    rates = {}
    for kind, (lines, flags) in kinds.items():
        data = generate_data(folder, lines, sizes.vocabulary)

        def rate(workers: int, data: Path = data, lines: int = lines, flags: list[str] = flags) -> float:
            command = (str(ROOT / "preprocess.py"), f"--data_dir={data}", f"--num_workers={workers}", *flags)
            return lines / harness.launch(*command)[0]

        sides = {str(workers): partial(rate, workers) for workers in WORKERS}
        rates[kind] = harness.interleave(sides, sizes.rounds, warm_up=vectors != "none")  # it reads the vectors' text
        shutil.rmtree(data)
    return rates


def training(args: argparse.Namespace, folder: Path, source: Path, vectors: str) -> tuple[int, dict[str, list[float]]]:
    """Sentences a second of train.py, evaluation included: one process of two threads, two processes of one.

    Returns:
        The sentences of the training data, and the rates.
    """
    data = folder / "data"
    harness.encode(source, data, args.config, f"--embedding_path={vectors}")
    with open(data / harness.SPLITS[0], "rb") as file:
        sentences = sum(1 for _ in file)

    def rate(processes: int) -> float:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        harness.launch(*(launcher if processes > 1 else []), str(ROOT / "train.py"), f"--config={args.config}",
                       f"--data_dir={data}", "--embedding_trainable", "--measure=last", "--device=cpu",
                       f"--epoch={args.sizes.epochs}", f"--batch_size={BATCH_SIZE // processes}",
                       *harness.output_flags(folder), threads=2 // processes)
        trained = json.loads((folder / "model.pt.train.json").read_text(encoding="utf-8"))
        return sentences * args.sizes.epochs / trained["seconds"]

    sides = {"1 process of 2 threads": partial(rate, 1), "2 processes of 1 thread": partial(rate, 2)}
    return sentences, harness.interleave(sides, args.sizes.rounds, warm_up=False)
