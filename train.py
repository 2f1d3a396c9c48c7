"""Train a classifier on encoded data: the second stage. The model that --measure names is kept.

Reads   DATA_DIR/train.txt.ids, valid.txt.ids, vocab.txt, label.txt, embedding.npy, as preprocess.py made them; for
        transformers train.txt.fs, valid.txt.fs, tokenizer.json, and the pretrained model.
Writes  SAVE_PATH (the model), SAVE_PATH.state and within an epoch SAVE_PATH.state.epoch (for --resume),
        SAVE_PATH.train.json (results), train.log, TensorBoard curves under LOG_DIR; for transformers BERT_OUTPUT_DIR,
        the fine-tuned model in the hub's layout.
        With --hp_search_optuna SAVE_PATH.trials/, see training/search.py.

    python train.py --config=configs/config-glove-cnn.json --data_dir=data/snips --embedding_trainable
    python train.py --config=configs/config-bert-cls.json --bert_model_name_or_path=embeddings/all-MiniLM-L6-v2
    python train.py --config=configs/config-glove-cnn.json --hp_search_optuna --hp_trials=24
    torchrun --nproc_per_node 2 train.py --config=configs/config-gpt-cls.json --zero_stage=2 ...

An optimizer step takes --batch_size x --gradient_accumulation_steps x processes sentences, drawn as a whole: runs in
which the product is the same take the same steps.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cli.config import encoded_kind, parse_with_config
from cli.devices import choose_device, choose_precision, use_device
from cli.flags import Parser, natural_int, positive_int
from cli.training_flags import TABLE, Flag, Group, add_flags, check_training_flags
from sentence_classifier.errors import fail_cleanly
from sentence_classifier.tokenizers import SUBWORDS
from util import exclusive, keep_freed_memory, load_checkpoint, set_seed, setup_logging, write_json

if TYPE_CHECKING:  # --help loads no torch
    from dataset import EncodedData
    from training.run import Run
    from training.trainer import Trainer

logger = logging.getLogger(__name__)


SEARCH = Group("hyper-parameter search")
SEARCH_FLAGS = (
    Flag("hp_search_optuna", SEARCH, "Train many times and print the best command line; several workers share one "
         "storage.", action="store_true"),
    Flag("hp_trials", SEARCH, "The number of trials of all workers together.", positive_int, 24),
    Flag("hp_space", SEARCH, 'The flags to vary and their values, {"lr": {"low": 1e-5, "high": 1e-2, "log": true}, '
         '"batch_size": [32, 64]}.', metavar="FILE.json",
         says_default="lr, batch_size, seed and epoch up to --epoch; see training/search_space.py"),
    Flag("hp_storage", SEARCH, "Where workers meet: a database's URL, or a journal file, .log or .journal.",
         metavar="URL|FILE.journal", says_default="SAVE_PATH.trials/study.journal"),
    Flag("hp_study", SEARCH, "The study within the storage.", metavar="NAME",
         says_default="a name made from config, data, space and flags"),
    Flag("hp_sampler_seed", SEARCH, "Draw each trial from this seed and the trial's number.", natural_int,
         says_default="that of --seed"),
)


def make_parser() -> Parser:
    parser = Parser(__doc__, __file__)
    add_flags(parser, (*TABLE, *SEARCH_FLAGS))
    return parser


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    args, config = parse_with_config(make_parser(), argv)
    check_training_flags(args, encoded_kind(config))
    return args, config


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    args, config = get_params(argv)
    setup_logging(args.log_path)
    if args.hp_search_optuna:
        from training.run import load_data
        from training.search import search

        parser = make_parser()
        parse_with_config(parser, [f"--config={args.config}"])  # the config's settings as defaults
        search(args, parser, get_params, run, load_data(args, config, encoded_kind(config)))
    else:
        from accelerate import PartialState

        run(args, config)
        PartialState().destroy_process_group()


def run(args: argparse.Namespace, config: dict[str, Any],
        on_epoch: Callable[[int, dict[str, float]], None] | None = None, *,
        data: tuple[EncodedData, EncodedData] | None = None, make_model: Callable[..., Any] | None = None,
        make_trainer: Callable[[Run], Trainer] | None = None, whole_table: bool = False,
        notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """One training, from the flags to the files. Returns the metrics of the model that is kept.

    Args:
        on_epoch: see Trainer.
        data: for training and validation, where they are loaded already.
        make_model: the classifier to begin with, as new_model makes it.
        make_trainer: what trains it.
        whole_table: train a transformer's whole token table, since more text than the training data is read.
        notes: what the results say beside the history.
    """
    from pretrained.saving import check_output_folder
    from pretrained.surgery import add_lora
    from training.distributed import described, ending_together, make_accelerator
    from training.run import Run, describe, load_data, log_recipe, new_model, publish, restore
    from training.speedups import speed_up_training
    from training.trainer import Trainer, find_state

    # device
    device = choose_device(args.device)
    use_device(device)
    precision = choose_precision(args.mixed_precision, device)
    # data
    train, valid = data or load_data(args, config, encoded_kind(config))
    transformer = train.encoding.kind == SUBWORDS
    if train.multi_label:  # preprocess.py --multi_label may have said so, and not the config
        config = {**config, "multi_label": True}
    # Only one run at a time writes to a place.
    with exclusive("--save_path", args.save_path), exclusive("--bert_output_dir",
                                                             args.bert_output_dir if transformer else None):
        if transformer:
            check_output_folder(args.bert_output_dir, args.data_dir)
        # model
        accelerator = make_accelerator(args, device, precision)
        set_seed(args.seed)
        model = make_model(args, config, train) if make_model else new_model(args, config, train, accelerator)
        if transformer:
            # LoRA trains no token, and DiffQ rounds all of them.
            every_row = args.lora_r or args.enable_diffq or whole_table
            speed_up_training(model.embedding.transformer, device, None if every_row else train.token_ids)
        info = describe(args, config, train, valid, model, precision)
        state = find_state(args.save_path, accelerator.num_processes) if args.resume else None
        if args.restore_path and not state:
            restore(model, load_checkpoint(args.restore_path), info, args.restore_path)
        if args.lora_r:
            add_lora(model.embedding.transformer, args.lora_r)
        # optimizer, loop
        begun = Run(args, train, valid, info, model, accelerator, state)
        with ending_together(accelerator, f"--resume goes on from {args.save_path}.state."):
            trainer = make_trainer(begun) if make_trainer else Trainer(begun, on_epoch)
            logger.info("[run %s] %s on %s, precision %s, %d sentences, %d steps%s", trainer.info.run_id, args.config,
                        device, precision, len(train), trainer.total_steps, described(accelerator))
            log_recipe(args, train.encoding.kind, precision)
            try:
                best = trainer.fit()
                # results
                if accelerator.is_main_process:
                    logger.info("[best model] step %d: valid loss %.4f, valid accuracy %.4f -> %s", best["step"],
                                best["valid_loss"], best["valid_accuracy"], args.save_path)
                    write_json({**trainer.info.summary(), **(notes or {}), **trainer.notes, "best": best,
                                "history": trainer.progress.history}, f"{args.save_path}.train.json")
            finally:  # an interrupted run leaves a whole pair, too
                if transformer and trainer.progress.best and accelerator.is_main_process:
                    publish(args)
            accelerator.wait_for_everyone()
    return best


if __name__ == "__main__":
    keep_freed_memory()
    main()
