"""Training on word vectors: bucketed batches and reduced precision against fp32 padded to n_ctx, and large tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from util import ROOT, set_seed


@dataclass(frozen=True)
class Setup:
    """What is trained: flags and config as train.py resolved them, the encoded training data, and how much of it."""

    flags: dict[str, Any]
    config: dict[str, Any]
    data: Path
    sizes: harness.Sizes

    def rate(self, make_model: Callable[[], Classifier], precision: str, padded: bool = False) -> float:
        """Sentences a second of the Trainer's own epoch, without evaluation and files, for a fresh model.

        Args:
            make_model: builds the classifier; called after the seed is set.
            padded: pad all batches to n_ctx, not each to its longest sentence.
        """
        pad_to, sizes = self.config["n_ctx"] if padded else 0, self.sizes

        class PaddedData(EncodedData):
            def batch(self, indices: Any) -> Batch:
                batch = super().batch(indices)
                more = (0, max(0, pad_to - batch.input_ids.shape[1]))
                return Batch(F.pad(batch.input_ids, more), F.pad(batch.attention_mask, more), batch.targets)

        class TimedTrainer(Trainer):
            sentences = 0

            def evaluate_and_save(self, bar: Any, end_of_epoch: bool = False) -> None:
                self.read_losses()  # a GPU has finished then
                self.sentences += self.progress.loss_count
                self.progress.loss_count = 0

        train = PaddedData(self.data)
        set_seed(self.flags["seed"])
        model = make_model()
        reset_accelerate(processes=True)  # it refuses a second precision in one process
        try:
            accelerator = Accelerator(cpu=choose_device(self.flags["device"]).type == "cpu", mixed_precision=precision)
            no_info: Any = None  # no checkpoint is written
            trainer = TimedTrainer(Run(argparse.Namespace(**self.flags), train, train, no_info, model, accelerator))
            with tqdm(unit="step", leave=False, disable=None) as bar:
                trainer.total_steps = sizes.warm_up_steps
                trainer.train_epoch(bar)
                trainer.sentences = 0
                steps = sizes.padded_steps if padded else sizes.bucketed_steps
                trainer.total_steps = trainer.progress.step + (steps or len(trainer.sampler))
                start = time.perf_counter()
                trainer.train_epoch(bar)
                return trainer.sentences / (time.perf_counter() - start)
        finally:
            reset_accelerate(processes=True)


def prepare(args: argparse.Namespace, folder: Path, config: str, encoding: str, *flags: str) -> tuple[Setup, float]:
    """Encode --data_dir and let train.py begin: what it resolved flags and config to, and its peak memory in MB."""
    harness.encode(Path(args.data_dir), folder / "data", config, encoding)
    _, peak, _ = harness.launch(str(ROOT / "train.py"), f"--config={config}", f"--data_dir={folder / 'data'}", *flags,
                                *harness.output_flags(folder))
    trained = json.loads((folder / "model.pt.train.json").read_text())
    (data,) = (folder / "data").glob("train.txt.?*s")
    return Setup(trained["flags"], trained["config"], data, args.sizes), peak


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second by precision, padding and size of the table."""
    setup, _ = prepare(args, folder, args.config, f"--embedding_path={args.embedding_path}", "--embedding_trainable",
                       "--max_train_steps=1")
    flags, config, rounds = setup.flags, setup.config, args.sizes.rounds
    precision = choose_precision("auto", choose_device(flags["device"]))
    data = EncodedData(setup.data)
    seen = data.encoding.seen_rows
    notes = [f"data set {Path(args.data_dir).name}: {len(data):,} sentences of {data.lengths.mean():.1f} words, n_ctx "
             f"{config['n_ctx']}, batches of {flags['batch_size']}",
             f"config {Path(args.config).name}, {seen:,} trained word vectors", f"precision auto: {precision}"]

    def rate(table: torch.Tensor, precision: str, padded: bool = False) -> float:
        def make() -> Classifier:
            alpha = flags["word_dropout"]
            dropped = word_dropout_probabilities(data.word_counts(), alpha) if alpha else None
            embedding = WordEmbedding(table, seen, dropped, flags["embedding_dropout"])
            return build_model(config, len(data.labels), embedding)

        return setup.rate(make, precision, padded)

    table = load_table(folder / "data/embedding.npy", str(data.encoding.table))
    base = "fp32, padded to n_ctx"
    sides = {base: partial(rate, table, "no", padded=True), "fp32, bucketed": partial(rate, table, "no")}
    if precision != "no":
        sides[f"{precision}, bucketed"] = partial(rate, table, precision)
    rates = harness.interleave(sides, rounds, warm_up=True)
    figures = [harness.rate_figure("training, ", harness.medians(rates), name, base) for name in rates if name != base]
    large, small = (max(words, seen) for words in args.sizes.tables)
    rows = torch.randn(large, table.shape[1])
    tables = harness.interleave({f"table of {words}": partial(rate, rows[:words], precision)
                                 for words in (large, small)}, rounds, warm_up=True)
    one, two = harness.medians(tables).values()
    figures.append(harness.figure(f"training, table of {large:,} words : of {small:,}", one / two,
                                  f"{one:,.0f} : {two:,.0f} sentences a second"))
    return {"notes": notes, "figures": figures, "sentences_a_second": rates | tables}
