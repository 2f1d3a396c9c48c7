"""Train a classifier on encoded data and keep the model that is best on the valid data: the second stage.

Reads   DATA_DIR/train.txt.ids, valid.txt.ids, vocab.txt, label.txt, embedding.npy, as preprocess.py made them; for
        transformers train.txt.fs, valid.txt.fs, tokenizer.json, and the pretrained model.
Writes  SAVE_PATH (the best model), SAVE_PATH.state and within an epoch SAVE_PATH.state.epoch (for --resume),
        SAVE_PATH.train.json (results), train.log, TensorBoard curves under LOG_DIR; for transformers BERT_OUTPUT_DIR,
        the fine-tuned model in the hub's layout.
        With --hp_search_optuna SAVE_PATH.trials/, see search.py.

    python train.py --config=configs/config-glove-cnn.json --data_dir=data/snips --embedding_trainable
    python train.py --config=configs/config-bert-cls.json --bert_model_name_or_path=embeddings/all-MiniLM-L6-v2
    python train.py --config=configs/config-glove-cnn.json --hp_search_optuna --hp_trials=24
    torchrun --nproc_per_node 2 train.py --config=configs/config-gpt-cls.json --zero_stage=2 ...

An optimizer step takes --batch_size x --gradient_accumulation_steps x processes sentences, drawn as a whole: runs in
which the product is the same take the same steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from cli.flags import Parser, natural_int, positive_int
from cli.training_flags import add_training_flags, begin, check_training_flags, finish, load_data
from sentence_classifier.errors import fail_cleanly


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__)
    add_training_flags(parser)
    trials = parser.add_argument_group("hyper-parameter search")
    trials.add_argument("--hp_search_optuna", action="store_true",
                        help="train many times and print the best command line; several workers share one storage")
    trials.add_argument("--hp_trials", type=positive_int, default=24, help="of all workers together (default: 24)")
    trials.add_argument("--hp_space", metavar="FILE.json",
                        help='flags and their values, {"lr": {"low": 1e-5, "high": 1e-2, "log": true}, "batch_size": '
                             "[32, 64]} (default: lr, batch_size, seed and epoch up to --epoch; see space.py)")
    trials.add_argument("--hp_storage", metavar="URL|FILE.journal",
                        help="a database's URL or a journal file, .log or .journal (default: "
                             "SAVE_PATH.trials/study.journal)")
    trials.add_argument("--hp_study", metavar="NAME",
                        help="the study within the storage (default: by config, data, space and flags)")
    trials.add_argument("--hp_sampler_seed", type=natural_int,
                        help="trials are drawn from it and their numbers (default: that of --seed)")
    return parser


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = make_parser()
    args, config = parser.parse_with_config(argv)
    check_training_flags(parser, args, config)
    args.command = " ".join(["train.py", *(sys.argv[1:] if argv is None else argv)])
    return args, config


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)

    from training.distributed import end_processes
    from util import setup_logging

    setup_logging(args.log_path)
    if args.hp_search_optuna:
        from training.search import search

        parser = make_parser()
        parser.parse_with_config([f"--config={args.config}"])  # the config's settings as defaults
        search(args, parser, get_params, run, load_data(args, config))
    else:
        run(args, config)
        end_processes()


def run(args: argparse.Namespace, config: dict[str, Any],
        on_epoch: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
    """One training, from the flags to the files. Returns the metrics of the best model.

    Args:
        args, config: as get_params makes them.
        on_epoch: called after each epoch's evaluation with the number of epochs done and the evaluation's metrics,
            see Trainer.history; an exception of it ends the training.
    """
    from training.distributed import ending_together
    from training.trainer import Trainer

    begun = begin(args, config)
    with ending_together(begun.accelerator, f"--resume goes on from {args.save_path}.state."):
        trainer = Trainer(begun.model, begun.train, begun.valid, args, begun.info, begun.accelerator, on_epoch,
                          begun.state)
        return finish(begun, trainer)["best"]


if __name__ == "__main__":
    from util import keep_freed_memory

    keep_freed_memory()
    main()
