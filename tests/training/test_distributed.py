"""Several processes and DeepSpeed: the same model as one process gives, every example once, lost processes, launchers.

Starting a process costs seconds, so that one pair of processes runs all trainings that are compared.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, make_case
from conftest import Place
from helpers import ROOT, make_data, refusal, same_weights, write_config

import evaluate
import preprocess
import train
from sentence_classifier.errors import InputError
from training import distributed
from util import load_checkpoint

# 49 sentences in batches of 8: in the last batch, and in the last of the valid data, the second process has none.
SIZES = (49, 17, 21)
STEPS = ["--max_train_steps=50", "--epoch=20", "--patience=99", "--eval_and_save_steps=1"]
FEWER = [*STEPS, "--max_train_steps=9"]
WHOLE, HALF, QUARTERS, EIGHTHS = (
    [f"--batch_size={size}", f"--gradient_accumulation_steps={steps}", f"--eval_batch_size={size * steps}"]
    for size, steps in ((8, 1), (4, 1), (2, 4), (1, 4)))
# Dropout of two kinds, averaging, accumulation, evaluations within an epoch: of a run that is killed.
RICH = ["--epoch=6", "--batch_size=2", "--gradient_accumulation_steps=3", "--eval_and_save_steps=2",
        "--ema_decay=0.9", "--word_dropout=0.5", "--embedding_trainable", "--patience=99", "--measure=last"]
TRAIN_ALL = """
import json, os, sys, train, util
os.fsync = lambda descriptor: None
util.setup_logging()
for argv in json.load(open(sys.argv[1])):
    train.run(*train.get_params(argv))
"""


def in_processes(*command: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start Python in so many processes, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**environment(), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def join(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the processes said; all have to end well."""
    said = [process.communicate(timeout=800)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return said


def history(path: Path) -> list[dict[str, float]]:
    return json.loads(Path(f"{path}.train.json").read_text())["history"]


def make_gpt(root: Path, count: int = SIZES[0]) -> Case:
    """A tiny GPT-2 without dropout and its encoded data."""
    case = make_case(root, "GPT-2")
    for file, size in (("train.txt", count), ("valid.txt", 17)):
        lines = (root / "data" / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / "data" / file).write_text("".join(lines[:size]), encoding="utf-8")
    for path in (root / "config.json", root / "model" / "config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: 0.0 if "drop" in key else value for key, value in config.items()}))
    preprocess.main(case.flags())
    return case


class Runs:
    """Trainings of a GloVe-CNN and a GPT-2, by name, in one process and in two."""

    def __init__(self, root: Path, raw: Place) -> None:
        self.glove = raw.copy(root / "glove")
        make_data(self.glove.data, SIZES)
        write_config(self.glove.config, dropout=0.0)
        preprocess.main(self.glove.preprocess_flags())
        self.gpt = make_gpt(root / "gpt")
        self.root = root
        self.said: list[str] = []

    def glove_flags(self, name: str, *more: str) -> list[str]:
        return self.glove.train_flags(*more, f"--save_path={self.root / name}.pt", "--embedding_trainable")

    def gpt_flags(self, name: str, *more: str) -> list[str]:
        return self.gpt.train_flags(*more, f"--save_path={self.root / name}.pt",
                                    f"--bert_output_dir={self.root / name}")

    def curve(self, name: str, key: str = "train_loss") -> list[float]:
        return [point[key] for point in history(self.root / f"{name}.pt")]


@pytest.fixture(scope="module")
def runs(raw_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs that are compared."""
    made = Runs(tmp_path_factory.mktemp("runs"), raw_once)
    write_config(made.glove.root / "rich.json", dropout=0.2)
    pair = [made.glove_flags("glove-2", *STEPS, *HALF), rich_flags(made, made.root / "rich.pt"),
            made.gpt_flags("gpt-2", *STEPS, *HALF),
            *(made.gpt_flags(f"zero-{stage}", *FEWER, *EIGHTHS, f"--zero_stage={stage}") for stage in (1, 2, 3))]
    (made.root / "pair.json").write_text(json.dumps(pair))
    processes = in_processes("-c", TRAIN_ALL, str(made.root / "pair.json"))
    for argv in (made.glove_flags("glove-1", *STEPS, *WHOLE), made.glove_flags("glove-accumulated", *STEPS, *QUARTERS),
                 made.gpt_flags("gpt-1", *STEPS, *WHOLE), made.gpt_flags("gpt-accumulated", *STEPS, *QUARTERS),
                 made.gpt_flags("zero-0", *FEWER, *WHOLE)):
        train.run(*train.get_params(argv))
    made.said = join(processes)
    return made


def rich_flags(made: Runs, path: Path, *more: str) -> list[str]:
    return made.glove.train_flags(*RICH, f"--config={made.glove.root / 'rich.json'}", f"--save_path={path}", *more)


# ------------------------------------------------------------------------------------------------ the same training


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("one", "other", "within"), [
    ("glove-1", "glove-2", 1e-4), ("glove-1", "glove-accumulated", 1e-4), ("gpt-1", "gpt-2", 1e-4),
    ("gpt-1", "gpt-accumulated", 1e-4), ("zero-0", "zero-1", 1e-3), ("zero-0", "zero-2", 1e-3),
    ("zero-0", "zero-3", 1e-3)])
def test_same_course(runs: Runs, one: str, other: str, within: float) -> None:
    for key in ("train_loss", "valid_loss"):
        first, second = runs.curve(one, key), runs.curve(other, key)
        assert len(first) == (9 if "zero" in one else 50) and first == pytest.approx(second, abs=within, rel=0)
    assert runs.curve(one)[-1] < 0.97 * runs.curve(one)[0]  # it learns
    assert runs.curve(one, "valid_accuracy")[-1] == runs.curve(other, "valid_accuracy")[-1]


def test_every_example_counts_once(runs: Runs) -> None:
    """Of 17 valid sentences, 8, 8 and 1 for two processes: the accuracy is a number of seventeenths."""
    for name in ("glove-2", "gpt-2", "zero-3"):
        assert all((17 * accuracy) == pytest.approx(round(17 * accuracy)) for accuracy in
                   runs.curve(name, "valid_accuracy"))


def test_one_process_speaks_and_writes(runs: Runs) -> None:
    main, other = runs.said
    assert main.count("[best model]") == 6 and "2 processes" in main
    assert "INFO" not in other and "step" not in other
    events = list((runs.glove.root / "runs").rglob("events*")) + list((runs.gpt.root / "runs").rglob("events*"))
    assert len(events) == 11  # one a run


@pytest.mark.parametrize("name", ["gpt-2", "zero-2", "zero-3"])
def test_checkpoints_are_whole(runs: Runs, name: str) -> None:
    evaluate.main([f"--model_path={runs.root / name}.pt", f"--bert_output_dir={runs.root / name}", "--device=cpu"])
    found = json.loads((runs.root / f"{name}.pt.test.json").read_text())
    assert found["examples"] == 60
    same = "gpt-1" if name == "gpt-2" else "zero-0"
    expected, weights = (load_checkpoint(runs.root / f"{which}.pt").model for which in (same, name))
    assert expected.keys() == weights.keys()
    assert all(torch.allclose(expected[key], weights[key], atol=1e-3) for key in expected)


# --------------------------------------------------------------------------------------------------- lost processes


@pytest.mark.timeout(900)
def test_a_killed_process_ends_the_run_and_resume_goes_on(runs: Runs, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.pt"
    flags = rich_flags(runs, path)
    killed = in_processes("train.py", *flags)
    draw = random.Random(3)
    seen, target = set(), draw.randint(5, 12)
    while len(seen) < target:  # states
        assert all(process.poll() is None for process in killed), killed[0].communicate()[0]
        state = Path(f"{path}.state")
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.001)
    killed[1].send_signal(signal.SIGKILL)
    said = killed[0].communicate(timeout=800)[0]
    assert killed[0].returncode == 2
    (sentence,) = re.findall("^error: .*", said, re.MULTILINE)
    assert "another process of this run has died" in sentence and f"--resume goes on from {path}.state" in sentence
    assert "Traceback" not in said

    # One process goes on from the end of an epoch.
    caplog.set_level(logging.INFO)
    alone = tmp_path / "alone.pt"
    for name in (path.name, f"{path.name}.state", f"{path.name}.state.epoch"):
        if (tmp_path / name).exists():
            (tmp_path / name.replace("model", "alone")).write_bytes((tmp_path / name).read_bytes())
    best = train.run(*train.get_params(rich_flags(runs, alone, "--resume", "--batch_size=4")))
    assert "processes: 1, where there were 2: resuming at the end of epoch" in caplog.text
    whole = json.loads((runs.root / "rich.pt.train.json").read_text())
    assert best["step"] == whole["best"]["step"]  # batches of 4 by one process are those of 2 by two

    # Two processes go on where they stood, and end as if nothing had happened.
    join(in_processes("train.py", *flags, "--resume"))
    assert same_weights(path, runs.root / "rich.pt") and history(path) == whole["history"]


# ---------------------------------------------------------------------------- private names of accelerate and DeepSpeed


def test_a_second_training_may_have_another_precision() -> None:
    from accelerate import Accelerator

    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    with pytest.raises(ValueError, match="AcceleratorState has already been initialized"):
        Accelerator(cpu=True, mixed_precision="no")
    distributed.reset_accelerate()
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"


def test_a_prepared_model_is_itself_again() -> None:
    """Or else evaluation would be in half precision."""
    from accelerate import Accelerator

    model = torch.nn.Linear(3, 2)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert model(torch.ones(1, 3)).dtype == prepared(torch.ones(1, 3)).dtype and "forward" in vars(model)
    distributed.remove_autocast(model)
    assert vars(model).keys() - vars(torch.nn.Linear(3, 2)).keys() == {"_is_accelerate_prepared"}
    assert model(torch.ones(1, 3)).dtype == torch.float32


def test_deepspeed_has_the_names_that_resuming_needs() -> None:
    """A run of stages 1 to 3 that is resumed shows what comes of them; it takes minutes."""
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    code = inspect.getsource(DeepSpeedZeroOptimizer)
    for name in ("_hp_optimizer_states_linked", "single_partition_of_fp32_groups"):
        assert f"self.{name} =" in code
    assert callable(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state)
    assert "self.fp32_partitioned_groups_flat" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_lost_processes_by_what_is_raised() -> None:
    two = Namespace(num_processes=2)
    for error in (RuntimeError("[/gloo/pair.cc:1] Connection closed by peer [::1]:9. Check. 🏖️"),
                  torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited")):
        with pytest.raises(InputError, match="another process of this run has died .*; do this"):
            with distributed.ending_together(two, "do this"):  # type: ignore[arg-type]
                raise error
    with pytest.raises(RuntimeError, match="shape"), distributed.ending_together(two, ""):  # type: ignore[arg-type]
        raise RuntimeError("shape mismatch")
    with pytest.raises(InputError, match="told to stop"), distributed.ending_together(two, ""):  # type: ignore
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -------------------------------------------------------------------------------------------------------- launchers

DOCUMENTED = ["--lr=1e-3", "--epoch=1", "--batch_size=2", "--gradient_accumulation_steps=4", "--eval_and_save_steps=32"]
OLD_LAUNCHER = ["-m", "torch.distributed.launch", "--nnodes", "1", "--nproc_per_node", "2", "--use_env", "--node_rank",
                "0", "--master_addr", "127.0.0.1", "--master_port"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
PLUGIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "machine_rank": 0,
          "main_training_function": "main", "mixed_precision": "no", "num_machines": 1, "num_processes": 2,
          "use_cpu": False, "deepspeed_config": {
              "gradient_accumulation_steps": 4, "offload_optimizer_device": "cpu", "offload_param_device": "none",
              "zero3_init_flag": False, "zero_stage": 2}}


def launch(case: Case, *command: str, flags: tuple[str, ...] = ()) -> str:
    """Train as documented and evaluate. Returns what was said."""
    ended = subprocess.run([sys.executable, *command, str(ROOT / "train.py"), *case.train_flags(*DOCUMENTED, *flags)],
                           env=environment(), cwd=case.root, text=True, capture_output=True, timeout=800)
    assert ended.returncode == 0, ended.stderr
    evaluate.main(case.evaluate_flags(f"--bert_output_dir={case.root / 'out'}"))
    assert case.results("test")["examples"] == 60
    return ended.stdout + ended.stderr


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.timeout(900)
def test_documented_launcher(tmp_path: Path) -> None:
    said = launch(make_gpt(tmp_path / "gpt"), *OLD_LAUNCHER, free_port(), flags=("--zero_stage=2",))
    assert said.count("[best model]") == 1 and "2 processes" in said


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["", "0", "1", "3"])
@pytest.mark.parametrize("launcher", ["old", "torchrun", "accelerate", "plain"])
def test_launchers_and_stages(tmp_path: Path, launcher: str, stage: str) -> None:
    (tmp_path / "accelerate.yaml").write_text(json.dumps(PLUGIN))
    command = {"old": [*OLD_LAUNCHER, free_port()], "plain": [],
               "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"],
               "accelerate": [*ACCELERATE, f"--config_file={tmp_path / 'accelerate.yaml'}",
                              f"--main_process_port={free_port()}"]}[launcher]
    said = launch(make_gpt(tmp_path / "gpt"), *command, flags=(f"--zero_stage={stage}",) if stage else ())
    assert ("2 processes" in said) == (launcher != "plain")
    deepspeed = {"": 2 if launcher == "accelerate" else 0}.get(stage, int(stage or 0))
    assert (f"ZeRO stage {deepspeed}" in said) == bool(deepspeed)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_with_deepspeed(tmp_path: Path, stage: int) -> None:
    case = make_gpt(tmp_path / "gpt")

    def flags(name: str, stage: int, *more: str) -> list[str]:
        return case.train_flags("--epoch=4", "--eval_and_save_steps=1", "--batch_size=2", "--weight_decay=0.1",
                                "--gradient_accumulation_steps=3", f"--zero_stage={stage}", "--measure=last",
                                f"--save_path={tmp_path / name}.pt", f"--bert_output_dir={tmp_path / name}", *more)

    join(in_processes("train.py", *flags("whole", stage)))
    killed = in_processes("train.py", *flags("model", stage))
    while not (tmp_path / "model.pt.state.epoch").exists():
        assert killed[0].poll() is None, killed[0].communicate()[0]
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.communicate()
    for end in (".pt", ".pt.state", ".pt.state.epoch"):
        (tmp_path / f"alone{end}").write_bytes((tmp_path / f"model{end}").read_bytes())
    join(in_processes("train.py", *flags("model", stage, "--resume")))
    assert same_weights(tmp_path / "model.pt", tmp_path / "whole.pt")
    # Without DeepSpeed, in one process with batches of the same size as a whole.
    (said,) = join(in_processes("train.py", *flags("alone", 0, "--resume", "--batch_size=4"), count=1))
    assert "processes: 1, where there were 2" in said
    assert history(tmp_path / "alone.pt")[-1]["train_loss"] == pytest.approx(
        history(tmp_path / "whole.pt")[-1]["train_loss"], abs=1e-3)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_launcher_ends_all_when_one_dies(tmp_path: Path) -> None:
    case = make_gpt(tmp_path / "gpt")
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                            f"--master_port={free_port()}", str(ROOT / "train.py"),
                            *case.train_flags("--epoch=500", "--eval_and_save_steps=1", "--batch_size=2")],
                           env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (case.root / "model.pt").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], text=True, capture_output=True).stdout
    os.kill(int(workers.split()[1]), signal.SIGKILL)
    said = run.communicate(timeout=800)[0]
    assert run.returncode and "error: " in said and "--resume goes on from" in said


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("flags", "said"), [
    (["--enable_qat"], "--zero_stage=0"), (["--compile"], "--zero_stage=0"), (["--ema_decay=0.9"], "--zero_stage=2")])
def test_what_deepspeed_does_not_take(encoded: Place, monkeypatch: pytest.MonkeyPatch, flags: list[str],
                                      said: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert said in refusal(train.main, *encoded.train_flags("--zero_stage=3", *flags))


def test_without_deepspeed_no_plugin_is_made(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """--zero_stage=0 beats a launcher that asks for DeepSpeed."""
    import accelerate.utils

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", fails)
    train.main(encoded.train_flags("--zero_stage=0", "--epoch=1"))
    assert encoded.model.exists()
