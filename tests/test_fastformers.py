"""Distillation as a user runs it: students of every kind from a tiny BERT, resumed, refused, and what a run leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from helpers import (
    INTENTS,
    fix_flags,
    make_data,
    make_vectors,
    refusal,
    same_weights,
    snapshot,
    weights,
    write_config,
    write_lines,
)

import evaluate
import fastformers
import preprocess
import train
from pretrained.loading import load_pretrained, load_tokenizer
from util import load_checkpoint, load_state, save_checkpoint


class School:
    """A folder with data, a pretrained model and its teacher.pt.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.student = root / "student.pt"

    def flags(self, *more: Any, model: str = "model") -> list[str]:
        """What all stages take."""
        return [f"--config={self.root / 'config.json'}", f"--data_dir={self.data}",
                f"--bert_model_name_or_path={self.root / model}", *map(str, more)]

    def distill_flags(self, *more: Any, model: str = "model") -> list[str]:
        """Two epochs on the CPU in fp32."""
        return self.flags("--do_distill", "--device=cpu", "--mixed_precision=no", "--batch_size=8", "--lr=2e-3",
                          "--epoch=2", f"--save_path={self.student}", f"--bert_output_dir={self.root / 'student'}",
                          f"--log_dir={self.root / 'runs'}", f"--log_path={self.root / 'train.log'}",
                          f"--teacher_model_path={self.root / 'teacher.pt'}", *more, model=model)

    def sentences(self) -> list[str]:
        """Those of train.txt."""
        return [line.split("\t")[0] for line in (self.data / "train.txt").read_text().splitlines()]

    def make_small(self) -> None:
        """`small`, with fewer layers and dimensions than `model` and the same tokenizer."""
        make_model("TinyBERT", self.root / "small", self.sentences())

    def results(self) -> dict[str, Any]:
        """The results of the student's training."""
        return json.loads(Path(f"{self.student}.train.json").read_text())


def make_school(root: Path, name: str) -> School:
    """A teacher of an architecture, trained for an epoch."""
    school = School(root)
    make_data(school.data)
    make_model(name, root / "model", school.sentences())
    config = {"emb_class": ARCHITECTURES[name].emb_class, "enc_class": "cls", "n_ctx": 40, "dropout": 0.1}
    (root / "config.json").write_text(json.dumps(config))
    preprocess.main(school.flags())
    train.main([flag for flag in school.distill_flags("--epoch=1", f"--save_path={root / 'teacher.pt'}",
                                                      f"--bert_output_dir={root / 'teacher'}")
                if not flag.startswith(("--do_distill", "--teacher"))])
    return school


@pytest.fixture(scope="session")
def school_once(tmp_path_factory: pytest.TempPathFactory) -> School:
    """A BERT's. Not to be changed."""
    return make_school(tmp_path_factory.mktemp("school") / "school", "BERT")


@pytest.fixture
def school(school_once: School, tmp_path: Path) -> School:
    """One of the test's own."""
    shutil.copytree(school_once.root, tmp_path / "school")
    return School(tmp_path / "school")


# -------------------------------------------------------------------------------------------------------- students

INSIDE = ("--state_loss_ratio=1", "--att_loss_ratio=1")


@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "RoBERTa"])
def test_a_student_begins_as_layers_of_its_teacher(name: str, school_once: School, tmp_path: Path) -> None:
    if name == "BERT":
        shutil.copytree(school_once.root, tmp_path / "school")
        school = School(tmp_path / "school")
    else:
        school = make_school(tmp_path / "school", name)
    fastformers.main(school.distill_flags("--student_init_layers=0,2", "--epoch=1", "--lr=0", *INSIDE))
    before, after = weights(school.root / "teacher.pt"), weights(school.student)
    layers = sorted(key for key in before if ".layer." in key)
    assert len([key for key in after if ".layer." in key]) == len(layers) * 2 // 3
    for key in layers:
        if ".layer.0." in key:
            assert torch.equal(before[key], after[key])
        elif ".layer.2." in key:
            assert torch.equal(before[key], after[key.replace(".layer.2.", ".layer.1.")])
    assert all(torch.equal(before[key], after[key]) for key in before if "embeddings" in key)

    # What a run leaves is what train.py leaves: evaluate.py reads it, and the folder is a model of two layers.
    evaluate.main([f"--model_path={school.student}", f"--bert_output_dir={school.root / 'student'}", "--device=cpu"])
    model = load_pretrained(str(school.root / "student"))
    assert model.config.num_hidden_layers == 2 and len(load_tokenizer(str(school.root / "student")))
    assert load_checkpoint(school.student).run.run_id == school.results()["run_id"] == model.config.classifier_run_id
    assert school.results()["command"].startswith("fastformers.py ")
    assert Path(f"{school.student}.curves.png").read_bytes()[:4] == b"\x89PNG"


def test_learning_from_the_inside_of_a_wider_teacher(school: School, caplog: pytest.LogCaptureFixture) -> None:
    """TinyBERT has 24 dimensions: hidden states pass through a projection, which trains and is in no checkpoint."""
    school.make_small()
    settings = school.root / "small/config.json"  # the student's attentions are those after dropout
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "attention_probs_dropout_prob": 0.0}))
    flags = school.distill_flags("--logging_steps=3", "--log_evaluate_during_training", "--state_distill_cs",
                                 "--epoch=6", "--state_loss_ratio=1", "--att_loss_ratio=100", model="small")
    with caplog.at_level("INFO"):
        fastformers.main(flags)
    lines = [line for line in caplog.messages if line.startswith("[step ")]
    assert len(lines) == 12 and all("valid accuracy" in line for line in lines)

    def part(line: str, name: str) -> float:
        return float(line.split(f"{name} ")[1].split(",")[0])

    for name in ("states", "attentions", "logits"):
        assert part(lines[-1], name) < part(lines[0], name)
    assert "[layers] student, teacher: 1 - 2, 2 - 3" in caplog.messages
    assert not any("projection" in key for key in weights(school.student))
    state = load_state(f"{school.student}.state")
    assert state["progress"]["finished"]
    evaluate.main([f"--model_path={school.student}", "--device=cpu"])


def test_a_resumed_student_is_the_same(school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    school.make_small()
    shutil.copytree(school.root, tmp_path / "alone")
    alone, rich = School(tmp_path / "alone"), ("--eval_and_save_steps=2", "--kd_temperature=2", *INSIDE)
    fastformers.main(alone.distill_flags(*rich, model="small"))

    from training.trainer import Trainer

    save, saves = Trainer.save_state, []

    def killed(trainer: Trainer) -> None:
        save(trainer)
        saves.append(trainer.progress.step)
        if trainer.progress.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_state", killed)
        with pytest.raises(SystemExit):
            fastformers.main(school.distill_flags(*rich, model="small"))
    fastformers.main(school.distill_flags(*rich, "--resume", model="small"))
    assert same_weights(alone.student, school.student)
    said = refusal(fastformers.main, *school.distill_flags(*rich, "--resume", "--kd_temperature=3", model="small"))
    assert "kd_temperature 2.0 then, 3.0 now" in said


def test_a_student_of_words_from_a_transformer(school: School) -> None:
    """Each reads the sentences with its own tokenizer."""
    make_vectors(school.root / "vectors.txt")
    write_config(school.root / "config.json", "cnn")
    words = [f"--config={school.root / 'config.json'}", f"--data_dir={school.data}"]
    preprocess.main([*words, f"--embedding_path={school.root / 'vectors.txt'}"])
    fastformers.main(school.distill_flags("--hard_loss_ratio=0.5", "--embedding_trainable", "--rdrop=1"))
    evaluate.main([f"--model_path={school.student}", "--device=cpu"])
    assert school.results()["teacher"]["run_id"] == load_checkpoint(school.root / "teacher.pt").run.run_id
    for flag in INSIDE:
        assert "the teacher reads other tokens" in refusal(fastformers.main, *school.distill_flags(flag))
    assert "different vocabularies" in refusal(fastformers.main, *school.distill_flags("--student_init_layers=0"))


# ----------------------------------------------------------------------------------------------- meta pseudo labels


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_meta_pseudo_labels_come_first(school: School, labels: str, caplog: pytest.LogCaptureFixture) -> None:
    text = school.root / "augmented.raw"
    write_lines(text, [(sentence.format("blue", "seven"), "dummy") for kind in INTENTS.values() for sentence in kind])
    before = (school.root / "teacher.pt").read_bytes()
    with caplog.at_level("INFO"):
        fastformers.main(school.distill_flags(f"--mpl_data_path={text}", f"--mpl_labels={labels}", "--mpl_epoch=3",
                                              "--mpl_warmup_steps=2", "--logging_steps=6", "--student_init_layers=0,2",
                                              "--gradient_accumulation_steps=2"))
    assert (school.root / "teacher.pt").read_bytes() == before
    found = school.results()
    assert len(found["mpl_history"]) == 3 and len(found["history"]) == 2
    first, then = weights(f"{school.student}.mpl"), weights(school.student)
    start = weights(school.root / "teacher.pt")
    key = next(key for key in start if key.endswith("layer.0.attention.self.query.weight"))
    assert not torch.equal(start[key], first[key]) and not torch.equal(first[key], then[key])
    assert any("[meta pseudo labels, step 6] teacher's loss" in line for line in caplog.messages)
    steps = [point["step"] for point in fastformers.read_curve(f"{school.student}.train.json")]
    assert steps == [3, 6, 9, 12, 15]
    evaluate.main([f"--model_path={school.student}.mpl", "--device=cpu"])


def test_nothing_writes_to_the_flags(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    text = school.root / "augmented.raw"
    write_lines(text, [(sentence, "dummy") for sentence in school.sentences()[:20]])
    fix_flags(fastformers, monkeypatch)
    fastformers.main(school.distill_flags(f"--mpl_data_path={text}", "--epoch=1", "--student_init_layers=0"))
    fastformers.main([flag.replace("--do_distill", "--do_prune") for flag in school.distill_flags(
        f"--model_path={school.root / 'teacher.pt'}", f"--bert_output_dir={school.root / 'teacher'}",
        f"--save_path_pruned={school.root / 'pruned.pt'}", f"--bert_output_dir_pruned={school.root / 'pruned'}",
        "--target_num_heads=2", "--target_ffn_dim=8", "--recover_epoch=1")])


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_go_together(school_once: School, tmp_path: Path) -> None:
    teacher = school_once.root / "teacher.pt"
    (tmp_path / "curve.json").write_text('{"history": [{"step": 1}]}')
    before = snapshot(school_once.root)
    for flags, said in (
        (["--teacher_model_path="], "no such checkpoint; name the teacher's"),
        (["--teacher_model_path=missing.pt"], "no such checkpoint"),
        ([f"--teacher_model_path={teacher}.state"], "holds no finished model"),
        ([f"--save_path={teacher}"], "that is the teacher"),
        ([f"--teacher_bert_model_name_or_path={school_once.root / 'student'}"], "that is the teacher"),
        (["--mpl_data_path=missing.raw"], "missing.raw: no such file"),
        ([f"--mpl_data_path={school_once.data / 'train.txt'}", "--resume"], "--mpl_data_path and --resume do not go"),
        (["--state_loss_ratio=1", "--compile"], "--state_loss_ratio and --compile do not go together"),
        (["--student_init_layers=0", "--bert_remove_layers=1"], "do not go together"),
        (["--student_init_layers=2,0"], "name some of them, in their order"),
        (["--student_init_layers=0,3"], "the teacher's layers are 0 to 2"),
        (["--hard_loss_ratio=1.5"], "1.5 is not from 0 to 1"),
        (["--kd_temperature=0"], "kd_temperature"),
        (["--do_prune"], "choose one of them"),
        ([f"--compare_with={tmp_path / 'curve.json'}"], "not the .train.json that a training leaves"),
        (["--att_los_ratio=1"], "did you mean '--att_loss_ratio'"),
    ):
        assert said in refusal(fastformers.main, *school_once.distill_flags(*flags)), flags
    assert "say what to do" in refusal(fastformers.main, *school_once.flags())
    assert {name: content for name, content in snapshot(school_once.root).items() if name in before
            and name != "train.log"} == {name: content for name, content in before.items() if name != "train.log"}


def test_teachers_that_do_not_fit(school: School) -> None:
    other = load_checkpoint(school.root / "teacher.pt")
    encoding = replace(other.run.encoding, labels=("yes", "no", "maybe", "never"))
    save_checkpoint(replace(other, run=replace(other.run, encoding=encoding)), school.root / "other.pt")
    said = refusal(fastformers.main, *school.distill_flags(f"--teacher_model_path={school.root / 'other.pt'}"))
    assert "the teacher's labels (yes, no, maybe, never) are not those of the student's data (PlayMusic" in said
    write_config(school.root / "glove.json")
    said = refusal(fastformers.main, *school.distill_flags(f"--teacher_config={school.root / 'glove.json'}"))
    assert "not the config of" in said and "emb_class" in said

    # A student deeper, or wider, than its teacher; models that do not tell their inside.
    school.make_small()
    small = school.root / "small.pt"
    train.main([flag for flag in school.distill_flags("--epoch=1", f"--save_path={small}", model="small")
                if not flag.startswith(("--do_distill", "--teacher"))])
    flags = school.distill_flags(f"--teacher_model_path={small}")
    assert "the student has 3 layers and the teacher 2" in refusal(fastformers.main, *flags, "--att_loss_ratio=1")
    said = refusal(fastformers.main, *flags, "--state_loss_ratio=1", "--bert_remove_layers=0")
    assert "wider (32) than the teacher's (24)" in said
    said = refusal(fastformers.main, *school.distill_flags(
        f"--teacher_bert_model_name_or_path={school.root / 'student'}", f"--bert_output_dir={school.root / 'new'}"))
    assert "give the folder of the same run" in said
    assert not school.student.exists()
