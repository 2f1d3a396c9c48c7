"""The second stage: killed and resumed (law 4), repeated (law 5), refused (laws 3 and 6), and what a run leaves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_case
from conftest import Place
from helpers import (
    DIM,
    ENCODERS,
    answer,
    fix_flags,
    make_lines,
    malicious_zip,
    refusal,
    restore,
    same_weights,
    script,
    snapshot,
    weights,
    write_config,
    write_lines,
)

import evaluate
import preprocess
import train
from dataset import EncodedData
from sentence_classifier.errors import InputError
from sentence_classifier.labels import Labels
from text.labels import read_labels, write_labels
from training import trainer
from util import exclusive, load_checkpoint, load_state

# Everything that could make a resumed run stray: all kinds of dropout, averaging, accumulation with an incomplete
# group, evaluations within an epoch.
RICH = ["--epoch=4", "--batch_size=4", "--gradient_accumulation_steps=5", "--eval_and_save_steps=2", "--ema_decay=0.9",
        "--word_dropout=0.5", "--embedding_dropout=0.1", "--embedding_trainable", "--warmup_ratio=0.2", "--patience=99"]


def results(place: Place) -> dict[str, Any]:
    """The results JSON of training."""
    return json.loads(Path(f"{place.model}.train.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """The process dies here."""


def run_until(renames: int | None, flags: list[str]) -> int:
    """Train until the so many-th file is about to take its place (None: to the end). Returns how many did."""
    count = 0
    replace = os.replace

    def counted(*names: Any) -> None:
        nonlocal count
        if count == renames:
            raise Killed
        count += 1
        replace(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        try:
            train.main(flags)
        except Killed:
            pass
    return count


@pytest.mark.parametrize(("encoder", "every"), [("cnn", 3), ("gnb", 7), ("densenet-cnn", 9), ("densenet-dsa", 9)])
def test_dying_at_any_file_and_resuming(encoded: Place, tmp_path: Path, encoder: str, every: int) -> None:
    write_config(encoded.config, encoder)
    alone = encoded.copy(tmp_path / "alone")
    files = run_until(None, alone.train_flags(*RICH))
    assert files > 9
    for moment in range(0, files, every):
        place = encoded.copy(tmp_path / f"killed-{moment}")
        run_until(moment, place.train_flags(*RICH))
        train.main(place.train_flags(*RICH, "--resume"))
        assert same_weights(alone.model, place.model)
        assert results(alone)["history"] == results(place)["history"]


def test_dying_again_and_again(encoded: Place, tmp_path: Path) -> None:
    alone = encoded.copy(tmp_path / "alone")
    train.main(alone.train_flags(*RICH))
    while run_until(3, encoded.train_flags(*RICH, "--resume")) == 3:
        pass
    assert same_weights(alone.model, encoded.model) and results(alone)["history"] == results(encoded)["history"]


def check_whole(place: Place) -> None:
    """Every file under a final name is whole; what is not has a temporary name."""
    for path in place.root.iterdir():
        if path.name.startswith("."):
            assert path.name.endswith((".tmp", ".lock")), path
        elif path.name.startswith("model.pt"):
            assert path.suffix in (".pt", ".state", ".epoch") and load_state(path)["run"].identity


def kill_at(place: Place, flags: list[str], states: int, fraction: float) -> bool:
    """Start training, wait for so many new states and for a part of the time between two, kill; False: it had ended."""
    state = Path(f"{place.model}.state")

    def version() -> int | None:
        return state.stat().st_mtime_ns if state.exists() else None

    process = script("train.py", *flags)
    seen, last, moments = version(), time.monotonic(), []
    while process.poll() is None and len(moments) < states:
        if version() != seen:
            seen, now = version(), time.monotonic()
            moments.append(now - last)
            last = now
        time.sleep(0.001)
    if states:
        time.sleep(fraction * (min(moments[1:]) if len(moments) > 1 else 0.05))
    else:
        while process.poll() is None and not (place.root / "train.log").exists():
            time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("kills", "epochs"), [(3, 12), pytest.param(10, 40, marks=pytest.mark.matrix)])
def test_sigkill_and_resume(encoded: Place, tmp_path: Path, kills: int, epochs: int) -> None:
    flags = [*RICH, f"--epoch={epochs}"]
    alone = encoded.copy(tmp_path / "alone")
    train.main(alone.train_flags(*flags))
    draw = random.Random(1)
    killed = 0
    for states in (0, *(draw.randint(1, 5) for _ in range(kills))):
        killed += kill_at(encoded, encoded.train_flags(*flags, "--resume"), states, draw.random())
        check_whole(encoded)
    assert killed >= kills
    process = script("train.py", *encoded.train_flags(*flags, "--resume"))
    assert process.wait() == 0, process.communicate()[1]
    assert same_weights(alone.model, encoded.model) and results(alone)["history"] == results(encoded)["history"]


@pytest.mark.parametrize("flag", ["--max_vocab=9", "--n_ctx=3"])
def test_dying_while_preprocessing_is_noticed(encoded: Place, flag: str) -> None:
    before = snapshot(encoded.data)
    moved = 0

    def dies(source: Any, target: Any, replace: Callable[..., None] = os.replace) -> None:
        nonlocal moved
        moved += Path(target).parent == encoded.data
        if moved == moment:
            raise Killed
        replace(source, target)

    for moment in range(2, 7):  # the files that take their places: 1 embedding, 2 labels, 3 to 5 splits, 6 vocabulary
        moved = 0
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", dies)
            preprocess.main(encoded.preprocess_flags(flag))
        said = answer(train.main, *encoded.train_flags("--epoch=1"))
        changed = {name for name, content in snapshot(encoded.data).items() if content != before.get(name)}
        assert said is not None or not {"train.txt.ids", "valid.txt.ids"} & changed or moment == 6
        preprocess.main(encoded.preprocess_flags(flag))
        train.main(encoded.train_flags("--epoch=1"))
        restore(encoded.data, before)


def test_a_finished_run_has_nothing_to_resume(encoded: Place) -> None:
    train.main(encoded.train_flags())
    before = encoded.model.read_bytes()
    train.main(encoded.train_flags("--resume"))
    assert encoded.model.read_bytes() == before


@pytest.mark.parametrize("flag", ["--lr=0.5", "--seed=7", "--batch_size=9", "--epoch=9", "--measure=accuracy",
                                  "--ema_decay=.5", "--eval_and_save_steps=3", "--embedding_trainable",
                                  "--max_train_steps=3", "--criterion=LabelSmoothingCrossEntropy",
                                  "--gradient_accumulation_steps=2"])
def test_resume_with_other_flags(encoded: Place, flag: str) -> None:
    run_until(3, encoded.train_flags("--eval_and_save_steps=2"))
    before = encoded.model.read_bytes(), Path(f"{encoded.model}.state").read_bytes()
    said = refusal(train.main, *encoded.train_flags("--eval_and_save_steps=2", flag, "--resume"))
    assert "other flags" in said and flag.split("=")[0].removeprefix("--") in said
    assert before == (encoded.model.read_bytes(), Path(f"{encoded.model}.state").read_bytes())


def test_resume_with_other_config_or_data(encoded: Place) -> None:
    run_until(3, encoded.train_flags())
    other = write_config(encoded.root / "other.json", dropout=0.3)
    assert "another config or other data" in refusal(train.main, *encoded.train_flags(f"--config={other}", "--resume"))
    write_lines(encoded.data / "train.txt", make_lines(40, 9))
    preprocess.main(encoded.preprocess_flags())
    assert "another config or other data" in refusal(train.main, *encoded.train_flags("--resume"))


def test_other_configs_and_data_push_the_checkpoint_aside(encoded: Place) -> None:
    def trained(*flags: str) -> bytes:
        train.main(encoded.train_flags("--epoch=1", *flags))
        return encoded.model.read_bytes()

    def aside() -> list[bytes]:
        return [path.read_bytes() for path in sorted(encoded.root.glob("model.pt.previous*"))]

    first = trained()
    second = trained("--seed=1")
    assert first != second and aside() == []  # the same config and data
    third = trained(f"--config={write_config(encoded.root / 'other.json', 'gnb')}")
    assert aside() == [second]
    write_lines(encoded.data / "train.txt", make_lines(40, 9))
    preprocess.main(encoded.preprocess_flags())
    trained(f"--config={encoded.root / 'other.json'}")
    assert aside() == [second, third]


# --------------------------------------------------------------------------------------------------- same and other


@pytest.mark.parametrize("encoder", ENCODERS)
def test_same_seed_same_weights(raw: Place, tmp_path: Path, encoder: str) -> None:
    write_config(raw.config, encoder)
    places = [raw.copy(tmp_path / name) for name in ("one", "two", "other")]
    for place, flag in zip(places, ("--seed=3", "--seed=3", "--seed=4"), strict=True):
        preprocess.main([*place.preprocess_flags(), f"--embedding_path={raw.vectors}"])
        torch.rand(len(str(place)))  # what ran before does not matter
        train.main(place.train_flags("--word_dropout=0.5", flag))
    one, two, other = places
    assert snapshot(one.data) == snapshot(two.data)
    assert same_weights(one.model, two.model) and not same_weights(one.model, other.model)


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_files_of_a_run(encoded: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = snapshot(encoded.root)
    train.main(encoded.train_flags("--lr=0.02"))
    made = set(snapshot(encoded.root)) - set(before)
    events = {name for name in made if "events" in name}
    assert made - events == {"model.pt", "model.pt.state", "model.pt.train.json", "train.log", "runs",
                             str(Path(sorted(events)[0]).parent)}
    checkpoint = load_checkpoint(encoded.model)
    assert checkpoint.run.config == {**json.loads(encoded.config.read_text()), "tokenizer": "whitespace"}
    assert checkpoint.run.flags["lr"] == 0.02
    assert checkpoint.run.labels == read_labels(encoded.data / "label.txt")
    assert all((checkpoint.run.versions, checkpoint.run.git_revision, checkpoint.run.date, checkpoint.run.run_id))
    assert checkpoint.run.command.endswith(" --lr=0.02")
    found = results(encoded)
    assert found["best"] == checkpoint.metrics and found["run_id"] == checkpoint.run.run_id
    assert found["flags"]["lr"] == 0.02 and found["best"]["valid_loss"] == min(
        point["valid_loss"] for point in found["history"])
    log = (encoded.root / "train.log").read_text()
    assert log.count("train loss") == len(found["history"]) == 2 and "[best model]" in log and found["seconds"] > 0


def test_tensorboard_curves(encoded: Place) -> None:
    train.main(encoded.train_flags())
    (event,) = (encoded.root / "runs").rglob("events*")
    for name in (b"train/loss", b"valid/loss", b"valid/accuracy", b"lr"):
        assert name in event.read_bytes()


def test_config_settings_reach_the_run(encoded: Place) -> None:
    write_config(encoded.config, lr=0.003, epoch=1)
    flags = [flag for flag in encoded.train_flags() if not flag.startswith(("--lr", "--epoch"))]
    train.main(flags)
    assert results(encoded)["flags"]["lr"] == 0.003 and len(results(encoded)["history"]) == 1
    train.main([*flags, "--lr=0.004"])
    assert results(encoded)["flags"]["lr"] == 0.004


@pytest.mark.parametrize("trainable", [False, True])
def test_which_rows_train(encoded: Place, trainable: bool) -> None:
    write_config(encoded.config, "gnb")  # every word of a sentence has a part in the mean
    train.main(encoded.train_flags(*["--embedding_trainable"] * trainable))
    encoding = EncodedData(encoded.data / "train.txt.ids").encoding
    table = torch.from_numpy(np.load(encoded.data / "embedding.npy"))
    state = weights(encoded.model)
    rows = encoding.seen_rows if trainable else encoding.own_rows
    assert encoding.own_rows < encoding.seen_rows < len(table)
    assert [name for name in state if name.startswith("embedding")] == ["embedding.trainable"]
    moved = (state["embedding.trainable"] != table[:rows]).any(1)
    assert len(moved) == rows and moved[2:].all() and not moved[:2].any()  # <pad> and <unk> do not occur


def test_training_learns(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=12", "--embedding_trainable"))
    history, best = results(encoded)["history"], results(encoded)["best"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"] and best["valid_accuracy"] > 0.8


def test_restore(encoded: Place, tmp_path: Path) -> None:
    train.main(encoded.train_flags())
    train.main(encoded.train_flags("--lr=0", "--epoch=1", f"--restore_path={encoded.model}", "--save_path=second.pt"))
    assert same_weights(encoded.model, "second.pt")


def test_restore_refuses_weights_that_mean_something_else(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=1"))
    lines = (encoded.data / "train.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (encoded.data / "train.txt").write_text("".join(reversed(lines)), encoding="utf-8")  # same words, labels permuted
    preprocess.main(encoded.preprocess_flags())
    said = refusal(train.main, *encoded.train_flags(f"--restore_path={encoded.model}", "--save_path=second.pt"))
    assert "labels differ" in said and not Path("second.pt").exists()
    (encoded.root / "model.pt.state").rename(encoded.root / "other.pt")
    for main, flags in ((evaluate.main, encoded.evaluate_flags(f"--model_path={encoded.root}/other.pt")),
                        (train.main, encoded.train_flags(f"--restore_path={encoded.root}/other.pt"))):
        assert "other.pt: the state of a run, which holds no finished model" in refusal(main, *flags)


def test_restore_refuses_weights_trained_over_other_word_vectors(encoded: Place) -> None:
    """A checkpoint holds only the rows that were trained; the others are read from the table of the data."""
    train.main(encoded.train_flags("--epoch=1"))
    lines = [line.split(" ") for line in encoded.vectors.read_text(encoding="utf-8").splitlines()]
    encoded.vectors.write_text("".join(" ".join([*line[:-DIM], *(str(-float(x)) for x in line[-DIM:])]) + "\n"
                                       for line in lines), encoding="utf-8")
    preprocess.main(encoded.preprocess_flags())
    for more in ([], ["--embedding_trainable"]):
        said = refusal(train.main, *encoded.train_flags(f"--restore_path={encoded.model}", "--save_path=second.pt",
                                                        *more))
        assert said.startswith(f"{encoded.model}: its word vectors differ") and "without --restore_path" in said
    assert not Path("second.pt").exists()


# ------------------------------------------------------------------------------------------------- two runs at once


def test_of_two_runs_on_one_save_path_the_second_is_refused(encoded: Place) -> None:
    first = script("train.py", *encoded.train_flags("--epoch=9999", "--patience=9999"))
    try:
        while not Path(f"{encoded.model}.state").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        said = refusal(train.main, *encoded.train_flags("--epoch=1"))
        assert said == (f"--save_path={encoded.model}: another run is writing to it; wait for its end, or choose "
                        "another place.")
        assert "epoch=9999" in load_state(f"{encoded.model}.state")["run"].command
        train.main(encoded.train_flags("--epoch=1", f"--save_path={encoded.root / 'other.pt'}"))
    finally:
        first.kill()
        first.communicate()
    assert (encoded.root / f".{encoded.model.name}.lock").exists()  # of the killed run, which holds nobody up
    train.main(encoded.train_flags("--epoch=1"))
    assert not [path for path in encoded.root.iterdir() if path.name.endswith(".lock")]


def test_of_two_runs_on_one_transformers_folder_the_second_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "BERT")
    preprocess.main(case.flags())
    with exclusive("--bert_output_dir", str(case.root / "out")):
        said = refusal(train.main, *case.train_flags("--max_train_steps=1"))
    assert said.startswith(f"--bert_output_dir={case.root / 'out'}: another run is writing to it")
    assert not (case.root / "model.pt").exists() and not (case.root / "out").exists()
    train.main(case.train_flags("--max_train_steps=1"))
    assert (case.root / "out").is_dir()


def test_a_lock_that_was_removed_and_made_anew_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends, and removes its lock, between another's opening and its locking, while a third begins."""
    path, lock = tmp_path / "model.pt", tmp_path / ".model.pt.lock"
    flock = fcntl.flock

    def late(*given: Any) -> None:
        lock.unlink()
        lock.touch()
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is writing"), exclusive("--save_path", str(path)):
        pass


# ------------------------------------------------------------------------------------------------------- the recipe


def recipe(caplog: pytest.LogCaptureFixture) -> dict[str, dict[str, str]]:
    """The settings that the log tells, by their source."""
    (line,) = [message for message in caplog.messages if message.startswith("[recipe] ")]
    caplog.clear()
    parts = dict(part.split(": ", 1) for part in line.removeprefix("[recipe] ").split("; "))
    return {source: dict(pair.split("=") for pair in pairs.split(", ")) for source, pairs in parts.items()}


def test_the_log_tells_the_recipe_and_its_sources(encoded: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_config(encoded.config, lr=0.003, patience=5, word_dropout=0.25, embedding_trainable=True)
    train.main(encoded.train_flags("--lr=0.02", "--ema_decay=0", "--word_dropout=0.5", "--epoch=1"))
    said = recipe(caplog)
    assert set(said) == {"flag", "config", "default"}
    assert said["config"] == {"patience": "5", "embedding_trainable": "True"}
    assert {"lr": "0.02", "word_dropout": "0.5", "ema_decay": "0.0", "epoch": "1", "batch_size": "8",
            "precision": "no"} == said["flag"]  # what the user typed is told even where it is off
    assert said["default"]["weight_decay"] == "0.01" and said["default"]["measure"] == "loss"
    assert not {"rdrop", "lora_r", "bert_model_name_or_path", "lr", "max_train_steps"} & set(said["default"])
    # Each setting is told once, and as the checkpoint has it.
    told = [(name, value) for settings in said.values() for name, value in settings.items()]
    assert len({name for name, _ in told}) == len(told)
    flags = load_checkpoint(encoded.model).run.flags
    assert all(str(flags[name]) == value for name, value in told)


@pytest.mark.parametrize("more", [[], ["--resume", "--enable_qat"], ["--hp_search_optuna", "--hp_trials=1"]])
def test_nothing_writes_to_the_flags(encoded: Place, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    fix_flags(train, monkeypatch)
    train.main(encoded.train_flags("--epoch=1", *more))


def test_resume_before_the_first_evaluation_ignores_an_older_run(encoded: Place, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(encoded.train_flags("--epoch=1", "--seed=9"))
    flags = encoded.train_flags("--seed=3")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(trainer.Trainer, "train_epoch", interrupted)
        train.main(flags)
    assert end.value.code == 130
    train.main([*flags, "--resume"])
    train.main([*flags, f"--save_path={tmp_path / 'alone.pt'}"])
    assert same_weights(encoded.model, tmp_path / "alone.pt")


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_changed_valid_data_are_other_data(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=1"))
    with open(encoded.data / "valid.txt", "a", encoding="utf-8") as file:
        file.write("play jazz\tPlayMusic\n")
    preprocess.main(encoded.preprocess_flags())
    assert "other data" in refusal(train.main, *encoded.train_flags("--epoch=1", "--resume"))
    train.main(encoded.train_flags("--epoch=1"))
    assert Path(f"{encoded.model}.previous").exists()


def test_reduced_precision_still_evaluates_in_fp32(encoded: Place) -> None:
    train.main(encoded.train_flags("--mixed_precision=bf16"))
    assert {value.dtype for value in weights(encoded.model).values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ logits as labels


@pytest.fixture
def teacher(raw: Place) -> Place:
    """Data whose training labels are a teacher's logits."""
    names = Labels(("PlayMusic", "GetWeather", "book a table", "none of these"))
    write_labels(names, raw.data / "label.txt")
    noise = np.random.default_rng(0)
    lines = [(sentence, " ".join(f"{x:.3f}" for x in 4 * np.eye(4)[names.index()[label]] + noise.normal(size=4)))
             for sentence, label in make_lines(60, 0)]
    write_lines(raw.data / "train.txt", lines)
    preprocess.main(raw.preprocess_flags())
    return raw


@pytest.mark.parametrize("encoder", ["gnb", "cnn"])
@pytest.mark.parametrize("criterion", ["CrossEntropyLoss", "LabelSmoothingCrossEntropy", "MSELoss", "KLDivLoss"])
def test_learning_from_logits(teacher: Place, criterion: str, encoder: str) -> None:
    write_config(teacher.config, encoder, dropout=0.0)
    train.main(teacher.train_flags(f"--criterion={criterion}", "--epoch=8", "--embedding_trainable"))
    history = results(teacher)["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] and results(teacher)["best"]["valid_accuracy"] > 0.6


def test_learning_from_augmented_logits(encoded: Place, teacher: Place) -> None:
    shutil.copy(teacher.data / "train.txt", encoded.data / "augmented.txt")
    preprocess.main(encoded.preprocess_flags("--augmented", "--augmented_filename=augmented.txt",
                                             f"--logits_order={teacher.data / 'label.txt'}"))
    train.main(encoded.train_flags("--augmented", "--criterion=MSELoss", "--epoch=8", "--word_dropout=1"))
    assert results(encoded)["best"]["valid_accuracy"] > 0.6
    assert load_checkpoint(encoded.model).run.encoding.sentences == 60


@pytest.mark.parametrize("criterion", ["MSELoss", "KLDivLoss"])
def test_criteria_that_need_logits(encoded: Place, criterion: str) -> None:
    assert "learns from a teacher's logits" in refused_without_a_trace(encoded, f"--criterion={criterion}")


def test_class_weights_need_no_more_than_a_flag(encoded: Place) -> None:
    train.main(encoded.train_flags("--class_weights=balanced"))


def test_class_weights_from_a_file(encoded: Place) -> None:
    path = encoded.root / "weights.json"
    made = {}
    for name, found in (("none", None), ("ones", {"PlayMusic": 1}), ("many", {"PlayMusic": 50, "GetWeather": 0.5})):
        path.write_text(json.dumps(found))
        made[name] = encoded.root / f"{name}.pt"
        train.main(encoded.train_flags(f"--class_weights={path if found else 'none'}", f"--save_path={made[name]}"))
    assert same_weights(made["none"], made["ones"]) and not same_weights(made["none"], made["many"])


@pytest.mark.parametrize(("content", "says"), [
    ('{"PlayMusik": 2}', "no label 'PlayMusik' in"), ('{"PlayMusic": -1}', "the weight of 'PlayMusic' is -1"),
    ('{"PlayMusic": "2"}', "the weight of 'PlayMusic' is '2'"), ("[2]", "a JSON object is expected"),
    ("{", "weights.json: not JSON")])
def test_class_weights_that_cannot_be_used(encoded: Place, content: str, says: str) -> None:
    path = encoded.root / "weights.json"
    path.write_text(content)
    assert says in refused_without_a_trace(encoded, f"--class_weights={path}")
    assert "weights.txt' is neither none nor balanced nor a .json file" in refused_without_a_trace(
        encoded, "--class_weights=weights.txt")


# ---------------------------------------------------------------------------------------------------------- refused


def refused_without_a_trace(place: Place, *flags: Any) -> str:
    before = snapshot(place.data)
    said = refusal(train.main, *place.train_flags(*flags))
    assert snapshot(place.data) == before
    assert not [path.name for path in place.root.iterdir() if path.name.startswith((".", "model.pt"))]
    return said


def edit_labels(data: Path) -> None:
    names = read_labels(data / "label.txt").names
    write_labels(Labels(tuple(reversed(names))), data / "label.txt")


def other_table(data: Path) -> None:
    np.save(data / "embedding.npy", np.load(data / "embedding.npy")[::-1].copy())


def append(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(data: Path) -> None:
        with open(data / name, "ab") as file:
            file.write(content)
    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:-5]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes(content) and None


@pytest.mark.parametrize(("damage", "names"), [
    (edit_labels, "label.txt"), (write("label.txt", b"\xff\n"), "label.txt"), (write("label.txt", b""), "label.txt"),
    (append("label.txt", b"one more\n"), "label.txt"), (remove("label.txt"), "label.txt"),
    (append("train.txt", b"new\tPlayMusic\n"), "train.txt.ids"), (append("valid.txt", b"x"), "valid.txt.ids"),
    (cut("train.txt.ids"), "train.txt.ids"), (write("train.txt.ids", b""), "train.txt.ids"),
    (remove("valid.txt.ids"), "valid.txt.ids"), (append("vocab.txt", b"new\n"), "vocab.txt"),
    (remove("vocab.txt"), "vocab.txt"), (other_table, "embedding.npy"), (cut("embedding.npy"), "embedding.npy"),
    (remove("embedding.npy"), "embedding.npy"), (write("embedding.npy", b"\x80\x04."), "embedding.npy"),
])
def test_damaged_data(encoded: Place, damage: Callable[[Path], None], names: str) -> None:
    damage(encoded.data)
    assert refused_without_a_trace(encoded).startswith(str(encoded.data / names))


@pytest.mark.parametrize("flag", ["--max_vocab=9", "--n_ctx=3"])
def test_valid_data_of_another_encoding(encoded: Place, tmp_path: Path, flag: str) -> None:
    other = encoded.copy(tmp_path / "other")
    preprocess.main(other.preprocess_flags(flag))
    shutil.copy(other.data / "valid.txt.ids", encoded.data)
    assert "not encoded together" in refused_without_a_trace(encoded)


@pytest.mark.parametrize("changes", [{"lowercase": False}, {"tokenizer": "punctuation"}])
def test_config_that_differs_from_the_encoding(encoded: Place, changes: dict[str, Any]) -> None:
    write_config(encoded.config, **changes)
    assert f"{next(iter(changes))} is" in refused_without_a_trace(encoded)


@pytest.mark.parametrize(("flag", "says"), [
    ("--device=cdua", "--device cdua"), ("--fp16", "fp16 needs a CUDA device"),
    ("--restore_path=missing.pt", "missing.pt: no such checkpoint"), ("--data_dir=nowhere", "nowhere/train.txt.ids"),
    ("--config=missing.json", "missing.json: no such file"), ("--embedding_filename=x.npy", "x.npy: no such file"),
    ("--augmented", "augmented.txt.ids: no such file"), ("--log_path=/nowhere/train.log", "/nowhere/train.log"),
])
def test_flags_that_cannot_be_followed(encoded: Place, flag: str, says: str) -> None:
    assert says in refused_without_a_trace(encoded, flag)


def test_restoring_what_does_not_fit(encoded: Place) -> None:
    train.main([*encoded.train_flags(), "--save_path=first.pt"])
    write_config(encoded.config, num_filters=3)
    assert "do not fit" in refused_without_a_trace(encoded, "--restore_path=first.pt")
    malicious_zip(Path("evil.pt"))
    assert "evil.pt: not a whole checkpoint" in refused_without_a_trace(encoded, "--restore_path=evil.pt")
    assert not Path("executed").exists()


def test_resuming_from_what_is_no_state(encoded: Place) -> None:
    malicious_zip(Path(f"{encoded.model}.state"))
    assert "model.pt.state: not a whole checkpoint" in refusal(train.main, *encoded.train_flags("--resume"))
    assert not Path("executed").exists()


def test_loss_that_is_no_number_leaves_the_best_checkpoint(encoded: Place) -> None:
    train.main(encoded.train_flags())
    before = encoded.model.read_bytes()
    assert "loss is" in refusal(train.main, *encoded.train_flags("--lr=1e30"))
    assert before == encoded.model.read_bytes()


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("encoder", ["gnb", "cnn"])
def test_one_epoch_on_snips(shared: Path, tmp_path: Path, encoder: str) -> None:
    from helpers import ROOT

    shutil.copytree(shared / "data" / "snips", tmp_path / "snips")
    (tmp_path / "vectors.txt").symlink_to(shared / "embeddings" / "glove.6B.300d.subset.txt")
    common = [f"--config={ROOT / f'configs/config-glove-{encoder}.json'}", f"--data_dir={tmp_path / 'snips'}"]
    preprocess.main([*common, f"--embedding_path={tmp_path / 'vectors.txt'}"])
    train.main([*common, "--epoch=1", "--lr=1e-3", "--batch_size=64", "--device=cpu", "--embedding_trainable"])
    best = json.loads(Path("pytorch-model.pt.train.json").read_text())["best"]
    assert best["valid_accuracy"] > 0.9


# ------------------------------------------------------------------------------------------- a full disk, old models


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("file", ["model.pt", "model.pt.state"])
def test_a_full_disk_loses_nothing(encoded: Place, tmp_path: Path, file: str) -> None:
    alone = encoded.copy(tmp_path / "alone")
    train.main(alone.train_flags(*RICH))
    run_until(12, encoded.train_flags(*RICH))
    before = snapshot(encoded.root)
    with files_up_to(len(before[file] or b"") - 1):
        said = refusal(train.main, *encoded.train_flags(*RICH, "--resume"))
    assert f"{file}: cannot be written (File too large)" in said and "--resume" in said
    check_whole(encoded)
    after = snapshot(encoded.root)
    assert before["model.pt.state"] == after["model.pt.state"]
    assert (before["model.pt"] == after["model.pt"]) or file == "model.pt.state"
    train.main(encoded.train_flags(*RICH, "--resume"))
    assert same_weights(alone.model, encoded.model) and results(alone)["history"] == results(encoded)["history"]


def test_keeping_checkpoints(encoded: Place) -> None:
    train.main(encoded.train_flags("--epoch=5", "--measure=last", "--keep_checkpoints=2"))
    kept = [load_checkpoint(f"{encoded.model}{number}").metrics["epoch"] for number in ("", ".1", ".2")]
    assert kept == [5, 4, 3] and not Path(f"{encoded.model}.3").exists()
    evaluate.main(encoded.evaluate_flags(f"--model_path={encoded.model}.2"))


def test_the_end_of_the_last_epoch_stays_within_reach(encoded: Place) -> None:
    """Another number of processes goes on from there: within an epoch, it would not know what is left of it."""
    run_until(4, encoded.train_flags("--eval_and_save_steps=4"))  # 6 steps an epoch: one file at the start, three here
    assert load_state(f"{encoded.model}.state")["progress"]["position"] == 4
    assert load_state(f"{encoded.model}.state.epoch")["progress"]["step"] == 0
    assert trainer.find_state(str(encoded.model), 1)["progress"]["step"] == 4
    assert trainer.find_state(str(encoded.model), 2)["progress"]["step"] == 0
    train.main(encoded.train_flags("--eval_and_save_steps=4", "--resume"))
    assert not Path(f"{encoded.model}.state.epoch").exists()
