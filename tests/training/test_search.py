"""Hyper-parameter search: several workers on one study, one of them killed, the best command."""

from __future__ import annotations

import csv
import gc
import json
import multiprocessing
import os
import shlex
import signal
import sqlite3
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import Place
from helpers import refusal, same_weights, script, write_config

import train
from training import run as training_run
from training import search, trainer
from training.search import open_storage

STORAGES = ["sqlite:///study.db", "study.journal"]
SPACE = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}, "batch_size": [4, 8], "seed": {"low": 17, "high": 42},
         "epoch": {"low": 1, "high": 2}, "embedding_trainable": [True, False]}


def flags(place: Place, *more: Any, trials: int = 6, space: Any = SPACE) -> list[str]:
    """A search's command line."""
    (place.root / "space.json").write_text(json.dumps(space), encoding="utf-8")
    return place.train_flags("--hp_search_optuna", f"--hp_trials={trials}", f"--hp_space={place.root / 'space.json'}",
                             "--hp_study=s", *more)


def load(storage: str) -> optuna.Study:
    """The study."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name="s", storage=open_storage(storage))


def trials(storage: str) -> list[optuna.trial.FrozenTrial]:
    """All trials of the study."""
    return load(storage).get_trials()


def wait_for_a_trial(storage: str, matching: Callable[[optuna.trial.FrozenTrial], bool],
                     alive: Callable[[], bool]) -> int:
    """The number of the first running trial that matches."""
    study = None
    while True:
        assert alive()
        time.sleep(0.1)
        try:
            study = study or (load(storage) if Path(storage.removeprefix("sqlite:///")).exists() else None)
        except KeyError:  # it is not there yet
            continue
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) if study else []:
            if "command" in trial.user_attrs and matching(trial):
                return trial.number


def states(storage: str) -> Counter[str]:
    """How many trials of each state there are, but for those that two workers began at once."""
    return Counter(trial.state.name for trial in trials(storage) if "surplus" not in trial.user_attrs)


@pytest.fixture(scope="session")
def warm(trained_once: Place) -> None:
    """A process that has trained, opened a database and drawn: those that branch off it need not load all that."""
    import matplotlib.pyplot  # noqa: F401

    open_storage("sqlite://")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that cost nothing; a later one is the worse."""

    def run(args: Any, config: Any, on_epoch: Callable[[int, dict[str, float]], None]) -> dict[str, Any]:
        metrics = {"valid_accuracy": 0.9 - int(Path(args.save_path).stem) / 100}
        for epoch in range(1, args.epoch + 1):
            on_epoch(epoch, metrics)
        return metrics

    monkeypatch.setattr(train, "run", run)


def worker(target: Callable[..., None], *arguments: Any) -> Any:
    """A worker in a process of its own, which finds loaded what takes long to load; see `warm`."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


# ---------------------------------------------------------------------------------------------------- several workers


def check_whole(storage: str, count: int, place: Place, lost: int = 0) -> None:
    """So many trials were trained, none twice, and the best one's files alone are left."""
    found = states(storage)
    assert found["COMPLETE"] + found["PRUNED"] == count and found["FAIL"] == lost and found["RUNNING"] == 0
    drawn = [str(trial.params) for trial in trials(storage) if trial.params]
    assert len(set(drawn)) == len(drawn) == count + lost
    folder = Path(f"{place.model}.trials/s")
    with open(folder / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count + lost
    best = max((row for row in rows if row["state"] == "complete"),
               key=lambda row: (float(row["valid_accuracy"]), -int(row["trial"])))
    assert {path.name for path in folder.iterdir()} == {
        "trials.csv", "trials.png", *(f"{best['trial']}.pt{end}" for end in ("", ".state", ".train.json"))}


def meeting(argv: list[str], both: Any) -> None:
    """A worker that has the other one begin a trial, too, before it trains its first: else it may do all of them."""
    run, met = train.run, []

    def run_together(*given: Any) -> dict[str, Any]:
        if not met:
            met.append(both.wait(120))
        return run(*given)

    train.run = run_together
    train.main(argv)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("storage", STORAGES)
def test_two_workers_share_the_trials(encoded: Place, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    both = multiprocessing.get_context("fork").Barrier(2)
    workers = [worker(meeting, flags(encoded, f"--hp_storage={storage}"), both) for _ in range(2)]
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert "Traceback" not in capfd.readouterr().err
    check_whole(storage, 6, encoded)
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials(storage)}) == 2


def hanging(argv: list[str], host: str | None) -> None:
    """A worker that never comes out of trial 1, on another host where one is named."""
    run = train.run

    def hang(args: Any, config: Any, on_epoch: Any) -> dict[str, Any]:
        if Path(args.save_path).name == "1.pt":
            time.sleep(600)
        return run(args, config, on_epoch)

    train.run = hang
    if host:
        search.socket.gethostname = lambda: host
    train.main(argv)


def killed_in_a_trial(storage: str, argv: list[str], host: str | None = None) -> None:
    process = worker(hanging, argv, host)
    wait_for_a_trial(storage, lambda trial: trial.number == 1 and "worker" in trial.user_attrs, process.is_alive)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("storage", STORAGES)
def test_a_killed_workers_trial_is_replaced(encoded: Place, storage: str, caplog: pytest.LogCaptureFixture) -> None:
    argv = flags(encoded, f"--hp_storage={storage}", trials=4)
    killed_in_a_trial(storage, argv)
    assert states(storage) == {"COMPLETE": 1, "RUNNING": 1}
    train.main(argv)
    assert "[trial 1] its worker is gone: marked failed" in caplog.text
    check_whole(storage, 4, encoded, lost=1)
    assert trials(storage)[1].state.name == "FAIL"


@pytest.mark.usefixtures("warm")
def test_a_worker_killed_on_another_host_misses_its_heartbeat(encoded: Place, monkeypatch: pytest.MonkeyPatch,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    monkeypatch.setattr(search, "GRACE", 2)
    argv = flags(encoded, f"--hp_storage={STORAGES[0]}", trials=3)
    killed_in_a_trial(STORAGES[0], argv, "elsewhere")
    train.main(argv)
    assert "[trial 1] no sign of life" in caplog.text
    check_whole(STORAGES[0], 3, encoded, lost=1)


@pytest.mark.usefixtures("warm")
def test_a_journal_does_not_wait_for_other_hosts(encoded: Place) -> None:
    argv = flags(encoded, f"--hp_storage={STORAGES[1]}", trials=3)
    killed_in_a_trial(STORAGES[1], argv, "elsewhere")
    train.main(argv)
    found = states(STORAGES[1])
    assert found["COMPLETE"] + found["PRUNED"] == 2 and found["RUNNING"] == 1  # there it may go on


def test_half_written_files_of_killed_workers_go(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    study.ask()  # trial 2, of a worker that writes just now
    for number in range(3):
        (tmp_path / f".{number}.pt.99.tmp").touch()
        for name in (f".{number}.bert-x1y2", f"{number}.bert"):
            (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / ".trials.csv.99.tmp").touch()
    search.Search(study, False, {}, [], tmp_path, 3, train.make_parser(), train.get_params, train.run).remove_beaten()
    assert {path.name for path in tmp_path.iterdir()} == {
        ".trials.csv.99.tmp", *(name for number in (0, 2) for name in (
            f".{number}.pt.99.tmp", f".{number}.bert-x1y2", f"{number}.bert"))}


def test_a_best_trial_that_ends_meanwhile_keeps_its_files(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    for number in range(2):
        (tmp_path / f"{number}.pt").touch()
    (tmp_path / ".0.pt.state.99.tmp").touch()  # its worker was killed while it wrote
    asked = study.get_trials

    def get_trials(**options: Any) -> list[optuna.trial.FrozenTrial]:
        """As they are, and right afterwards another worker's better trial ends."""
        before = asked(**options)
        if len(before) == 1:
            study.add_trial(optuna.trial.create_trial(value=0.9))
        return before

    worker = search.Search(study, False, {}, [], tmp_path, 2, train.make_parser(), train.get_params, train.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "get_trials", get_trials)
        worker.remove_beaten()
        assert (tmp_path / "1.pt").exists()
    worker.remove_beaten()
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]


@pytest.mark.timeout(60)  # else it would begin trials for ever
def test_an_error_of_the_training_itself_ends_the_search(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: Any) -> None:
        raise ValueError("of its own")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(ValueError, match="of its own"):
        train.main(flags(encoded, trials=2))


@pytest.mark.usefixtures("untrained")
def test_a_trial_given_up_by_others_may_miss_its_files(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, run = STORAGES[0], train.run

    def run_suspended(args: Any, *given: Any) -> Any:
        if Path(args.save_path).stem == "1":
            load(storage).tell(1, state=optuna.trial.TrialState.FAIL)
            raise FileNotFoundError(args.save_path)
        return run(args, *given)

    monkeypatch.setattr(train, "run", run_suspended)
    train.main(flags(encoded, f"--hp_storage={storage}", trials=3))
    assert states(storage)["FAIL"] == 1 and states(storage)["RUNNING"] == 0 and len(trials(storage)) == 4


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("storage", STORAGES)
def test_24_trials_of_two_workers_one_killed(encoded: Place, storage: str) -> None:
    argv = flags(encoded, f"--hp_storage={storage}", trials=24)
    first, second = (script("train.py", *argv, f"--log_path={name}.log") for name in "ab")
    killed = wait_for_a_trial(
        storage, lambda trial: trial.number > 5 and trial.user_attrs["worker"]["pid"] == first.pid,
        lambda: first.poll() is None)
    first.kill()
    first.communicate()
    said, errors = second.communicate()
    assert second.returncode == 0 and "Traceback" not in errors and "python train.py" in said
    assert trials(storage)[killed].state.name == "FAIL"
    check_whole(storage, 24, encoded, lost=1)


def test_an_interrupted_search_goes_on(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = flags(encoded, trials=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(search.Search, "remove_beaten", lambda self: patch.setattr(training_run, "describe", interrupt))
        train.main(argv)
    assert end.value.code == 130
    storage = f"{encoded.model}.trials/study.journal"
    assert states(storage) == {"COMPLETE": 1, "FAIL": 1}
    train.main(argv)
    check_whole(storage, 4, encoded, lost=1)
    before = trials(storage)
    train.main(argv)  # nothing is left to do
    assert trials(storage) == before


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("untrained")
def test_a_trial_too_many_is_not_trained(encoded: Place, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers that see the last trial free at the same moment: here the second one saw so too late."""
    work = search.Search.work

    def one_more(self: search.Search) -> None:
        work(self)
        self.run_trial()

    monkeypatch.setattr(search.Search, "work", one_more)
    train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", trials=2))
    assert len(trials(STORAGES[1])) == 3 and trials(STORAGES[1])[2].params == {}
    assert states(STORAGES[1]) == {"COMPLETE": 2}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["0", "1"]


# ------------------------------------------------------------------------------------------------------------ trials


def test_the_best_command_trains_the_best_model_again(encoded: Place, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(flags(encoded, "--measure=accuracy", "--word_dropout=0.5", "--rdrop=1"))
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if line.startswith("python train.py "))
    best = next(line.split()[0] for line in said.splitlines() if " *  " in line)
    folder = Path(f"{encoded.model}.trials/s")
    train.main(shlex.split(command)[2:])
    found, expected = (json.loads(Path(f"{path}.train.json").read_text()) for path in (encoded.model,
                                                                                      folder / f"{best}.pt"))
    assert found["history"] == expected["history"] and found["best"] == expected["best"]
    assert same_weights(encoded.model, folder / f"{best}.pt")
    assert f"valid accuracy {found['best']['valid_accuracy']:.4f}" in said
    assert (folder / "trials.png").read_bytes().startswith(b"\x89PNG")
    assert "hp_" not in command and expected["command"] == command.removeprefix("python ")


@pytest.mark.usefixtures("untrained")
def test_draws_depend_on_the_seed_and_the_trials_number_alone(encoded: Place) -> None:
    def drawn(name: str, *more: str) -> list[dict[str, Any]]:
        train.main(flags(encoded, f"--hp_storage={name}", *more, trials=3))
        return [trial.params for trial in trials(name)]

    first = drawn("one.log")
    assert drawn("two.log") == first and len({str(params) for params in first}) == 3
    assert drawn("three.log", "--hp_sampler_seed=9") != first


@pytest.mark.usefixtures("untrained")
def test_weak_trials_are_pruned(encoded: Place) -> None:
    space = {"epoch": [3, 4], "lr": SPACE["lr"]}
    train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", space=space, trials=8))
    assert [trial.state.name for trial in trials(STORAGES[1])] == ["COMPLETE"] * 5 + ["PRUNED"] * 3
    assert [trial.last_step for trial in trials(STORAGES[1])][5:] == [1] * 3


def test_diverged_trials_count_and_end(encoded: Place, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(train.main, *flags(encoded, f"--hp_storage={STORAGES[1]}", space={"lr": [1e30, 1e31]}, trials=2))
    assert said.startswith("no trial came to its end")
    assert all("loss is" in trial.user_attrs["error"] for trial in trials(STORAGES[1]))
    assert capsys.readouterr().out.count("fail") == 2


def test_flags_that_only_together_are_refused_fail_a_trial(encoded: Place, monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    get_params = train.get_params

    def refusing(argv: list[str]) -> Any:
        args, config = get_params(argv)
        if args.lr == 0.1 and args.batch_size == 4:
            train.make_parser().error("--lr and --batch_size do not go together")
        return args, config

    monkeypatch.setattr(train, "get_params", refusing)
    space = {"lr": [0.1, 0.01], "batch_size": [4, 8]}
    train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", "--epoch=1", space=space, trials=8))
    refused = [trial for trial in trials(STORAGES[1]) if trial.params == {"lr": 0.1, "batch_size": 4}]
    assert refused and len(trials(STORAGES[1])) == 8 and states(STORAGES[1])["FAIL"] == len(refused)
    for trial in refused:
        assert trial.user_attrs["error"] == "--lr and --batch_size do not go together"
        assert f"[trial {trial.number}] failed: --lr and --batch_size do not go together" in caplog.text


def test_a_trial_too_large_for_the_machines_memory_fails(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train.run

    def large(args: Any, *given: Any) -> Any:
        torch.empty(1 << 50 if Path(args.save_path).stem == "0" else 1)
        return run(args, *given)

    monkeypatch.setattr(train, "run", large)
    train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", trials=2))
    assert [trial.state.name for trial in trials(STORAGES[1])] == ["FAIL", "COMPLETE"]
    assert "can't allocate memory" in trials(STORAGES[1])[0].user_attrs["error"]


def test_ended_trials_leave_no_model_behind(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete, diverged and pruned ones; a trial begins with no other model in memory."""
    living: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    counts = []
    new_model, train_epoch = training_run.new_model, trainer.Trainer.train_epoch

    def count(*given: Any) -> Any:
        counts.append(len(living))
        living.add(model := new_model(*given))
        return model

    def end(self: trainer.Trainer, bar: Any) -> None:
        train_epoch(self, bar)
        if len(counts) == 3:
            raise optuna.TrialPruned
        if len(counts) == 4:
            torch.empty(1 << 50)  # no memory
        if len(counts) == 5:
            raise trainer.Diverged("the loss is nan")

    monkeypatch.setattr(training_run, "new_model", count)
    monkeypatch.setattr(trainer.Trainer, "train_epoch", end)
    gc.disable()  # whenever it may come by itself
    try:
        train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", space={"seed": {"low": 1, "high": 99}}, trials=6))
    finally:
        gc.enable()
    assert states(STORAGES[1]) == {"COMPLETE": 3, "PRUNED": 1, "FAIL": 2} and counts == [0] * 6
    assert len(living) == 0


def test_what_ends_a_training_ends_the_search(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "model.pt")

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    assert refusal(train.main, *flags(encoded)) == "model.pt: No space left on device."


@pytest.mark.usefixtures("untrained")
def test_lists_of_layers_and_steps(encoded: Place) -> None:
    space = {"bert_remove_layers": ["0,1", "2"], "weight_decay": {"low": 0, "high": 0.1, "step": 0.05},
             "patience": {"low": 2, "high": 8, "step": 2}, "rdrop": {"low": 0, "high": 4, "step": 1}}
    train.main(flags(encoded, f"--hp_storage={STORAGES[1]}", space=space, trials=3))
    for trial in trials(STORAGES[1]):
        assert f"--bert_remove_layers={trial.params['bert_remove_layers']} " in trial.user_attrs["command"] + " "
        assert trial.params["weight_decay"] in (0, 0.05, 0.1) and trial.params["patience"] in (2, 4, 6, 8)
        assert trial.params["rdrop"] in range(5)


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("more", "says"), [
    ("--hp_storage=study", "--hp_storage=study: neither a database's URL"), ("--resume", "--resume: a search goes on"),
    ("--hp_storage=nosuch://user:secret@host/base", "--hp_storage: host/base cannot be opened"),
    ("--hp_storage=sqlite:////nowhere/s.db", "--hp_storage: sqlite:////nowhere/s.db cannot be opened"),
    ("--hp_study=a/b", "--hp_study=a/b: letters"), ("--data_dir=nowhere", "nowhere/train.txt.ids: no such file"),
])
def test_searches_that_cannot_begin(encoded: Place, more: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PAUSE", 0.01)
    said = refusal(train.main, *flags(encoded, more))
    assert said.startswith(says) and "secret" not in said


def test_one_process_alone(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refusal(train.main, *flags(encoded))


@pytest.mark.usefixtures("untrained")
def test_a_study_of_another_config(encoded: Place) -> None:
    train.main(flags(encoded, trials=1))
    write_config(encoded.config, num_filters=3)
    assert refusal(train.main, *flags(encoded)).startswith("--hp_study=s: was begun with another config")


@pytest.mark.usefixtures("untrained")
def test_journals(encoded: Place, caplog: pytest.LogCaptureFixture) -> None:
    train.main(flags(encoded, "--hp_storage=study.log", trials=1))
    with open("study.log", "ab") as file:
        file.write(b'{"op_code": 4, "worker')  # a disk was full
    assert states("study.log") == {"COMPLETE": 1} and "ends within a line" in caplog.text
    other = Path("other.log").resolve()
    for content in ("INFO: some other log\n", '{"epoch": 1}\n'):
        other.write_text(content)
        assert refusal(train.main, *flags(encoded, f"--hp_storage={other}")).startswith(f"{other}: not a journal")
        assert other.read_text() == content


@pytest.mark.usefixtures("untrained")
def test_names_of_studies_follow_what_decides(encoded: Place) -> None:
    def name(*more: str) -> str:
        argv = [flag for flag in flags(encoded, "--hp_storage=study.log", trials=1) if "hp_study" not in flag]
        train.main([*argv, *more])
        return optuna.get_all_study_names(open_storage("study.log"))[-1]

    one = name()
    assert one.startswith("config-") and name("--save_path=other.pt", "--lr=0.3") == one  # lr is searched
    assert name("--weight_decay=0.3") != one


# --------------------------------------------------------------------------------------------- Optuna's private names


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_heartbeat_is_written_to_the_database() -> None:
    study = optuna.create_study(storage=open_storage("sqlite:///study.db"))
    trial = study.ask()
    with sqlite3.connect("study.db") as database:
        count = "SELECT count(*) FROM trial_heartbeats"
        assert database.execute(count).fetchone() == (0,)
        search.send_heartbeat(study, trial)
        assert database.execute(count).fetchone() == (1,)


warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
