"""Hyper-parameter search with Optuna: one or more workers run the trials of a study.

A trial is one training in this process. Its command line is the one that it would have on its own; its files are in
SAVE_PATH.trials/STUDY/, where those of the best trial so far stay. Its score is the valid accuracy of the model that it
keeps. After each epoch the trial reports its valid accuracy, and it is pruned where that is below the median of the
other trials at that epoch.

Workers share a study through --hp_storage: a database's URL (anything with "://", such as sqlite:///search.db), or a
journal file (a path that ends in .log or .journal), which also works on network file systems. A worker that starts on
an existing study continues it. When a worker dies, its trial is marked failed and another trial replaces it: workers
on the same host look for its process, and a database misses its heartbeat from any host.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import torch
from optuna import Study, Trial
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cli.config import read_json
from cli.flags import Parser, changed, command_line, format_flag
from cli.training_flags import TABLE, check_loss_flags
from dataset import EncodedData
from sentence_classifier.errors import FlagError, InputError
from training.search_space import check_space, default_space, suggest
from training.trainer import Diverged
from util import atomic_write, picture

logger = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds between the heartbeats of a running trial, on a database
GRACE = 120  # seconds without a heartbeat, after which the worker counts as dead
PAUSE = 1.0  # seconds between two looks at the other workers


def open_storage(name: str) -> optuna.storages.BaseStorage:
    """The storage that --hp_storage names.

    Raises:
        InputError: neither a database's URL nor a journal's path, or it cannot be opened.
    """
    if "://" not in name:
        if not name.endswith((".log", ".journal")):
            raise InputError(f"--hp_storage={name}: neither a database's URL, such as sqlite:///search.db, nor a path "
                             "that ends in .log or .journal.")
        path = Path(name).resolve()  # the lock is a link, and a relative one would point astray
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileSymlinkLock(str(path))
        backend = JournalFileBackend(str(path), lock)
        check_journal(path, lock)
        return optuna.storages.JournalStorage(backend)

    def report_lost(study: Study, trial: FrozenTrial) -> None:
        logger.warning("[trial %d] no sign of life of its worker for %d s: marked failed", trial.number, GRACE)

    try:
        engine = {"connect_args": {"timeout": 60}} if name.startswith("sqlite") else {}  # workers wait for each other
        for attempt in range(5):
            try:
                return optuna.storages.RDBStorage(name, engine, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                                                  heartbeat_stale_trial_callback=report_lost)
            except SQLAlchemyError as error:
                if attempt == 4 or not isinstance(error, DBAPIError):
                    raise
                time.sleep(PAUSE)  # another worker is making the tables
        raise AssertionError
    except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--hp_storage: {name.split('@')[-1]} cannot be opened ({reason}).") from None  # no password


def check_journal(path: Path, lock: Any) -> None:
    """Remove an unfinished last line, which a full disk left and which would hide all lines after it.

    Raises:
        InputError: the file is something else.
    """
    lock.acquire()
    try:
        with open(path, "rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            try:
                known = not content or "op_code" in json.loads(content[: content.find(b"\n") + 1])
            except (ValueError, TypeError):
                known = False
            if not known:
                raise InputError(f"{path}: not a journal of Optuna; name another file.")
            if whole < len(content):
                logger.warning("[%s ends within a line, which is removed]", path)
                file.truncate(whole)
    finally:
        lock.release()


def is_lost(trial: FrozenTrial, me: dict[str, Any]) -> bool:
    """Whether the worker of a running trial is gone, as far as this host can tell. Asked between trials."""
    worker = trial.user_attrs.get("worker")
    if worker is None:  # killed in the moment between a trial's creation and its first mark
        began = trial.datetime_start
        return began is not None and (datetime.datetime.now(began.tzinfo) - began).total_seconds() > GRACE
    if worker["host"] != me["host"]:
        return False
    if worker == me:
        return True
    try:
        process = psutil.Process(worker["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - worker["started"]) > 2
    except psutil.NoSuchProcess:
        return True


def send_heartbeat(study: Study, trial: Trial) -> None:
    """Record a heartbeat of a trial now; Optuna has no public name for it."""
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


class NoScore(Exception):
    """A trial ends without a score and is marked failed."""


@dataclass
class Search:
    """One worker of a study."""

    study: Study  # shared with the other workers
    heartbeats: bool  # whether its storage tells of workers on other hosts that are gone
    space: dict[str, Any]  # see check_space
    base: list[str]  # the trials' command line without the flags of the space
    folder: Path  # for the trials' files
    total: int  # trials of all workers together
    parser: Parser  # this and the two below are train.py's
    get_params: Callable[..., Any]
    run: Callable[..., dict[str, Any]]
    me: dict[str, Any] = field(default_factory=lambda: {  # the start time, since the system reuses process numbers
        "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()})
    number: int = -1  # of the trial that runs

    def trials(self) -> list[FrozenTrial]:
        """The trials that count: running, complete and pruned ones, and those that failed by themselves.

        A trial that was lost with its worker, or interrupted, is replaced by another.
        """
        return [trial for trial in self.study.get_trials(deepcopy=False)
                if trial.state.name in ("RUNNING", "COMPLETE", "PRUNED") or "error" in trial.user_attrs]

    def work(self) -> None:
        """Run trials until there are `total` of them, all ended."""
        waiting = False
        while True:
            self.give_up_lost_trials()
            trials = self.trials()
            running = [trial for trial in trials if trial.state.name == "RUNNING" and (
                self.heartbeats or trial.user_attrs.get("worker", self.me)["host"] == self.me["host"])]
            if len(trials) < self.total:
                self.run_trial()
                self.remove_beaten()
                waiting = False
            elif running:
                if not waiting:
                    logger.info("[waiting for trials of other workers: %s]",
                                ", ".join(str(trial.number) for trial in running))
                waiting = True
                time.sleep(PAUSE)
            else:
                return

    def run_trial(self) -> None:
        """Run one trial to its end, and free its memory."""
        try:  # gc: an error and the frames in its traceback refer to each other, and these hold the trial's model
            self.study.optimize(self.objective, n_trials=1, catch=NoScore, gc_after_trial=True)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
            # Optuna refuses the result of a trial that other workers have given up; other errors are training's own.
            if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a FAIL trial"):
                raise
            logger.warning("[trial %d] was given up by other workers while this one was suspended", self.number)

    def give_up_lost_trials(self) -> None:
        """Mark the trials of dead workers failed."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_lost(trial, self.me):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                logger.warning("[trial %d] its worker is gone: marked failed", trial.number)
        optuna.storages.fail_stale_trials(self.study)

    def objective(self, trial: Trial) -> float:
        """Draw values and train once. Returns the valid accuracy of the model that is kept."""
        self.number = trial.number
        if self.heartbeats:  # first, so that each trial with a worker's mark has a heartbeat
            send_heartbeat(self.study, trial)
        trial.set_user_attr("worker", self.me)
        if sum(other.number < trial.number for other in self.trials()) >= self.total:
            trial.set_user_attr("surplus", True)  # two workers began the last one at the same moment
            raise NoScore
        drawn, actions = suggest(trial, self.space), self.parser.actions
        argv = [*self.base, *(word for flag, value in drawn.items() for word in format_flag(actions[flag], value))]
        trial.set_user_attr("command", shlex.join(["python", "train.py", *argv]))
        logger.info("[trial %d] %s", trial.number, ", ".join(
            f"{flag} {value:.3g}" if isinstance(value, float) else f"{flag} {value}" for flag, value in drawn.items()))
        try:
            accuracy = self.train(trial, argv)
        except (Diverged, FlagError, RuntimeError) as error:
            # For want of the machine's own memory PyTorch raises a plain RuntimeError.
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)
            if isinstance(error, RuntimeError) and not out_of_memory:
                raise
            reason = str(error).splitlines()[0]
            trial.set_user_attr("error", reason)
            logger.warning("[trial %d] failed: %s", trial.number, reason)
            raise NoScore from None
        logger.info("[trial %d] accuracy %.4f", trial.number, accuracy)
        return accuracy

    def train(self, trial: Trial, argv: list[str]) -> float:
        """Train by a trial's command line, into the trial's files."""
        args, config = self.get_params(argv)
        args = changed(args, save_path=str(self.folder / f"{trial.number}.pt"),
                       bert_output_dir=str(self.folder / f"{trial.number}.bert"))

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            trial.report(objective(metrics), epoch)
            if epoch < args.epoch and trial.should_prune():
                logger.info("[trial %d] pruned after epoch %d: accuracy %.4f", trial.number, epoch, objective(metrics))
                raise optuna.TrialPruned

        return objective(self.run(args, config, on_epoch))

    def remove_beaten(self) -> None:
        """Remove the files of all ended trials but the best, half-written ones of killed workers included."""
        # Asked once: a better trial that ends between two answers would count as ended, but not as the best.
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        best = best_of(ended)
        beaten = {str(trial.number) for trial in ended if trial is not best}
        for path in self.folder.iterdir():  # N.pt, .N.pt.PID.tmp, the folders N.bert and .N.bert-XXXX
            if path.name.removeprefix(".").split(".")[0] in beaten:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def search(args: argparse.Namespace, parser: Parser, get_params: Callable[..., Any],
           run: Callable[..., dict[str, Any]], data: tuple[EncodedData, EncodedData]) -> None:
    """Run --hp_trials trials together with the other workers of the study; print and draw the results.

    Args:
        args, get_params, run: train.py's.
        parser: of these flags, with the config's settings as defaults.
        data: the encoded training and valid data.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--hp_search_optuna runs in one process: start it with python; for several devices start it "
                         "once for each (--device), on one --hp_storage.")
    if args.resume:
        raise InputError("--resume: a search goes on by itself where it was stopped; leave --resume out.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats
    source = args.hp_space or "--hp_search_optuna"
    space = check_space(read_json(args.hp_space) if args.hp_space else default_space(args.epoch), source)
    search_flags = {*(name for name in vars(args) if name.startswith("hp_")), "resume"}
    places = {flag.name for flag in TABLE if flag.group.place}
    for flag, rule in space.items():  # Refuse a value that no trial could take, before one is drawn.
        own = command_line(parser, args, {*search_flags, flag})  # An error is then this value's.
        for value in rule if isinstance(rule, list) else (rule["low"], rule["high"]):
            try:
                tried, _ = get_params([*own, *format_flag(parser.actions[flag], value)])
                check_loss_flags(tried, data[0].path, data[0].has_logits)
            except FlagError as error:
                raise InputError(f"{source}: {flag}: {error}") from None
    base = command_line(parser, args, search_flags | set(space))
    fixed = command_line(parser, args, search_flags | set(space) | places)
    made_from = json.dumps([read_json(args.config), data[0].encoding.decisive(), data[1].encoding.source_sha256, space,
                            fixed], sort_keys=True)
    identity = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    name = args.hp_study or f"{Path(args.config).stem}-{identity}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--hp_study={name}: letters, digits, points and hyphens are expected, as in a folder's "
                         "name.")
    folder = Path(f"{args.save_path}.trials") / name
    place = args.hp_storage or f"{args.save_path}.trials/study.journal"
    storage = open_storage(place)
    seed = args.seed if args.hp_sampler_seed is None else args.hp_sampler_seed
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True,
                                    sampler=Sampler(seed), pruner=optuna.pruners.MedianPruner())
        if study.user_attrs.setdefault("made_from", identity) != identity:
            raise InputError(f"--hp_study={name}: was begun with another config, other data, another space or other "
                             "flags; choose another name.")
        study.set_user_attr("made_from", identity)
        folder.mkdir(parents=True, exist_ok=True)
        worker = Search(study, "://" in place, space, base, folder, args.hp_trials, parser, get_params, run)
        logger.info("[study %s] %d of %d trials are there; files in %s", name, len(worker.trials()), args.hp_trials,
                    folder)
        worker.work()
        worker.remove_beaten()
        report(worker)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the storage of the study fails ({reason}); its trials are kept, start again to go on."
                         ) from None


class Sampler(optuna.samplers.TPESampler):
    """Optuna's tree-structured Parzen estimator, seeded for each trial by `seed` and the trial's number.

    Trial numbers are unique among the workers of a study, also after a restart, so that no two trials draw alike.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.seed = seed

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        # All that a sampler holds beside its settings is its generator, and there is no other way to seed it.
        super().__init__(seed=int(np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0]))


# ---------------------------------------------------------------------------------------------------------- results


def objective(metrics: dict[str, float]) -> float:
    """What a trial is judged by: the accuracy on valid, or with several labels a sentence the micro F1."""
    return metrics.get("valid_f1", metrics["valid_accuracy"])


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the highest score; of equals the first."""
    complete = (trial for trial in trials if trial.state.name == "COMPLETE")
    return max(complete, key=lambda trial: (score(trial), -trial.number), default=None)


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
    complete, pruned = (worker.study.get_trials(deepcopy=False, states=(state,))
                        for state in (TrialState.COMPLETE, TrialState.PRUNED))
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
    scores = [score(trial) for trial in worker.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if len(scores) < 4 or len(set(scores)) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(worker.study)
