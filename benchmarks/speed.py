"""Training on word vectors: bucketed batches and reduced precision against fp32 padded to n_ctx, and large tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

from benchmarks import harness
from cli.devices import choose_device, choose_precision
from dataset import Batch, EncodedData, load_table
from model import Classifier, WordEmbedding, build_model, word_dropout_probabilities
from training.distributed import reset_accelerate
from training.run import Run
from training.trainer import Trainer
from util import set_seed


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second by precision, padding and size of the table."""
    sizes: harness.Sizes = args.sizes
    source = Path(args.data_dir)
    harness.encode(source, folder / "data", args.config, f"--embedding_path={args.embedding_path}")
    # One step of train.py resolves the flags and the config's recipe.
    harness.run_stage("train.py", f"--config={args.config}", f"--data_dir={folder / 'data'}", "--embedding_trainable",
                      "--max_train_steps=1", *harness.output_flags(folder))
    resolved = json.loads((folder / "model.pt.train.json").read_text())
    flags, config = resolved["flags"], resolved["config"]
    precision = choose_precision("auto", choose_device(flags["device"]))
    data = EncodedData(folder / "data/train.txt.ids")
    seen, n_ctx = data.encoding.seen_rows, config["n_ctx"]
    notes = [f"data set {source.name}: {len(data):,} sentences of {data.lengths.mean():.1f} words, n_ctx {n_ctx}, "
             f"batches of {flags['batch_size']}", f"config {Path(args.config).name}, {seen:,} trained word vectors",
             f"precision auto: {precision}"]

    def rate(table: torch.Tensor, precision: str, padded: bool = False) -> float:
        def make() -> Classifier:
            alpha = flags["word_dropout"]
            dropped = word_dropout_probabilities(data.word_counts(), alpha) if alpha else None
            embedding = WordEmbedding(table, seen, dropped, flags["embedding_dropout"])
            return build_model(config, len(data.labels), embedding)

        return training_rate(make, flags, data.path, precision, n_ctx if padded else 0, sizes)

    table = load_table(folder / "data/embedding.npy", str(data.encoding.table))
    base = "fp32, padded to n_ctx"
    sides = {base: lambda: rate(table, "no", padded=True), "fp32, bucketed": lambda: rate(table, "no")}
    if precision != "no":
        sides[f"{precision}, bucketed"] = lambda: rate(table, precision)
    rates = harness.interleave(sides, sizes.rounds, warm_up=True)
    figures = [harness.rate_figure("training, ", harness.medians(rates), name, base) for name in rates if name != base]
    large, small = (max(words, seen) for words in sizes.tables)
    rows = torch.randn(large, table.shape[1])
    tables = harness.interleave({f"table of {words}": partial(rate, rows[:words], precision)
                                 for words in (large, small)}, sizes.rounds, warm_up=True)
    one, two = harness.medians(tables).values()
    figures.append(harness.figure(f"training, table of {large:,} words : of {small:,}", one / two,
                                  f"{one:,.0f} : {two:,.0f} sentences a second"))
    return {"notes": notes, "figures": figures, "sentences_a_second": rates | tables}


def training_rate(make_model: Callable[[], Classifier], flags: dict[str, Any], path: Path, precision: str, pad_to: int,
                  sizes: harness.Sizes) -> float:
    """Sentences a second of the Trainer's own epoch, without evaluation and files, for a fresh model.

    Args:
        make_model: builds the classifier; called after the seed is set.
        flags: as train.py resolved them.
        path: the encoded training data.
        pad_to: pad all batches to so many positions; 0: each to its longest sentence.
    """

    class PaddedData(EncodedData):
        def batch(self, indices: Any) -> Batch:
            batch = super().batch(indices)
            missing = max(0, pad_to - batch.input_ids.shape[1])
            return Batch(F.pad(batch.input_ids, (0, missing)), F.pad(batch.attention_mask, (0, missing)), batch.targets)

    class TimedTrainer(Trainer):
        sentences = 0

        def evaluate_and_save(self, bar: Any, end_of_epoch: bool = False) -> None:
            self.read_losses()  # a GPU has finished then
            self.sentences += self.progress.loss_count
            self.progress.loss_count = 0

    device = choose_device(flags["device"])
    train = PaddedData(path)
    set_seed(flags["seed"])
    model = make_model()
    reset_accelerate(processes=True)  # it refuses a second precision in one process
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        no_info: Any = None  # no checkpoint is written
        trainer = TimedTrainer(Run(argparse.Namespace(**flags), train, train, no_info, model, accelerator))
        with tqdm(unit="step", leave=False, disable=None) as bar:
            trainer.total_steps = sizes.warm_up_steps
            trainer.train_epoch(bar)
            trainer.sentences = 0
            steps = sizes.padded_steps if pad_to else sizes.bucketed_steps
            trainer.total_steps = trainer.progress.step + (steps or len(trainer.sampler))
            start = time.perf_counter()
            trainer.train_epoch(bar)
            return trainer.sentences / (time.perf_counter() - start)
    finally:
        reset_accelerate(processes=True)
