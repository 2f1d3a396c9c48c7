"""Make a transformer small: a student that learns from a teacher, or heads and feed-forward units removed.

Reads   what train.py reads; --do_distill: TEACHER_MODEL_PATH, with --mpl_data_path unlabelled text, too;
        --do_prune: MODEL_PATH.
Writes  --do_distill: what train.py writes, and SAVE_PATH.curves.png; --do_prune: SAVE_PATH_PRUNED and
        BERT_OUTPUT_DIR_PRUNED.

    python fastformers.py --do_distill --teacher_model_path=teacher.pt --student_init_layers=0,2,4 \\
        --config=configs/config-bert-cls.json --bert_model_name_or_path=embeddings/all-MiniLM-L6-v2
    python fastformers.py --do_prune --model_path=pytorch-model.pt --target_num_heads=6 --target_ffn_dim=512
"""

from __future__ import annotations

import argparse
from typing import Any

from arguments import Parser, natural_int, number, number_list, one_of, positive_int
from text import InputError, fail_cleanly
from training import add_training_flags, check_training_flags


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
                       help="compare the importance of heads as it is, not by each layer's share")
    prune.add_argument("--save_path_pruned", default="pytorch-model-pruned.pt", help="(default: %(default)s)")
    prune.add_argument("--bert_output_dir_pruned", default="bert-checkpoint-pruned", help="(default: %(default)s)")


def distill(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Train a student on what a teacher answers."""
    raise InputError("--do_distill: not there yet.")


def prune(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Remove heads and feed-forward units."""
    raise InputError("--do_prune: not there yet.")


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)
    (distill if args.do_distill else prune)(args, config)


if __name__ == "__main__":
    main()
