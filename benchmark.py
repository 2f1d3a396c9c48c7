"""Measure the toolkit: speed, memory and accuracy, as tables and a picture.

Reads   data sets (sentence TAB label) and a file of word vectors; works in a scratch folder that it removes.
Writes  RESULTS/speed.json, vectors.json, memory.json, augment.json, finetune.json, inference.json and .png, scale.json,
        chain.json and .png, int8.json, zero.json, gpu.json, accuracy.json and .png; Markdown tables on standard
        output.

    python benchmark.py                     all but accuracy: on an otherwise idle machine
    python benchmark.py accuracy            every model on every data set, and two baselines: hours; goes on where it
                                            was stopped
    python benchmark.py chain               how a teacher and its students, left in --checkpoints by accuracy, answer
    python benchmark.py int8                every way of int8, and a sweep over threads
    python benchmark.py zero                memory of two processes with DeepSpeed, by stage: about 8 GB
    python benchmark.py gpu                 fine-tuning and answering on a GPU, in fp32, in bf16 and compiled
    python benchmark.py table               print again what RESULTS holds

Figures of speed are ratios of two things measured in one run; what is absolute stands beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy import Plan, measure_accuracy, newest_rows
from benchmarks.augment import measure_augmentation
from benchmarks.chain import measure_chain
from benchmarks.finetune import measure_finetuning
from benchmarks.gpu import measure_gpu
from benchmarks.inference import AIMS, measure_inference
from benchmarks.measure import SMALL, Sizes, available, figure, interleave, launch, training_rate
from benchmarks.recipes import CONFIGS, TAUGHT
from benchmarks.report import accuracy_table, as_written, draw_accuracy, draw_inference, figures_table, provenance
from benchmarks.scale import measure_memory, measure_scale
from benchmarks.stages import encode, run_stage
from benchmarks.ways import measure_ways
from benchmarks.zero import measure_zero
from cli.flags import (
    EMBEDDING_PATH,
    Parser,
    add_bert_flag,
    add_config_flag,
    add_data_dir_flag,
    did_you_mean,
    natural_int,
    positive_int,
)
from sentence_classifier.errors import InputError, fail_cleanly


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("verbs", nargs="*", default=list(MEASURES), metavar="VERB",
                        help=f"{', '.join(VERBS)} (default: {' '.join(MEASURES)})")
    files = parser.add_argument_group("files")
    files.add_argument("--embedding_path", default=EMBEDDING_PATH,
                       help="word vectors, or none (default: %(default)s)")
    files.add_argument("--results", default="results", help="folder of the JSON files (default: %(default)s)")
    files.add_argument("--scratch", default=".bench", help="folder to work in, about 3 GB (default: %(default)s)")
    files.add_argument("--checkpoints", metavar="FOLDER",
                       help="inference, int8, accuracy: keep the trained models here, take those that are there, and "
                            "go on with those that were cut off (default: train anew)")
    speed = parser.add_argument_group("speed")
    add_config_flag(speed, CONFIGS["cnn"])
    add_data_dir_flag(speed)
    transformers = parser.add_argument_group("finetune, scale, gpu, and accuracy of minilm-*")
    add_bert_flag(transformers, "embeddings/all-MiniLM-L6-v2")
    inference = parser.add_argument_group("inference, int8")
    inference.add_argument("--inference_models", nargs="+", default=list(AIMS), choices=list(AIMS), metavar="MODEL",
                           help=f"(default: {' '.join(AIMS)})")
    inference.add_argument("--num_threads", type=positive_int, default=2, help="(default: 2)")
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--data_sets", nargs="+", default=["snips", "sst2"],
                          help="folders, by path or by their name under data/ (default: snips sst2)")
    words = [model for model, config in CONFIGS.items() if "bert" not in config and model not in TAUGHT]
    accuracy.add_argument("--models", nargs="*", default=words, choices=list(CONFIGS), metavar="MODEL",
                          help=f"of {' '.join(CONFIGS)} (default: {' '.join(words)})")
    accuracy.add_argument("--seeds", nargs="+", type=natural_int,
                          help="(default: 1 2 3 on Snips and for the CNN on SST-2, else 1)")
    accuracy.add_argument("--folds", type=natural_int, default=0,
                          help="to compare recipes: hold out so many folds of the training file in turn and test on "
                               "them in the place of test.txt, with the fold's number as the seed (default: 0)")
    accuracy.add_argument("--force", action="store_true", help="run again what is finished")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, for the tests
    args = parser.parse_args(argv)
    for verb in args.verbs:
        if verb not in VERBS:
            parser.error(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; there are {', '.join(VERBS)}")
    args.sizes = SMALL if args.small else Sizes()
    words = ["benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    args.command = " ".join(re.sub(r"(^|=)/(?:[^/]*/)*", r"\1", word) for word in words)  # no paths of this machine
    return args


# ------------------------------------------------------------------------------------------------------------ speed


def measure_speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Training: bucketed batches and reduced precision against fp32 padded to n_ctx; a large table against a small."""
    import torch

    from cli.devices import choose_device, choose_precision
    from dataset import EncodedData, load_table
    from model import WordEmbedding, build_model, word_dropout_probabilities

    sizes: Sizes = args.sizes
    source, vectors, notes = available(args)
    encode(source, folder / "data", args.config, f"--embedding_path={vectors}")
    # One step of train.py resolves the flags and the config's recipe.
    run_stage("train.py", f"--config={args.config}", f"--data_dir={folder / 'data'}", "--embedding_trainable",
              "--max_train_steps=1", f"--save_path={folder / 'model.pt'}", f"--log_dir={folder / 'runs'}",
              f"--log_path={folder / 'train.log'}")
    resolved = json.loads((folder / "model.pt.train.json").read_text())
    flags, config = resolved["flags"], resolved["config"]
    device = choose_device(flags["device"])
    precision = choose_precision("auto", device)
    data = EncodedData(folder / "data" / "train.txt.ids")
    seen, lengths = data.encoding.seen_rows, data.lengths
    n_ctx = config["n_ctx"]
    notes += [f"data set {source.name}: {len(data):,} sentences of {lengths.mean():.1f} words, n_ctx {n_ctx}, batches "
              f"of {flags['batch_size']}", f"config {Path(args.config).name}, {seen:,} trained word vectors",
              f"precision auto: {precision}"]

    def rate(table: torch.Tensor, precision: str, padded: bool = False) -> float:
        def make() -> Any:
            alpha = flags["word_dropout"]
            dropped = word_dropout_probabilities(data.word_counts(), alpha) if alpha else None
            embedding = WordEmbedding(table, data.encoding.seen_rows, dropped, flags["embedding_dropout"])
            return build_model(config, len(data.labels), embedding)

        return training_rate(make, flags, data.path, precision, n_ctx if padded else 0, sizes)

    table = load_table(folder / "data" / "embedding.npy", str(data.encoding.table))
    base = "fp32, padded to n_ctx"
    sides = {base: lambda: rate(table, "no", padded=True), "fp32, bucketed": lambda: rate(table, "no")}
    if precision != "no":
        sides[f"{precision}, bucketed"] = lambda: rate(table, precision)
    rates = interleave(sides, sizes.rounds, warm_up=True)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    figures = [
        figure(f"training, {name} : {base}", middle[name] / middle[base], ">= 6" if name.startswith("fp32") else ">= 8",
               f"{middle[name]:,.0f} : {middle[base]:,.0f} sentences a second")
        for name in middle if name != base
    ]

    large, small = (max(words, seen) for words in sizes.tables)
    rows = torch.randn(large, table.shape[1])
    tables = interleave({"large": lambda: rate(rows, precision), "small": lambda: rate(rows[:small], precision)},
                        sizes.rounds, warm_up=True)
    middle = {name: statistics.median(values) for name, values in tables.items()}
    figures.append(figure(f"training, table of {large:,} words : of {small:,}", middle["large"] / middle["small"],
                          ">= 0.9", f"{middle['large']:,.0f} : {middle['small']:,.0f} sentences a second"))
    return {"notes": notes, "figures": figures, "device": device.type,
            "sentences_a_second": {**rates, f"table of {large}": tables["large"], f"table of {small}": tables["small"]}}


# ---------------------------------------------------------------------------------------------------------- vectors


def measure_vectors(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Reading a vector file, the first time and from its cache, against numpy line by line, each in a new process."""
    path = folder / "vectors.txt"
    generate_vectors(path, args.sizes.words, args.sizes.dimension)
    cache = path.with_name(f"{path.name}.cache")
    peaks: list[float] = []

    def read(how: str) -> float:
        if how == "first":
            cache.unlink(missing_ok=True)
        call = f"import benchmark; print(benchmark.reading_seconds({str(path)!r}, {how == 'numpy'}))"
        _, peak, output = launch("-c", call)
        if how == "first":
            peaks.append(peak)
        return float(output)

    seconds = interleave({how: partial(read, how) for how in ("numpy", "first", "second")}, args.sizes.rounds,
                         warm_up=False)
    numpy, first, second = (statistics.median(seconds[how]) for how in ("numpy", "first", "second"))
    megabytes = path.stat().st_size / 1e6
    return {
        "notes": [f"{args.sizes.words:,} x {args.sizes.dimension} vectors, {megabytes:,.0f} MB of text; numpy: "
                  "np.array(line.split()[1:], dtype=np.float32) on all lines"],
        "figures": [
            figure("reading vectors, numpy line by line : first reading", numpy / first, ">= 8",
                   f"{numpy:.2f} : {first:.2f} s"),
            figure("reading vectors, numpy line by line : second reading", numpy / second, ">= 50",
                   f"{numpy:.2f} : {second:.3f} s"),
            figure("reading vectors, first : second reading", first / second, "", f"{first:.2f} : {second:.3f} s"),
            figure("peak memory of the first reading : 1,500 MB", max(peaks) / 1500, "<= 1", f"{max(peaks):,.0f} MB"),
        ],
        "seconds": seconds, "peak_mb": peaks, "file_mb": megabytes,
    }


def generate_vectors(path: Path, words: int, dimension: int) -> None:
    """Write vectors as GloVe 6B prints them. Half rows, formatted once, are combined."""
    import numpy as np

    random = np.random.default_rng(0)
    halves = [" ".join(f"{x:.5g}" for x in row) for row in random.normal(0, 0.4, (4000, dimension // 2))]
    picks = random.integers(0, len(halves), (words, 2)).tolist()
    with open(path, "w", encoding="utf-8") as file:
        for number, (left, right) in enumerate(tqdm(picks, "making vectors", unit="word", disable=None)):
            file.write(f"word{number} {halves[left]} {halves[right]}\n")


def reading_seconds(path: str, by_numpy: bool) -> float:
    """Read a vector file and return the seconds that it took."""
    import numpy as np

    from text.vectors import read_vectors

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


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "speed": measure_speed, "vectors": measure_vectors, "memory": measure_memory, "augment": measure_augmentation,
    "finetune": measure_finetuning, "inference": measure_inference, "scale": measure_scale,
}
# What needs trained models, an hour, several processes or a GPU: only where asked for.
BY_NAME = {"chain": measure_chain, "int8": measure_ways, "zero": measure_zero, "gpu": measure_gpu}
VERBS = (*MEASURES, *BY_NAME, "accuracy", "table")


# -------------------------------------------------------------------------------------------------------------- main


def show(args: argparse.Namespace, verbs: list[str]) -> None:
    """Print the tables of what RESULTS holds of `verbs`, and draw the picture."""
    folder = Path(args.results)
    found = [verb for verb in verbs if (folder / f"{verb}.json").exists()]
    if not found:
        raise InputError(f"{folder}: holds no results yet; run python benchmark.py first.")
    for name in found:
        path = folder / f"{name}.json"
        if name == "accuracy":
            rows = newest_rows(path)
            print(accuracy_table(rows))
            draw_accuracy(rows, path.with_suffix(".png"))
        else:
            with as_written(path) as result:
                print(figures_table(result))
                if name in ("chain", "inference"):
                    draw_inference(result["points"], path.with_suffix(".png"))


@contextlib.contextmanager
def scratch(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """A folder for the time of one measurement."""
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix=f"{name}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    args = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    for name in args.verbs:
        if name == "table":
            show(args, [verb for verb in VERBS if verb != "table"])
            continue
        with scratch(args, name) as folder:
            if name == "accuracy":
                plan = Plan(Path(args.results), args.command, args.data_sets, args.models, args.seeds,
                            args.embedding_path, args.force, args.folds, args.sizes.train_flags, args.sizes.settings,
                            args.bert_model_name_or_path, Path(args.checkpoints) if args.checkpoints else None)
                measure_accuracy(plan, folder)
            else:
                from util import write_json

                result = {"benchmark": name, **provenance(args.command), **(MEASURES | BY_NAME)[name](args, folder)}
                write_json(result, Path(args.results) / f"{name}.json")
        show(args, [name])


if __name__ == "__main__":
    main()
