"""augment_data.py: words tagged and sentences made a second, by one process and by one for each core; its memory."""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import SPLITS, figure, interleave, launch, medians, rate_figure

AUGMENT = """
import json, sys, augment_data
print(json.dumps(augment_data.augment(augment_data.get_params(sys.argv[1:]))))
"""
SIDES = {"n_iter 5": ["--n_iter=5"], "one process": ["--n_iter=20"], "parallel": ["--n_iter=20", "--parallel"]}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The training file of --data_dir, augmented by each side in processes of its own."""
    source = Path(args.data_dir)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}

    def run(side: str) -> float:
        _, peak, output = launch("-c", AUGMENT, f"--input={source / SPLITS[0]}", f"--output={folder / 'augmented.raw'}",
                                 "--analyzer=hanta", "--lower", *SIDES[side])
        runs[side].append(made := {**json.loads(output), "peak_mb": peak})
        return made["lines"] / made["augmenting_seconds"]

    rates = interleave({side: partial(run, side) for side in SIDES}, args.sizes.rounds)
    tagged = {side: statistics.median(one["sentences"] / one["tagging_seconds"] for one in found)
              for side, found in runs.items()}
    peaks = {side: statistics.median(one["peak_mb"] for one in found) for side, found in runs.items()}
    one = runs["parallel"][-1]
    return {
        "notes": [f"data set {source.name}: {one['sentences']:,} sentences, with n_iter 20 {one['lines']:,} lines; "
                  f"analyzer {one['analyzer']}; {one['workers']} workers"],
        "sentences_a_second": rates, "runs": runs,
        "figures": [
            rate_figure("sentences made a second after tagging, ", medians(rates), "parallel", "one process"),
            rate_figure("sentences tagged a second, ", tagged, "parallel", "one process"),
            figure("peak memory, n_iter 20 : 5", peaks["one process"] / peaks["n_iter 5"],
                   f"{peaks['one process']:,.0f} : {peaks['n_iter 5']:,.0f} MB in one process; of several, the largest "
                   f"{peaks['parallel']:,.0f} MB"),
        ]}
