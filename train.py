"""Train a classifier on encoded data and keep the model that is best on the valid data: the second stage.

Reads   DATA_DIR/train.txt.ids, valid.txt.ids, vocab.txt, label.txt, embedding.npy, as preprocess.py made them; for
        transformers train.txt.fs, valid.txt.fs, tokenizer.json, and the pretrained model.
Writes  SAVE_PATH (the best model), SAVE_PATH.state (for --resume), SAVE_PATH.train.json (results), train.log,
        TensorBoard curves under LOG_DIR; for transformers BERT_OUTPUT_DIR, the fine-tuned model in the hub's layout.

    python train.py --config=configs/config-glove-cnn.json --data_dir=data/snips --embedding_trainable
    python train.py --config=configs/config-bert-cls.json --bert_model_name_or_path=embeddings/all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
from typing import Any

from arguments import Parser
from text import fail_cleanly
from training import add_training_flags, begin, check_training_flags, finish


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = Parser(__doc__)
    add_training_flags(parser)
    args, config = parser.parse_with_config(argv)
    check_training_flags(parser, args, config)
    return args, config


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)
    run = begin(args, config, "train.py")

    from trainer import Trainer

    finish(run, Trainer(run.model, run.train, run.valid, args, run.record, run.accelerator))


if __name__ == "__main__":
    main()
