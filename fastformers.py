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
import logging
import os
from pathlib import Path
from typing import Any

from arguments import Parser, check_same_config, natural_int, number, number_list, one_of, positive_int
from text import InputError, fail_cleanly
from training import add_training_flags, begin, check_training_flags, finish, load_data, publish

logger = logging.getLogger(__name__)


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to do")
    what.add_argument("--do_distill", action="store_true", help="train a student on what a teacher answers")
    what.add_argument("--do_prune", action="store_true", help="remove attention heads and feed-forward units")
    add_distillation_flags(parser)
    add_pruning_flags(parser)
    add_training_flags(parser)
    args, config = parser.parse_with_config(argv)
    if one_of(args, "do_distill", "do_prune") is None:
        parser.error("say what to do: --do_distill or --do_prune")
    check_training_flags(parser, args, config)
    return args, config


def add_distillation_flags(parser: Parser) -> None:
    """--do_distill's own flags."""
    teacher = parser.add_argument_group("distillation")
    teacher.add_argument("--teacher_config", help="checked against the teacher's checkpoint, which holds its own")
    teacher.add_argument("--teacher_model_path", help="the teacher: a checkpoint of train.py")
    teacher.add_argument("--teacher_bert_model_name_or_path",
                         help="the teacher's --bert_output_dir, checked to be of the same run (the checkpoint holds "
                              "all that is needed)")
    teacher.add_argument("--kd_temperature", type=number(0.01), default=1.0,
                         help="the logits of both are divided by it (default: 1.0)")
    teacher.add_argument("--hard_loss_ratio", type=number(0, 1), default=0.0,
                         help="share of --criterion on the labels; the rest is the loss on the teacher's logits "
                              "(default: 0.0)")
    teacher.add_argument("--state_loss_ratio", type=number(), default=0.0,
                         help="weight of the loss on hidden states (default: 0.0)")
    teacher.add_argument("--state_distill_cs", action="store_true",
                         help="cosine distance of hidden states in place of squared differences")
    teacher.add_argument("--att_loss_ratio", type=number(), default=0.0,
                         help="weight of the loss on attentions (default: 0.0)")
    teacher.add_argument("--student_init_layers", type=number_list, metavar="0,2,4",
                         help="the student begins with these layers of the teacher, and its embeddings")
    teacher.add_argument("--logging_steps", type=positive_int, default=500,
                         help="steps between log lines of the parts of the loss (default: 500)")
    teacher.add_argument("--log_evaluate_during_training", action="store_true",
                         help="with each of them accuracy and loss on the valid data")
    mpl = parser.add_argument_group("meta pseudo labels, before distillation")
    mpl.add_argument("--mpl_data_path", help="unlabelled text, such as DATA_DIR/augmented.raw; labels are passed over")
    mpl.add_argument("--mpl_warmup_steps", type=natural_int, default=1000,
                     help="steps of the teacher's rising learning rate (default: 1000)")
    mpl.add_argument("--mpl_learning_rate", type=number(), default=5e-5, help="the teacher's (default: 5e-5)")
    mpl.add_argument("--mpl_weight_decay", type=number(), default=0.1, help="the teacher's (default: 0.1)")


def add_pruning_flags(parser: Parser) -> None:
    """--do_prune's own flags."""
    prune = parser.add_argument_group("pruning")
    prune.add_argument("--model_path", default="pytorch-model.pt",
                       help="the checkpoint to prune (default: %(default)s)")
    prune.add_argument("--target_num_heads", type=positive_int, default=8, help="heads a layer (default: 8)")
    prune.add_argument("--target_ffn_dim", type=positive_int, default=2048,
                       help="feed-forward units a layer (default: 2048)")
    prune.add_argument("--dont_normalize_importance_by_layer", action="store_true",
                       help="report importance as it is, not by each layer's L2 norm; which heads and units go is "
                            "decided within each layer, so that it is the same")
    prune.add_argument("--save_path_pruned", default="pytorch-model-pruned.pt", help="(default: %(default)s)")
    prune.add_argument("--bert_output_dir_pruned", default="bert-checkpoint-pruned", help="(default: %(default)s)")
    prune.add_argument("--recover_epoch", type=natural_int, default=0,
                       help="epochs of training after it, with train.py's flags; the best is kept (default: 0)")


def distill(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Train a student on what a teacher answers."""
    raise InputError("--do_distill: not there yet.")


# --------------------------------------------------------------------------------------------------------- pruning


def prune(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Remove heads and feed-forward units, and with --recover_epoch train what remains."""
    import pruning
    from dataset import check_same_data
    from model import load_classifier
    from trainer import Trainer, evaluate
    from transformer import check_output_folder, merged_weights
    from util import choose_device, load_checkpoint, save_checkpoint, setup_logging, write_json

    checkpoint = load_checkpoint(args.model_path)
    check_pruning_flags(args, config, checkpoint)
    setup_logging(args.log_path)
    device = choose_device(args.device)
    train, valid = load_data(args, config)
    check_same_data(train, checkpoint, args.model_path)
    model = load_classifier(checkpoint, []).to(device)
    transformer: Any = model.embedding.transformer
    pruning.check_targets(transformer, args.target_num_heads, args.target_ffn_dim)
    args.bert_model_name_or_path = tokenizer_folder(args, checkpoint)
    # From here on it is a run that begins with what is left of the model.
    args.save_path, args.bert_output_dir = args.save_path_pruned, args.bert_output_dir_pruned
    args.epoch = args.recover_epoch
    check_output_folder(args.bert_output_dir, args.data_dir)
    if "quantization" in checkpoint:
        logger.warning("[%s] was trained for int8; its fp32 weights are pruned, and the result answers in int8 as any "
                       "model does, or trained with --recover_epoch and the same flag", args.model_path)

    figures = {"before": measure(model, evaluate(model, valid, args.eval_batch_size, device))}
    figures["before"]["mb"] = os.path.getsize(args.model_path) / 1e6
    importance = pruning.measure_importance(model, valid, args.eval_batch_size, device)
    pruning.prune(transformer, importance, args.target_num_heads, args.target_ffn_dim)
    metrics = evaluate(model, valid, args.eval_batch_size, device)
    figures["pruned"] = measure(model, metrics)
    decoder = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    run = begin(args, config, "fastformers.py", lambda *_: model.cpu())
    run.model.decoder.load_state_dict(decoder)  # one of Gaussians was fitted anew
    if args.recover_epoch:
        trainer = Trainer(run.model, run.train, run.valid, args, run.record, run.accelerator)
        finish(run, trainer)
        figures["recovered"] = {"loss": trainer.best["valid_loss"], "accuracy": trainer.best["valid_accuracy"],
                                "parameters": figures["pruned"]["parameters"]}
    else:
        point = {"step": 0, "epoch": 0, "valid_loss": metrics["loss"], "valid_accuracy": metrics["accuracy"]}
        save_checkpoint({**run.record, "metrics": point, "model": merged_weights(run.model)}, args.save_path)
        publish(args, run.record["identity"])
    figures[list(figures)[-1]]["mb"] = os.path.getsize(args.save_path) / 1e6
    if not args.dont_normalize_importance_by_layer:
        importance = importance.normalized()
    for name, row in figures.items():
        logger.info("[%s] %d parameters%s: valid accuracy %.4f, valid loss %.4f", name, row["parameters"],
                    f", {row['mb']:.1f} MB" if "mb" in row else "", row["accuracy"], row["loss"])
    pruning.draw_importance(importance, args.target_num_heads, args.target_ffn_dim, f"{args.save_path}.importance.png")
    keys = ("run_id", "date", "git_revision", "command", "versions", "config", "flags")
    write_json({**{key: run.record[key] for key in keys}, "pruned_run_id": checkpoint["run_id"], **figures,
                "importance": {name: scores.tolist() for name, scores in importance._asdict().items()}},
               f"{args.save_path}.prune.json")


def check_pruning_flags(args: argparse.Namespace, config: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Refuse flags that do not go with --do_prune, and models that have nothing to prune."""
    for flag in ("restore_path", "bert_remove_layers", "bert_use_feature_based", "gradient_checkpointing"):
        if getattr(args, flag):
            raise InputError(f"--{flag} has no meaning for --do_prune; leave it out.")
    if Path(args.save_path_pruned).absolute() == Path(args.model_path).absolute():
        raise InputError(f"--save_path_pruned={args.save_path_pruned}: that is --model_path; name another file.")
    if checkpoint["facts"]["kind"] != "fs":
        raise InputError(f"{args.model_path}: a model of word vectors, which has no attention heads; --do_prune takes "
                         "transformers.")
    check_same_config(args.config, config, args.model_path, checkpoint["config"])


def tokenizer_folder(args: argparse.Namespace, checkpoint: dict[str, Any]) -> str:
    """Where the tokenizer of a checkpoint is: in --bert_output_dir, if of the same run, or where its run had it from.

    Raises:
        InputError: it is not there, or another one.
    """
    from transformer import load_tokenizer, tokenizer_text
    from util import RUN_ID, saved_fact

    paired = saved_fact(args.bert_output_dir, RUN_ID) == checkpoint["run_id"]
    folder = args.bert_output_dir if paired else checkpoint["flags"]["bert_model_name_or_path"]
    found = hashlib.sha256(tokenizer_text(load_tokenizer(folder)).encode()).hexdigest()
    if found != checkpoint["facts"]["vocab_sha256"]:
        raise InputError(f"{folder}: its tokenizer is not that of {args.model_path}; give the folder of the same run "
                         "as --bert_output_dir.")
    return folder


def measure(model: Any, metrics: dict[str, float]) -> dict[str, float]:
    """The figures of a model: loss and accuracy on the valid data, and its parameters."""
    return {**metrics, "parameters": sum(parameter.numel() for parameter in model.parameters())}


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)
    (distill if args.do_distill else prune)(args, config)


if __name__ == "__main__":
    main()
