"""Hyper-parameter search with Optuna: trainings of one study, by as many workers as meet on its storage.

A trial is one training by the command line that it would have on its own, in this process, with files of its own in
SAVE_PATH.trials/STUDY/; those of the best trial so far stay. After each epoch its accuracy on the valid data is
reported, and a trial below the median of the others at that epoch is pruned. Its score is the valid accuracy of the
model that it keeps.

--hp_storage is where workers meet: a database's URL (anything with "://", such as sqlite:///search.db), or a journal
file (a path that ends in .log or .journal), which also works on network file systems. A worker that starts on a study
that is already there goes on with it. A trial whose worker is gone is marked failed and replaced by another: on the
same host its process is looked for, and a database misses its heartbeat from any host.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.config import read_json
from cli.flags import Parser, changed, command_line, format_flag
from cli.training_flags import TABLE, check_loss_flags
from dataset import EncodedData
from sentence_classifier.errors import FlagError, InputError
from training.search_space import check_alone, check_space, default_space, suggest
from training.trainer import Diverged
from util import atomic_write

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds between signs of life of a running trial, on a database
GRACE = 120  # seconds without one, after which its worker is taken for dead
PAUSE = 1.0  # seconds between looks at what other workers do


# ---------------------------------------------------------------------------------------------------------- storage


def open_storage(name: str) -> BaseStorage:
    """The storage that --hp_storage names.

    Raises:
        InputError: neither a database's URL nor a journal's path, or it cannot be opened.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

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

    def given_up(study: Study, trial: FrozenTrial) -> None:
        logger.warning("[trial %d] no sign of life of its worker for %d s: marked failed", trial.number, GRACE)

    try:
        engine = {"connect_args": {"timeout": 60}} if name.startswith("sqlite") else {}  # workers wait for each other
        for attempt in range(5):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    return optuna.storages.RDBStorage(name, engine, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                                                      heartbeat_stale_trial_callback=given_up)
            except SQLAlchemyError as error:
                if attempt == 4 or not isinstance(error, DBAPIError):
                    raise
                time.sleep(PAUSE)  # another worker is making the tables
        raise AssertionError
    except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--hp_storage: {name.split('@')[-1]} cannot be opened ({reason}).") from None  # no password


def check_journal(path: Path, lock: Any) -> None:
    """Take off a last line that a full disk left unfinished, which would hide all that follows it.

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
                logger.warning("[%s ends within a line, which is taken off]", path)
                file.truncate(whole)
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------- workers


def this_worker() -> dict[str, Any]:
    """Who runs a trial: the host, the process and when it began, since process numbers come again."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_lost(trial: FrozenTrial, me: dict[str, Any]) -> bool:
    """Whether nobody works on a running trial any more, as far as this host can tell. Asked between trials."""
    import psutil

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


class NoTrial(Exception):
    """A trial that gives no score, and is marked failed."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch found no room for a tensor; for the machine's memory it has no exception of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


class Search:
    """One worker of a study.

    Args:
        study: shared with the other workers.
        heartbeats: whether its storage tells of workers on other hosts that are gone.
        space: see check_space.
        base: the trials' command line without the flags of the space.
        folder: for the trials' files.
        total: trials of all workers together.
        parser, get_params, run: train.py's.
    """

    def __init__(self, study: Study, heartbeats: bool, space: dict[str, Any], base: list[str], folder: Path,
                 total: int, parser: Parser, get_params: Callable[..., Any],
                 run: Callable[..., dict[str, Any]]) -> None:
        self.study = study
        self.heartbeats = heartbeats
        self.space = space
        self.base = base
        self.folder = folder
        self.total = total
        self.actions = {action.dest: action for action in parser._actions}
        self.get_params = get_params
        self.run = run
        self.me = this_worker()
        self.number = -1  # of the trial that runs

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
        """Begin a trial and see it through."""
        import optuna

        raised: list[Exception] = []

        def objective(trial: Trial) -> float:
            try:
                return self.objective(trial)
            except Exception as error:
                raised.append(error)
                raise

        try:
            self.study.optimize(objective, n_trials=1, catch=NoTrial)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
            # A trial that was given up ends with optuna's refusal of its result; training's own error is no such thing.
            if error in raised or self.study.get_trials(deepcopy=False)[self.number].state.name != "FAIL":
                raise
            logger.warning("[trial %d] was given up by other workers while this one was suspended", self.number)

    def give_up_lost_trials(self) -> None:
        """Mark trials failed whose workers are gone."""
        import optuna

        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if is_lost(trial, self.me):
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
                logger.warning("[trial %d] its worker is gone: marked failed", trial.number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)

    def objective(self, trial: Trial) -> float:
        """Draw and train once. Returns the valid accuracy of the model that is kept."""
        self.number = trial.number
        if self.heartbeats:  # before its mark, so that a trial which bears one has given a sign of life
            self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        trial.set_user_attr("worker", self.me)
        if sum(other.number < trial.number for other in self.trials()) >= self.total:
            trial.set_user_attr("surplus", True)  # two workers began the last one at the same moment
            raise NoTrial
        drawn = suggest(trial, self.space)
        argv = [*self.base, *(word for flag, value in drawn.items() for word in format_flag(self.actions[flag], value))]
        trial.set_user_attr("command", shlex.join(["python", "train.py", *argv]))
        logger.info("[trial %d] %s", trial.number, _spoken(drawn))
        try:
            accuracy = self.train(trial, argv)
        except (Diverged, FlagError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            trial.set_user_attr("error", reason)
            logger.warning("[trial %d] failed: %s", trial.number, reason)
            raise NoTrial from None
        logger.info("[trial %d] accuracy %.4f", trial.number, accuracy)
        return accuracy

    def train(self, trial: Trial, argv: list[str]) -> float:
        """The training of a trial by its command line, into the trial's files."""
        import optuna

        args, config = self.get_params(argv)
        args = changed(args, save_path=str(self.folder / f"{trial.number}.pt"),
                       bert_output_dir=str(self.folder / f"{trial.number}.bert"))

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            trial.report(metrics["valid_accuracy"], epoch)
            if epoch < args.epoch and trial.should_prune():
                logger.info("[trial %d] pruned after epoch %d: accuracy %.4f", trial.number, epoch,
                            metrics["valid_accuracy"])
                raise optuna.TrialPruned

        return self.run(args, config, on_epoch)["valid_accuracy"]

    def remove_beaten(self) -> None:
        """Remove the files of all ended trials but the best, those that a killed worker had half written among them."""
        # Asked for once: a trial that ended between two answers would be among the ended, and not the best.
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        best = best_of(ended)
        beaten = {str(trial.number) for trial in ended if trial is not best}
        for path in self.folder.iterdir():  # N.pt, .N.pt.PID.tmp, the folders N.bert and .N.bert-XXXX
            if path.name.removeprefix(".").split(".")[0] in beaten:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def completed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that came to their end."""
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The first of those with the highest score."""
    return max(completed(trials), key=lambda trial: (score(trial), -trial.number), default=None)


def score(trial: FrozenTrial) -> float:
    """The valid accuracy of a complete trial, or a pruned one's last."""
    assert trial.value is not None
    return trial.value


def _spoken(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in drawn.items())


# ----------------------------------------------------------------------------------------------------------- search


def search(args: argparse.Namespace, parser: Parser, get_params: Callable[..., Any],
           run: Callable[..., dict[str, Any]], data: tuple[EncodedData, EncodedData]) -> None:
    """Run --hp_trials trials, together with the other workers of the study; print and draw what they found.

    Args:
        args: train.py's flags.
        parser: of these flags, with the config's settings as defaults.
        get_params: train.py's, from a command line to flags and config.
        run: train.py's, from flags and config to the metrics of the best model.
        data: the encoded training and valid data.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--hp_search_optuna runs in one process: start it with python; for several devices start it "
                         "once for each (--device), on one --hp_storage.")
    if args.resume:
        raise InputError("--resume: a search goes on by itself where it was stopped; leave --resume out.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    source = args.hp_space or "--hp_search_optuna"
    space = check_space(read_json(args.hp_space) if args.hp_space else default_space(args.epoch), source)
    search_flags = {*(name for name in vars(args) if name.startswith("hp_")), "resume"}
    places = {*(flag.name for flag in TABLE if flag.group.place), "config", "data_dir", "device"}

    def check(name: str, value: Any) -> None:
        """In the place of the user's own value: what is refused then is refused for this value's sake."""
        flag = format_flag(next(action for action in parser._actions if action.dest == name), value)
        found, _ = get_params([*command_line(parser, args, {*search_flags, name}), *flag])
        check_loss_flags(found, data[0].path, data[0].has_logits)

    check_alone(space, source, check)
    searching = search_flags | set(space)
    base = command_line(parser, args, searching)
    how = command_line(parser, args, searching | places)
    made_from = json.dumps([read_json(args.config), data[0].encoding.decisive(), data[1].encoding.source_sha256, space,
                            how], sort_keys=True)
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
                                    sampler=make_sampler(seed), pruner=optuna.pruners.MedianPruner())
        if study.user_attrs.setdefault("made_from", identity) != identity:
            raise InputError(f"--hp_study={name}: was begun with another config, other data, another space or other "
                             "flags; choose another name.")
        study.set_user_attr("made_from", identity)
        folder.mkdir(parents=True, exist_ok=True)
        worker = Search(study, "://" in place, space, base, folder, args.hp_trials, parser, get_params, run)
        done = len(worker.trials())
        logger.info("[study %s] %d of %d trials are there; files in %s", name, done, args.hp_trials, folder)
        worker.work()
        worker.remove_beaten()
        report(worker)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the storage of the study fails ({reason}); what it holds is kept, start again to go on."
                         ) from None


def make_sampler(seed: int) -> Any:
    """Optuna's tree-structured Parzen estimator, which draws each trial from `seed` and the trial's number.

    Numbers are unique among the workers of a study and go on after a restart: no two draw alike.
    """
    import numpy as np
    from optuna.samplers import TPESampler

    class Sampler(TPESampler):
        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            # All that a sampler holds beside its settings is its generator, and there is no other way to seed it.
            super().__init__(seed=int(np.random.SeedSequence((seed, trial.number)).generate_state(1)[0]))

    return Sampler(seed=seed)


# ----------------------------------------------------------------------------------------------------------- report


def rows(worker: Search) -> Iterator[dict[str, Any]]:
    """A row for each trial, those that were lost included."""
    for trial in worker.study.get_trials(deepcopy=False):
        if "surplus" in trial.user_attrs:
            continue
        seconds = trial.duration.total_seconds() if trial.duration else None
        by = trial.user_attrs.get("worker", {})
        yield {"trial": trial.number, "state": trial.state.name.lower(),
               "valid_accuracy": trial.value,
               **{name: trial.params.get(name) for name in worker.space}, "epochs": trial.last_step,
               "seconds": None if seconds is None else round(seconds, 1),
               "worker": f"{by['host']}:{by['pid']}" if by else None, "error": trial.user_attrs.get("error")}


def report(worker: Search) -> None:
    """The table on the screen and as CSV, the picture, and the command of the best trial."""
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
    """On the left each trial's score in the order of their numbers, on the right how much each flag mattered."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    complete = completed(worker.trials())
    pruned = [trial for trial in worker.trials() if trial.state.name == "PRUNED"]
    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
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
    right.set(title="importance" if shares else "importance: too few complete trials", xlim=(0, 1),
              xlabel="share")
    with atomic_write(path, "wb") as file:
        picture.savefig(file, format="png", dpi=120)
    plt.close(picture)


def importances(worker: Search) -> dict[str, float]:
    """The share of each flag (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255), largest first; empty: unknown."""
    import optuna

    scores = [score(trial) for trial in completed(worker.trials())]
    if len(scores) < 4 or len(set(scores)) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(worker.study)
