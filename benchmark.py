"""Measure the toolkit: speed, memory and accuracy, as tables and a picture.

Reads   data sets (sentence TAB label) and a file of word vectors; works in a scratch folder that it removes.
Writes  RESULTS/VERB.json of each VERB, a picture of inference, chain and accuracy; Markdown tables on standard output.

    python benchmark.py                     all but accuracy: on an otherwise idle machine
    python benchmark.py accuracy            every model on every data set, and two baselines: hours; goes on where it
                                            was stopped
    python benchmark.py chain               how a teacher and its students, left in --checkpoints by accuracy, answer
    python benchmark.py int8                every way of int8, and a sweep over threads
    python benchmark.py zero                memory of two processes with DeepSpeed, by stage: about 8 GB
    python benchmark.py gpu                 fine-tuning and answering on a GPU, in fp32, in bf16 and compiled
    python benchmark.py table               print again what RESULTS holds; write overview.png there and, of the
                                            repository's own results, the tables in its documents

Figures of speed are ratios of two things measured in one run; what is absolute stands beside them.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Sizes, provenance
from benchmarks.recipes import CONFIGS, INFERENCE_MODELS, TAUGHT
from cli.flags import EMBEDDING_PATH, Parser, did_you_mean, natural_int, positive_int
from cli.training_flags import FLAGS
from sentence_classifier.errors import InputError, fail_cleanly
from util import ROOT, write_json

# A verb's module in benchmarks/ has its name and measures by measure(args, folder).
USUAL = ("speed", "vectors", "augment", "finetune", "inference", "scale")
# What needs trained models, an hour or several processes: only where asked for.
BY_NAME = ("chain", "int8", "zero", "gpu", "accuracy")
VERBS = (*USUAL, *BY_NAME, "table")


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, __file__)
    parser.add_argument("verbs", nargs="*", default=list(USUAL), metavar="VERB",
                        help=f"{', '.join(VERBS)} (default: {' '.join(USUAL)})")
    files = parser.add_argument_group("files")
    files.add_argument("--embedding_path", default=EMBEDDING_PATH,
                       help="word vectors, or none (default: %(default)s)")
    files.add_argument("--results", type=Path, default="results",
                       help="folder of the JSON files (default: %(default)s)")
    files.add_argument("--scratch", type=Path, default=".bench",
                       help="folder to work in, about 3 GB (default: %(default)s)")
    files.add_argument("--checkpoints", type=Path, metavar="FOLDER",
                       help="inference, int8, accuracy: keep the trained models here, take those that are there, and "
                            "go on with those that were cut off (default: train anew)")
    speed = parser.add_argument_group("speed")
    replace(FLAGS["config"], default=CONFIGS["cnn"]).add_to(speed)
    FLAGS["data_dir"].add_to(speed)
    transformers = parser.add_argument_group("finetune, scale, gpu, and accuracy of minilm-*")
    replace(FLAGS["bert_model_name_or_path"], default="embeddings/all-MiniLM-L6-v2").add_to(transformers)
    inference = parser.add_argument_group("inference, int8")
    inference.add_argument("--inference_models", nargs="+", default=INFERENCE_MODELS, choices=INFERENCE_MODELS,
                           metavar="MODEL", help=f"models to measure (default: {' '.join(INFERENCE_MODELS)})")
    inference.add_argument("--num_threads", type=positive_int, default=2,
                           help="threads that answer a sentence (default: %(default)s)")
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--data_sets", nargs="+", default=["snips", "sst2"],
                          help="folders, by path or by their name under data/ (default: snips sst2)")
    words = [model for model, config in CONFIGS.items() if "bert" not in config and model not in TAUGHT]
    accuracy.add_argument("--models", nargs="*", default=words, choices=list(CONFIGS), metavar="MODEL",
                          help=f"of {' '.join(CONFIGS)} (default: {' '.join(words)})")
    accuracy.add_argument("--seeds", nargs="+", type=natural_int,
                          help="seeds to train with (default: 1 2 3 on Snips and for the CNN on SST-2, else 1)")
    accuracy.add_argument("--force", action="store_true", help="run again what is finished")
    args = parser.parse_args(argv)
    for verb in args.verbs:
        if verb not in VERBS:
            parser.error(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; there are {', '.join(VERBS)}")
    args.sizes = Sizes()
    args.command = re.sub(r"([ =])/(?:[^/ ]*/)*", r"\1", args.command)  # no paths of this machine
    return args


def show(results: Path, verbs: tuple[str, ...]) -> None:
    """Print the tables of what `results` holds of `verbs`, and draw the pictures."""
    from benchmarks import pictures, tables

    found = [verb for verb in verbs if (results / f"{verb}.json").exists()]
    if not found:
        raise InputError(f"{results}: holds no results yet; run python benchmark.py first.")
    for verb in found:
        print(tables.table(verb, results))
        if verb in pictures.PICTURES:
            pictures.PICTURES[verb](results)
    if {"accuracy", "inference", "int8"} <= set(found):
        pictures.draw_overview(results)
    if len(verbs) > 1 and results.resolve() == tables.RESULTS:
        for document in tables.update_documents([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], results):
            print(f"{document.relative_to(ROOT)}: its tables were not current, and are now.", file=sys.stderr)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    args = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    for verb in args.verbs:
        if verb == "table":
            show(args.results, VERBS)
            continue
        args.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix=f"{verb}-", ignore_cleanup_errors=True) as folder:
            measured = importlib.import_module(f"benchmarks.{verb}").measure(args, Path(folder))
        if verb != "accuracy":  # which writes each row at once
            write_json({"benchmark": verb, **provenance(args.command), **measured}, args.results / f"{verb}.json")
        show(args.results, (verb,))


if __name__ == "__main__":
    main()
