"""Make a transformer small: a student that learns from a teacher, or heads and feed-forward units removed.

Reads   what train.py reads; --do_distill: TEACHER_MODEL_PATH, with --mpl_data_path unlabelled text, too;
        --do_prune: MODEL_PATH.
Writes  --do_distill: what train.py writes, and SAVE_PATH.curves.png; --do_prune: SAVE_PATH_PRUNED and
        BERT_OUTPUT_DIR_PRUNED, and beside the former .prune.json (results) and .importance.png; with --recover_epoch
        also what else train.py writes.

    python fastformers.py --do_distill --teacher_model_path=teacher.pt --student_init_layers=0,2,4 \\
        --config=configs/config-bert-cls.json --bert_model_name_or_path=embeddings/all-MiniLM-L6-v2
    python fastformers.py --do_prune --config=configs/config-bert-cls.json --target_num_heads=6 --target_ffn_dim=512
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.config import check_same_config, encoded_kind, load_config, parse_with_config
from cli.devices import choose_device, use_device
from cli.flags import Parser, changed, natural_int, number, number_list, one_of, positive_int
from cli.training_flags import INT8_MODES, TABLE, Flag, Group, add_flags, check_training_flags
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.lines import open_input
from sentence_classifier.tokenizers import SUBWORDS
from train import run
from util import RUN_ID, load_checkpoint, picture, saved_fact, setup_logging, sha256, write_json

if TYPE_CHECKING:  # --help loads no torch
    from training.distillation import Teacher
    from training.run import Run
    from training.trainer import Trainer
    from util import Checkpoint

logger = logging.getLogger(__name__)


WHAT = Group("what to do")
DISTILLATION = Group("distillation")
MPL = Group("meta pseudo labels, before distillation")
PRUNING = Group("pruning")
FLAGS = (
    Flag("do_distill", WHAT, "Train a student on what a teacher answers.", action="store_true"),
    Flag("do_prune", WHAT, "Remove attention heads and feed-forward units.", action="store_true"),

    Flag("teacher_config", DISTILLATION, "A config that the teacher's checkpoint is checked against; the checkpoint "
         "holds its own."),
    Flag("teacher_model_path", DISTILLATION, "The teacher: a checkpoint of train.py."),
    Flag("teacher_bert_model_name_or_path", DISTILLATION, "The teacher's --bert_output_dir, checked to be of the same "
         "run; the checkpoint holds all that is needed."),
    Flag("hard_loss_ratio", DISTILLATION, "The weight of --criterion on the labels; the rest is the weight of the loss "
         "on the teacher's logits.", number(0, 1), 0.0),
    Flag("state_loss_ratio", DISTILLATION, "The weight of the loss on hidden states.", number(), 0.0),
    Flag("state_distill_cs", DISTILLATION, "Compare hidden states by their cosine in the place of squared differences.",
         action="store_true"),
    Flag("att_loss_ratio", DISTILLATION, "The weight of the loss on attentions.", number(), 0.0),
    Flag("student_init_layers", DISTILLATION, "Let the student begin with these layers of the teacher, and its "
         "embeddings.", number_list, metavar="0,2,4"),
    Flag("logging_steps", DISTILLATION, "Log the parts of the loss after this many steps.", positive_int, 500),
    Flag("log_evaluate_during_training", DISTILLATION, "Log accuracy and loss on the valid data with them.",
         action="store_true"),
    Flag("compare_with", DISTILLATION, "Draw the curves of these runs beside this one's.", metavar="OTHER.train.json",
         nargs="+"),

    Flag("mpl_data_path", MPL, "The unlabelled text, such as DATA_DIR/augmented.raw; labels in it are passed over."),
    Flag("mpl_epoch", MPL, "Passes over the labelled data; each step takes as many unlabelled sentences.",
         positive_int, 1),
    Flag("mpl_labels", MPL, "Draw pseudo labels from the teacher's probabilities (hard), or take these themselves.",
         default="hard", choices=("hard", "soft")),
    Flag("mpl_warmup_steps", MPL, "Let the teacher's learning rate rise for this many steps.", natural_int, 1000),
    Flag("mpl_learning_rate", MPL, "The teacher's highest learning rate.", number(), 5e-5, says_default="5e-5"),
    Flag("mpl_weight_decay", MPL, "The teacher's weight decay.", number(), 0.1),

    Flag("model_path", PRUNING, "The checkpoint to prune.", default="pytorch-model.pt"),
    Flag("target_num_heads", PRUNING, "Attention heads that each layer keeps.", positive_int, 8),
    Flag("target_ffn_dim", PRUNING, "Feed-forward units that each layer keeps.", positive_int, 2048),
    Flag("dont_normalize_importance_by_layer", PRUNING, "Report importance as it is, not divided by each layer's L2 "
         "norm. Which heads and units go is decided within each layer, so that it is the same.", action="store_true"),
    Flag("save_path_pruned", PRUNING, "The checkpoint to write.", default="pytorch-model-pruned.pt"),
    Flag("bert_output_dir_pruned", PRUNING, "The folder for the pruned transformer and its tokenizer.",
         default="bert-checkpoint-pruned"),
    Flag("recover_epoch", PRUNING, "Train for this many epochs after pruning, by the flags below; the best model is "
         "kept.", natural_int, 0),
)


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = Parser(__doc__, __file__)
    add_flags(parser, (*FLAGS, *TABLE))
    args, config = parse_with_config(parser, argv)
    if one_of(args, "do_distill", "do_prune") is None:
        parser.error("say what to do: --do_distill or --do_prune")
    check_training_flags(args, encoded_kind(config))
    if args.zero_stage or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("fastformers.py runs in one process, without DeepSpeed: start it with python, and without "
                         "--zero_stage.")
    if args.do_distill:
        check_distillation_flags(args)
        return changed(args, teacher_sha256=sha256(args.teacher_model_path)), config  # a resumed run has the same one
    check_pruning_flags(args)
    return args, config


def check_distillation_flags(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if not Path(args.teacher_model_path or "").is_file():
        raise InputError(f"--teacher_model_path={args.teacher_model_path or ''}: no such checkpoint; name the "
                         "teacher's, which train.py wrote.")
    for flag, teacher in (("save_path", args.teacher_model_path),
                          ("bert_output_dir", args.teacher_bert_model_name_or_path)):
        if teacher and Path(getattr(args, flag)).resolve() == Path(teacher).resolve():
            raise InputError(f"--{flag}={teacher}: that is the teacher; name another place for the student.")
    if args.mpl_data_path and not Path(args.mpl_data_path).is_file():
        raise InputError(f"--mpl_data_path={args.mpl_data_path}: no such file.")
    refused = {"state_loss_ratio": ("compile", *INT8_MODES), "att_loss_ratio": ("compile", *INT8_MODES),
               "student_init_layers": ("bert_remove_layers", "restore_path"),
               "mpl_data_path": ("resume", "fp16", "compile", "lora_r", *INT8_MODES)}
    for flag, others in refused.items():
        if other := next((other for other in others if getattr(args, flag) and getattr(args, other)), None):
            raise InputError(f"--{flag} and --{other} do not go together; leave one of them out.")


def load_teacher(args: argparse.Namespace) -> Checkpoint:
    """The teacher's checkpoint, checked against what else is said of the teacher."""
    path, folder = args.teacher_model_path, args.teacher_bert_model_name_or_path
    checkpoint = load_checkpoint(path)
    if args.teacher_config:
        check_same_config(load_config(args.teacher_config), args.teacher_config, checkpoint.run.config, path)
    found = saved_fact(folder, RUN_ID) if folder else None  # none: the pretrained model, say, which is not needed
    if found not in (None, checkpoint.run.run_id):
        raise InputError(f"{folder}: of run {found}, and {path} is of run {checkpoint.run.run_id}; give the folder of "
                         "the same run, or none.")
    return checkpoint


def distill(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Train a student on what a teacher answers."""
    from training.distillation import DistillationTrainer, Teacher, answer, student_from_teacher
    from training.run import load_data

    others = {name: read_curve(name) for name in args.compare_with or ()}
    checkpoint, path = load_teacher(args), args.teacher_model_path
    make_model = partial(student_from_teacher, checkpoint) if args.student_init_layers else None

    def make_trainer(begun: Run) -> Trainer:
        teacher = Teacher(checkpoint, path, [args.data_dir, checkpoint.run.flags["data_dir"]], begun.train.labels,
                          begun.train.multi_label)
        logits = answer(teacher, begun.train, args.augmented, args.eval_batch_size, begun.accelerator.device)
        notes: dict[str, Any] = {"teacher": {"path": path, "run_id": checkpoint.run.run_id,
                                             "sha256": args.teacher_sha256}}
        if args.mpl_data_path:
            notes["mpl_history"] = learn_pseudo_labels(begun, teacher)
            teacher.model.load_state_dict(checkpoint.model)  # the one that answered
        trainer = DistillationTrainer(begun, teacher, logits)
        trainer.notes = notes
        return trainer

    run(args, config, data=load_data(args, config, encoded_kind(config), taught=True), make_model=make_model,
        make_trainer=make_trainer, whole_table=bool(args.mpl_data_path))
    draw_curves({args.save_path: read_curve(f"{args.save_path}.train.json"), **others}, f"{args.save_path}.curves.png")


def learn_pseudo_labels(begun: Run, teacher: Teacher) -> list[dict[str, float]]:
    """Train student and teacher with meta pseudo labels; the student is left where it was best. Returns the history."""
    from training.meta_pseudo_labels import MetaTrainer

    if begun.accelerator.scaler:
        raise InputError("--mpl_data_path: meta pseudo labels are learned in bf16 or fp32.")
    args = changed(begun.args, epoch=begun.args.mpl_epoch, save_path=f"{begun.args.save_path}.mpl")
    info = replace(begun.info, run_id=f"{begun.info.run_id}-mpl")
    trainer = MetaTrainer(replace(begun, args=args, info=info), teacher)
    best = trainer.fit()
    logger.info("[meta pseudo labels] best at step %d: valid loss %.4f, valid accuracy %.4f; the student goes on from "
                "there", best["step"], best["valid_loss"], best["valid_accuracy"])
    begun.model.load_state_dict(load_checkpoint(args.save_path).model)
    return trainer.progress.history


def read_curve(path: str) -> list[dict[str, float]]:
    """The history of a run as one curve, meta pseudo labels first, from its .train.json."""
    with open_input(path) as file:
        try:
            results = json.load(file)
            first = results.get("mpl_history", [])
            done = first[-1]["step"] if first else 0
            curve = [*first, *({**point, "step": done + point["step"]} for point in results["history"])]
            return [{key: float(point[key]) for key in ("step", "valid_loss", "valid_accuracy")} for point in curve]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: not the .train.json that a training leaves.") from None


def draw_curves(curves: dict[str, list[dict[str, float]]], path: str) -> None:
    """Draw accuracy and loss on valid by optimizer step, a line for each run."""
    with picture(path, columns=2, figsize=(11, 4.5)) as (figure, panels):
        for axes, key, name in zip(panels, ("valid_accuracy", "valid_loss"), ("accuracy", "loss"), strict=True):
            for one, curve in curves.items():
                axes.plot([point["step"] for point in curve], [point[key] for point in curve], marker=".", label=one)
            axes.set_xlabel("optimizer steps of the student")
            axes.set_title(f"{name} on valid")
            axes.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")


def prune(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Remove heads and feed-forward units, and with --recover_epoch train what remains."""
    from compression import pruning
    from dataset import check_same_data
    from model import load_classifier
    from pretrained.saving import check_output_folder
    from training.losses import evaluate
    from training.run import load_data

    checkpoint = load_checkpoint(args.model_path)
    if checkpoint.run.encoding.kind != SUBWORDS:
        raise InputError(f"{args.model_path}: a model of word vectors, which has no attention heads; --do_prune takes "
                         "transformers.")
    check_same_config(config, args.config, checkpoint.run.config, args.model_path)
    device = choose_device(args.device)
    use_device(device)
    train, valid = load_data(args, config, SUBWORDS)
    check_same_data(train, checkpoint.run, args.model_path)
    model = load_classifier(checkpoint, []).to(device)
    model.embedding.token_cutoff = args.token_cutoff
    transformer: Any = model.embedding.transformer
    pruning.check_targets(transformer, args.target_num_heads, args.target_ffn_dim)
    # What follows is a run that begins with what is left of the model.
    rest = changed(args, save_path=args.save_path_pruned, bert_output_dir=args.bert_output_dir_pruned,
                   epoch=args.recover_epoch, bert_model_name_or_path=tokenizer_folder(args, checkpoint))
    check_output_folder(rest.bert_output_dir, rest.data_dir)
    if checkpoint.quantization:
        logger.warning("[%s] was trained for int8; its fp32 weights are pruned, and the result answers in int8 as any "
                       "model does, or trained with --recover_epoch and the same flag", args.model_path)

    def measure() -> dict[str, float]:
        return {**evaluate(model, valid, args.eval_batch_size, device),
                "parameters": sum(parameter.numel() for parameter in model.parameters())}

    figures = {"before": {**measure(), "mb": os.path.getsize(args.model_path) / 1e6}}
    importance = pruning.measure_importance(model, valid, args.eval_batch_size, device)
    pruning.prune(transformer, importance, args.target_num_heads, args.target_ffn_dim)
    figures["pruned"] = measure()
    notes = {"pruned_run_id": checkpoint.run.run_id, **figures}
    best = run(rest, config, data=(train, valid), make_model=lambda *_: model.cpu(), notes=notes)
    if args.recover_epoch:
        figures["recovered"] = {"loss": best["valid_loss"], "accuracy": best["valid_accuracy"],
                                "parameters": figures["pruned"]["parameters"]}
    figures[list(figures)[-1]]["mb"] = os.path.getsize(rest.save_path) / 1e6
    if not args.dont_normalize_importance_by_layer:
        importance = importance.normalized()
    for name, row in figures.items():
        logger.info("[%s] %d parameters%s: valid accuracy %.4f, valid loss %.4f", name, row["parameters"],
                    f", {row['mb']:.1f} MB" if "mb" in row else "", row["accuracy"], row["loss"])
    pruning.draw_importance(importance, args.target_num_heads, args.target_ffn_dim, f"{rest.save_path}.importance.png")
    write_json({**load_checkpoint(rest.save_path).run.summary(), "pruned_run_id": checkpoint.run.run_id, **figures,
                "importance_of_heads": importance.heads.tolist()}, f"{rest.save_path}.prune.json")


def check_pruning_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go with --do_prune."""
    for flag in ("restore_path", "bert_remove_layers", "bert_use_feature_based", "gradient_checkpointing"):
        if getattr(args, flag):
            raise InputError(f"--{flag} has no meaning for --do_prune; leave it out.")
    if Path(args.save_path_pruned).absolute() == Path(args.model_path).absolute():
        raise InputError(f"--save_path_pruned={args.save_path_pruned}: that is --model_path; name another file.")


def tokenizer_folder(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """Where the tokenizer of a checkpoint is: in --bert_output_dir, if of the same run, or where its run had it from.

    Raises:
        InputError: it is not there, or another one.
    """
    from pretrained.loading import load_tokenizer, tokenizer_text

    paired = saved_fact(args.bert_output_dir, RUN_ID) == checkpoint.run.run_id
    folder = args.bert_output_dir if paired else checkpoint.run.flags["bert_model_name_or_path"]
    found = hashlib.sha256(tokenizer_text(load_tokenizer(folder)).encode()).hexdigest()
    if found != checkpoint.run.encoding.vocab_sha256:
        raise InputError(f"{folder}: its tokenizer is not that of {args.model_path}; give the folder of the same run "
                         "as --bert_output_dir.")
    return folder


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    args, config = get_params(argv)
    setup_logging(args.log_path)
    (distill if args.do_distill else prune)(args, config)


if __name__ == "__main__":
    from util import keep_freed_memory

    keep_freed_memory()
    main()
