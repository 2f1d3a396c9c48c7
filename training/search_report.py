"""What a hyper-parameter search found: the table of trials, the picture, and the command of the best trial."""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from sentence_classifier.errors import InputError
from util import atomic_write, picture

if TYPE_CHECKING:
    from training.search import Search


def completed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The complete ones among them."""
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the highest score; of equals the first."""
    return max(completed(trials), key=lambda trial: (score(trial), -trial.number), default=None)


def score(trial: FrozenTrial) -> float:
    """The valid accuracy of a complete trial, or the last one of a pruned trial."""
    assert trial.value is not None
    return trial.value


def rows(search: Search) -> Iterator[dict[str, Any]]:
    """A row for each trial, lost ones included."""
    for trial in search.study.get_trials(deepcopy=False):
        if "surplus" in trial.user_attrs:
            continue
        seconds = round(trial.duration.total_seconds(), 1) if trial.duration else None
        worker = trial.user_attrs.get("worker", {})
        yield {"trial": trial.number, "state": trial.state.name.lower(),
               "valid_accuracy": trial.value, **{name: trial.params.get(name) for name in search.space},
               "epochs": trial.last_step, "seconds": seconds,
               "worker": f"{worker['host']}:{worker['pid']}" if worker else None,
               "error": trial.user_attrs.get("error")}


def report(worker: Search) -> None:
    """Print the table of trials and the best trial's command; write the table as CSV, and the picture."""
    table = list(rows(worker))
    with atomic_write(worker.folder / "trials.csv") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    best = best_of(worker.trials())
    shown = [name for name in table[0] if name not in ("worker", "error")]
    cells = [shown] + [[_cell(row[name]) + " *" * (name == "trial" and best is not None and row[name] == best.number)
                        for name in shown] for row in table]
    widths = [max(len(row[column]) for row in cells) for column in range(len(shown))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if best is None:
        raise InputError("no trial came to its end; widen the space (--hp_space).")
    draw(worker, worker.folder / "trials.png")
    print(f"\ntrial {best.number} is the best, valid accuracy {best.value:.4f}; its model is "
          f"{worker.folder / f'{best.number}.pt'}, and by this command it is trained again:\n\n"
          f"{best.user_attrs['command']}\n")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(worker: Search, path: Path) -> None:
    """Draw the score of each trial on the left, and on the right how much each flag mattered."""
    complete = completed(worker.trials())
    pruned = [trial for trial in worker.trials() if trial.state.name == "PRUNED"]
    with picture(path, columns=2, figsize=(11, 4), width_ratios=(3, 2)) as (_, (left, right)):
        for trials, mark, colour, label in ((complete, "o", "tab:blue", "complete"),
                                            (pruned, "x", "tab:gray", "pruned, at its last epoch")):
            left.plot([trial.number for trial in trials], [100 * score(trial) for trial in trials], mark, color=colour,
                      label=label)
        so_far = list(itertools.accumulate((100 * score(trial) for trial in complete), max))
        left.step([trial.number for trial in complete], so_far, where="post", color="tab:orange", label="best so far")
        left.set(title=worker.study.study_name, xlabel="trial", ylabel="accuracy on valid, %")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.grid(alpha=0.3)
        left.legend()
        shares = importances(worker)
        right.barh(list(shares), list(shares.values()), color="tab:blue")
        right.invert_yaxis()
        right.set(title="importance" if shares else "importance: too few complete trials", xlim=(0, 1), xlabel="share")


def importances(worker: Search) -> dict[str, float]:
    """The share of each flag (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255), largest first; empty: unknown."""
    scores = [score(trial) for trial in completed(worker.trials())]
    if len(scores) < 4 or len(set(scores)) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(worker.study)
