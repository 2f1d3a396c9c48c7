"""What measurements share: how much is measured, stages and processes of their own, turns, results and their origin."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sentence_classifier.errors import InputError
from util import ROOT, cores, git_revision, versions

logger = logging.getLogger(__name__)

SPLITS = ("train.txt", "valid.txt", "test.txt")
GLOVE_WORDS = 400_000  # in GloVe 6B


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the tests measure less."""

    rounds: int = 3
    warm_up_steps: int = 5
    bucketed_steps: int = 0  # 0: an epoch
    padded_steps: int = 30  # all alike, so that fewer will do
    tables: tuple[int, int] = (GLOVE_WORDS, 20_000)
    words: int = GLOVE_WORDS
    dimension: int = 300
    lines: tuple[int, int] = (1_000_000, 10_000_000)  # of words
    subword_lines: int = 200_000
    epochs: int = 2
    vocabulary: int = 20_000
    train_flags: str = ""  # for the models of the accuracy table
    settings: int = 1000  # at most, that a baseline tries
    layers: int = 12  # of the BERT for zero
    sentences: int = 0  # that are answered one at a time; 0: the test file's


def copy_splits(source: Path, folder: Path) -> None:
    """Copy a data set's raw text into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        if not (source / name).is_file():
            raise InputError(f"{source / name}: no such file; fetch data sets with python etc/download_datasets.py.")
        shutil.copyfile(source / name, folder / name)


# -------------------------------------------------------------------------------------------------------- processes


def run_stage(script: str, *flags: str) -> None:
    """Run one of the stages in a process of its own. Its log and progress bar show; its report does not."""
    launch(str(ROOT / script), *flags)


def encode(source: Path, folder: Path, config: str, *flags: str) -> None:
    """Copy a data set into `folder` and encode it there."""
    copy_splits(source, folder)
    run_stage("preprocess.py", f"--config={config}", f"--data_dir={folder}", *flags)


def output_flags(folder: Path) -> list[str]:
    """train.py's flags by which it writes all its files to `folder`."""
    return [f"--save_path={folder / 'model.pt'}", f"--bert_output_dir={folder / 'bert'}",
            f"--log_dir={folder / 'runs'}", f"--log_path={folder / 'train.log'}"]


def is_trained(model: Path) -> bool:
    """Whether a training that writes to `model` has come to its end, not merely to its first checkpoint."""
    return Path(f"{model}.train.json").exists()


# The peak memory that a process is charged with counts what its parent held when it was started, here perhaps torch and
# a model. So a small process stands between.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak, "output": done.stdout}))
sys.exit(done.returncode)
"""


def launch(*command: str, threads: int | None = None) -> tuple[float, float, str]:
    """Run Python on so many threads; return seconds, peak resident MB (of the largest process) and standard output."""
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", LAUNCHER, sys.executable, *command], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **chosen})
    if done.returncode:
        script = next((Path(word).name for word in command if word.endswith(".py")), "a measured process")
        raise InputError(f"{script} ended with exit status {done.returncode}; its message stands above.")
    result = json.loads(done.stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    return result["seconds"], result["peak"] * unit / 1e6, result["output"]


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = False) -> dict[str, list[float]]:
    """Measure all sides in turn, so that a slow minute of the machine meets all; a `warm_up` round does not count."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for name in tqdm([*sides] * (rounds + warm_up), unit="run", disable=None):
        measured[name].append(sides[name]())
    return {name: values[warm_up:] for name, values in measured.items()}


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {side: statistics.median(values) for side, values in measured.items()}


# ---------------------------------------------------------------------------------------------------------- results


def rate_figure(measured: str, rates: dict[str, float], one: str, other: str) -> dict[str, Any]:
    """A row that compares two sides in sentences a second."""
    return figure(f"{measured}{one} : {other}", rates[one] / rates[other],
                  f"{rates[one]:,.0f} : {rates[other]:,.0f} sentences a second")


def figure(measured: str, ratio: float, beside: str) -> dict[str, Any]:
    """A row of a table of ratios, logged at once; `beside` has the absolute figures that the ratio was made of."""
    logger.info("[%s] %.3g; %s", measured, ratio, beside)
    return {"measured": measured, "ratio": ratio, "beside": beside}


def provenance(command: str) -> dict[str, Any]:
    """Where a result comes from: revision, date, command, versions, machine."""
    import torch

    able = torch.cpu.get_capabilities()
    quick = [name for name in ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
             if able.get(name)]
    return {"git_revision": git_revision(), "date": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command,
            "versions": versions(), "cores": cores(), "instructions": quick,
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})}


@contextlib.contextmanager
def read_results(path: Path) -> Iterator[Any]:
    """The content of a results file; what the block does not find in it is the file's fault, and an InputError."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); run python benchmark.py first.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not as benchmark.py wrote it ({error}); remove or restore it.") from None
