"""What measurements share: how much is measured, processes of their own, rounds, rows of ratios, training rates."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from benchmarks.report import GLOVE_WORDS
from benchmarks.stages import ROOT, SPLITS
from cli.flags import DATA_DIR, EMBEDDING_PATH
from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3
    warm_up_steps: int = 5
    bucketed_steps: int = 0  # 0: an epoch
    padded_steps: int = 30  # all alike, so that fewer will do
    tables: tuple[int, int] = (GLOVE_WORDS, 20_000)
    words: int = GLOVE_WORDS
    dimension: int = 300
    lines: tuple[int, int] = (1_000_000, 5_000_000)
    more_lines: tuple[int, int] = (1_000_000, 10_000_000)
    subword_lines: int = 200_000
    epochs: int = 2
    vocabulary: int = 20_000
    train_flags: str = ""  # for the models of the accuracy table
    settings: int = 1000  # at most, that a baseline tries
    layers: int = 12  # of the BERT for zero
    sentences: int | None = None  # that are answered one at a time; None: the test file's


SMALL = Sizes(rounds=1, warm_up_steps=1, bucketed_steps=2, padded_steps=1, tables=(3000, 1000), words=300, dimension=20,
              lines=(300, 1500), more_lines=(300, 900), subword_lines=200, epochs=1, vocabulary=100,
              train_flags="--epoch=1 --max_train_steps=3", settings=2, layers=1, sentences=12)


def available(args: argparse.Namespace) -> tuple[Path, str, list[str]]:
    """The data set and the vectors to measure with, and what stands in the place of default ones that are not here."""
    source, notes = available_data(args)
    vectors = args.embedding_path
    if vectors == EMBEDDING_PATH and not Path(vectors).is_file():
        notes.append(f"{Path(vectors).name} is not here: no pretrained vectors")
        vectors = "none"
    return source, vectors, notes


def available_data(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The data set to measure with, and what stands in its place where it is the default one and not here."""
    source = Path(args.data_dir)
    if (source / SPLITS[0]).is_file():
        return source, []
    if args.data_dir != DATA_DIR:
        raise InputError(f"{source / SPLITS[0]}: no such file.")
    return ROOT / "data/sample", [f"{source.name} is not here: measured on data/sample"]


# A process's peak memory counts that of the process which started it, here perhaps one that holds torch and a model.
# So a small one stands between.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak, "output": done.stdout}))
sys.exit(done.returncode)
"""


def launch(*command: str, threads: int | None = None) -> tuple[float, float, str]:
    """Run Python with `command`.

    Args:
        threads: of each process it is; None: the library's choice.

    Returns:
        Its seconds, its peak resident memory in MB (of the largest process), and its standard output.
    """
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", LAUNCHER, sys.executable, *command], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **chosen})
    if done.returncode:
        raise InputError(f"a measured process ended with exit status {done.returncode}; its message stands above.")
    result = json.loads(done.stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    return result["seconds"], result["peak"] * unit / 1e6, result["output"]


def interleave(sides: dict[str, Callable[[], float]], rounds: int, warm_up: bool) -> dict[str, list[float]]:
    """Measure all sides in turn, round after round, so that a slow minute of the machine meets all of them.

    Args:
        warm_up: do one more round first, which does not count.
    """
    measured: dict[str, list[float]] = {name: [] for name in sides}
    with tqdm(total=(rounds + warm_up) * len(sides), unit="run", disable=None) as bar:
        for number in range(rounds + warm_up):
            for name, measure in sides.items():
                bar.set_description(name)
                value = measure()
                bar.update()
                if number or not warm_up:
                    measured[name].append(value)
    return measured


def figure(measured: str, ratio: float, aim: str, beside: str) -> dict[str, Any]:
    """A row of a table of ratios, logged at once: a run cut off has said so much. `aim` is "", ">= X" or "<= X"."""
    met = None
    if aim:
        sign, limit = aim.split()
        met = ratio >= float(limit) if sign == ">=" else ratio <= float(limit)
    logger.info("[%s] %.3g; %s", measured, ratio, beside)
    return {"measured": measured, "ratio": ratio, "aim": aim, "met": met, "beside": beside}


def training_rate(make_model: Callable[[], Any], flags: dict[str, Any], path: Path, precision: str, pad_to: int,
                  sizes: Sizes, profiler: AbstractContextManager[Any] | None = None) -> float:
    """Sentences a second of the Trainer's own epoch, without evaluation and files, for a fresh model.

    Args:
        make_model: builds the classifier; called after the seed is set.
        flags: as train.py resolved them.
        path: the encoded training data.
        pad_to: pad all batches to so many positions; 0: each to its longest sentence.
        profiler: is entered for the measured steps.
    """
    import torch.nn.functional as F
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from cli.devices import choose_device
    from dataset import Batch, EncodedData
    from training.run import Run
    from training.trainer import Trainer
    from util import set_seed

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
    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second precision in one process
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        args, info = argparse.Namespace(**flags), cast(Any, None)  # no checkpoint is written
        trainer = TimedTrainer(Run(args, train, train, info, model, accelerator))
        with tqdm(unit="step", leave=False, disable=None) as bar:
            trainer.total_steps = sizes.warm_up_steps
            trainer.train_epoch(bar)
            trainer.sentences = 0
            steps = sizes.padded_steps if pad_to else sizes.bucketed_steps
            trainer.total_steps = trainer.progress.step + (steps or len(trainer.sampler))
            with profiler or nullcontext():
                start = time.perf_counter()
                trainer.train_epoch(bar)
                return trainer.sentences / (time.perf_counter() - start)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
