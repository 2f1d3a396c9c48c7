"""augment_data.py: words tagged and sentences made a second, by one process and by one for each core; its memory."""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import SPLITS, figure, find_data, interleave, launch, rate_figure

N_ITER = (5, 20)
AUGMENT = """
import json, sys, augment_data
print(json.dumps(augment_data.augment(augment_data.get_params(sys.argv[1:]))))
"""


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The training file of --data_dir, augmented with each n_iter, in processes of its own."""
    source, notes = find_data(args)
    runs: list[dict[str, Any]] = []

    def run(n_iter: int, parallel: bool) -> float:
        flags = [f"--input={source / SPLITS[0]}", f"--output={folder / 'augmented.raw'}", f"--n_iter={n_iter}",
                 "--analyzer=hanta", "--lower", *(["--parallel"] if parallel else [])]
        _, peak, output = launch("-c", AUGMENT, *flags)
        runs.append({"n_iter": n_iter, "parallel": parallel, **json.loads(output), "peak_mb": peak})
        return runs[-1]["lines"] / runs[-1]["augmenting_seconds"]

    few, many = N_ITER
    sides = {
        f"n_iter {n_iter}, {'parallel' if parallel else 'one process'}": partial(run, n_iter, parallel)
        for n_iter, parallel in ((few, False), (many, False), (many, True))}
    rates = interleave(sides, args.sizes.rounds, warm_up=False)

    def middle(key: str, n_iter: int = many, parallel: bool = False) -> float:
        return statistics.median(one[key] for one in runs if (one["n_iter"], one["parallel"]) == (n_iter, parallel))

    made, tagged = ({side: middle(count, many, parallel) / middle(seconds, many, parallel)
                     for side, parallel in (("parallel", True), ("one process", False))}
                    for count, seconds in (("lines", "augmenting_seconds"), ("sentences", "tagging_seconds")))
    peaks, one = [middle("peak_mb", n_iter) for n_iter in N_ITER], runs[-1]
    notes.append(f"data set {source.name}: {one['sentences']:,} sentences, with n_iter {many} {one['lines']:,} lines; "
                 f"analyzer {one['analyzer']}; {one['workers']} workers")
    return {
        "notes": notes, "sentences_a_second": rates, "runs": runs,
        "figures": [
            figure("sentences made a second after tagging, parallel : 20,000", made["parallel"] / 20_000, ">= 1",
                   f"{made['parallel']:,.0f} a second"),
            rate_figure("sentences made a second after tagging, ", made, "parallel", "one process"),
            rate_figure("sentences tagged a second, ", tagged, "parallel", "one process"),
            figure(f"peak memory, n_iter {many} : {few}", peaks[1] / peaks[0], "<= 1.1",
                   f"{peaks[1]:,.0f} : {peaks[0]:,.0f} MB in one process; of several, the largest "
                   f"{middle('peak_mb', many, True):,.0f} MB"),
        ]}
