"""augment_data.py: words tagged and sentences made a second, by one process and by one a core, and the memory."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Sizes, available_data, figure, interleave, launch
from benchmarks.stages import SPLITS

N_ITER = (5, 20)


def measure_augmentation(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The training file of --data_dir, augmented with each n_iter, in processes of its own."""
    sizes: Sizes = args.sizes
    source, notes = available_data(args)
    figures_of: dict[tuple[int, bool], list[dict[str, Any]]] = {}

    def run(n_iter: int, parallel: bool) -> float:
        flags = [f"--input={source / SPLITS[0]}", f"--output={folder / 'augmented.raw'}", f"--n_iter={n_iter}",
                 "--analyzer=hanta", "--lower", *(["--parallel"] if parallel else [])]
        _, peak, output = launch(str(Path(__file__).resolve()), *flags)
        found = {**json.loads(output), "peak_mb": peak}
        figures_of.setdefault((n_iter, parallel), []).append(found)
        return found["lines"] / found["augmenting_seconds"]

    few, many = N_ITER
    sides: dict[str, Callable[[], float]] = {
        f"n_iter {n_iter}, {'parallel' if parallel else 'one process'}": partial(run, n_iter, parallel)
        for n_iter, parallel in ((few, False), (many, False), (many, True))}
    rates = interleave(sides, sizes.rounds, warm_up=False)

    def middle(key: str, n_iter: int, parallel: bool) -> float:
        return statistics.median(found[key] for found in figures_of[n_iter, parallel])

    def rate(n_iter: int, parallel: bool, count: str, seconds: str) -> float:
        return middle(count, n_iter, parallel) / middle(seconds, n_iter, parallel)

    made = [rate(many, parallel, "lines", "augmenting_seconds") for parallel in (False, True)]
    tagged = [rate(many, parallel, "sentences", "tagging_seconds") for parallel in (False, True)]
    peaks = [middle("peak_mb", n_iter, False) for n_iter in N_ITER]
    largest = middle("peak_mb", many, True)
    one = figures_of[many, True][0]
    notes.append(f"data set {source.name}: {one['sentences']:,} sentences, with n_iter {many} {one['lines']:,} lines; "
                 f"analyzer {one['analyzer']}; {one['workers']} workers")
    return {
        "notes": notes, "sentences_a_second": rates,
        "runs": [{"n_iter": n_iter, "parallel": parallel, **found}
                 for (n_iter, parallel), runs in figures_of.items() for found in runs],
        "figures": [
            figure("sentences made a second after tagging, parallel : 20,000", made[1] / 20_000, ">= 1",
                   f"{made[1]:,.0f} a second"),
            figure("sentences made a second after tagging, parallel : one process", made[1] / made[0], "",
                   f"{made[1]:,.0f} : {made[0]:,.0f} a second"),
            figure("sentences tagged a second, parallel : one process", tagged[1] / tagged[0], "",
                   f"{tagged[1]:,.0f} : {tagged[0]:,.0f} a second"),
            figure(f"peak memory, n_iter {many} : {few}", peaks[1] / peaks[0], "<= 1.1",
                   f"{peaks[1]:,.0f} : {peaks[0]:,.0f} MB in one process; of several, the largest {largest:,.0f} MB"),
        ]}


if __name__ == "__main__":  # in the process that is measured
    import augment_data

    print(json.dumps(augment_data.augment(augment_data.get_params(sys.argv[1:]))))
