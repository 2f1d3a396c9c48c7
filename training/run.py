"""What a training run begins with and what it leaves: data, model, what is said of the run, the transformer's folder.

train.py puts these together for a new model; fastformers.py for students and for what it has pruned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cli.training_flags import SEARCHABLE, check_loss_flags
from dataset import EncodedData
from model import EMBEDDINGS, Classifier, TransformerEmbedding, build_model, load_classifier
from pretrained.loading import load_tokenizer
from pretrained.saving import save_pretrained
from sentence_classifier.errors import InputError
from sentence_classifier.lines import open_input
from sentence_classifier.tokenizers import SUBWORDS, VOCABULARY_FILES, WORDS
from text.labels import read_labels
from training.losses import fit_decoder
from util import Checkpoint, RunInfo, git_revision, load_checkpoint, versions

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run before its first step: what a Trainer is made of."""

    args: argparse.Namespace  # as the stage's get_params made them
    train: EncodedData
    valid: EncodedData
    info: RunInfo
    model: Classifier  # on the CPU
    accelerator: Accelerator
    state: dict[str, Any] | None = None  # of the run to go on with, see trainer.find_state


def load_data(args: argparse.Namespace, config: dict[str, Any], kind: str,
              taught: bool = False) -> tuple[EncodedData, EncodedData]:
    """The encoded training and valid data, checked against each other, label.txt, the config and the criterion.

    `taught`: a teacher answers during training.
    """
    folder = Path(args.data_dir)
    train = EncodedData(folder / f"{'augmented' if args.augmented else 'train'}.txt.{kind}")
    valid = EncodedData(folder / f"valid.txt.{kind}")
    for fact in ("labels", "vocab_sha256", "table", "n_ctx", "tokenizer", "lowercase", "multi_label"):
        if getattr(train.encoding, fact) != getattr(valid.encoding, fact):
            raise InputError(f"{valid.path}: not encoded together with {train.path}; run preprocess.py again.")
    if read_labels(folder / args.label_filename) != train.labels:
        raise InputError(f"{folder / args.label_filename}: not the labels that {train.path} was encoded with; "
                         "run preprocess.py again.")
    for key in ("lowercase", "tokenizer"):
        if config.get(key) != getattr(train.encoding, key):
            raise InputError(f"{args.config}: {key} is {json.dumps(config[key])}, and {train.path} was encoded with "
                             f"{json.dumps(getattr(train.encoding, key))}; run preprocess.py with this config.")
    if config["n_ctx"] != train.encoding.n_ctx:  # preprocess.py --n_ctx is allowed to differ from the config
        logger.warning("[n_ctx] is %d in %s, and %d in the encoded data, which decide", config["n_ctx"], args.config,
                       train.encoding.n_ctx)
    if train.lacks_labels:
        raise InputError(f"{train.path}: its sentences have no labels; label them with evaluate.py --augmented, copy "
                         "augmented.raw.pred to augmented.txt and encode that.")
    if config.get("multi_label") and not train.multi_label:
        raise InputError(f"{train.path}: encoded with one label a sentence, and {args.config} says multi_label; run "
                         "preprocess.py with this config.")
    check_loss_flags(args, train.path, train.has_logits, taught)
    return train, valid


def new_model(args: argparse.Namespace, config: dict[str, Any], train: EncodedData,
              accelerator: Accelerator) -> Classifier:
    """The untrained classifier that the config describes; a Gaussian decoder is fitted in closed form."""
    embedding = EMBEDDINGS[train.encoding.kind].for_training(train, **vars(args))
    model = build_model(config, len(train.labels), embedding)
    fit_decoder(model, train, args.eval_batch_size, accelerator)
    return model


def describe(args: argparse.Namespace, config: dict[str, Any], train: EncodedData, valid: EncodedData,
             model: Classifier, precision: str) -> RunInfo:
    """What the checkpoint says of the run beside the weights: all that evaluation, resume and a reader need.

    Raises:
        InputError: the vocabulary's file is not that of the data.
    """
    path = Path(args.data_dir) / VOCABULARY_FILES[train.encoding.kind]
    with open_input(path) as file:
        vocabulary = file.read()
    if hashlib.sha256(vocabulary).hexdigest() != train.encoding.vocab_sha256:
        raise InputError(f"{path}: not the vocabulary that {train.path} was encoded with; run preprocess.py again.")
    flags = {key: value for key, value in vars(args).items() if key not in ("resume", "command", "sources")}
    config = {**config, "n_ctx": train.encoding.n_ctx}
    # What decides is the table of vectors and the tokenizer, not the names of the files that they came from.
    made_from = json.dumps([config, train.encoding.decisive(), valid.encoding.source_sha256,
                            model.embedding.identity()], sort_keys=True)
    return RunInfo(run_id=uuid.uuid4().hex[:12], identity=hashlib.sha256(made_from.encode()).hexdigest(),
                   config=config, flags={**flags, "precision": precision},
                   encoding=train.encoding, vocabulary=vocabulary.decode("utf-8"),
                   embedding=model.embedding.metadata(), versions=versions(), git_revision=git_revision(),
                   date=time.strftime("%Y-%m-%d %H:%M:%S"), command=args.command)


def log_recipe(args: argparse.Namespace, kind: str, precision: str) -> None:
    """Say once how the run trains, and who said so: a flag, the config or nobody. What is off is left out."""
    said: dict[str, list[str]] = {"flag": [], "config": [], "default": []}
    for name in SEARCHABLE:
        value, source = getattr(args, name), args.sources[name]
        applies = name != "bert_model_name_or_path" or kind == SUBWORDS
        if applies and (source != "default" or value not in (None, False, 0, "none")):
            said[source].append(f"{name}={value}")
    said[args.sources["mixed_precision"]].append(f"precision={precision}")
    logger.info("[recipe] %s", "; ".join(f"{source}: {', '.join(values)}" for source, values in said.items() if values))


def restore(model: Classifier, checkpoint: Checkpoint, info: RunInfo, path: str) -> None:
    """Begin with another run's weights.

    Raises:
        InputError: they do not fit one to one, or mean something else here.
    """
    other = checkpoint.run
    frozen = len(checkpoint.model.get("embedding.trainable", ())) < other.vocabulary.count("\n")
    differing = [what for what, differ in (
        ("labels", other.labels != info.labels), ("vocabulary", other.vocabulary != info.vocabulary),
        ("word vectors", info.encoding.kind == WORDS and frozen and other.encoding.table != info.encoding.table),
    ) if differ]
    if differing:
        raise InputError(f"{path}: its {' and '.join(differing)} differ from those of the data; encode the data as for "
                         "that run, or train without --restore_path.")
    try:
        model.load_state_dict(checkpoint.model)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: its weights do not fit this config and vocabulary ({reason}).") from None


def publish(args: argparse.Namespace) -> None:
    """Write the best model's transformer and tokenizer to --bert_output_dir, from where it can be fine-tuned again."""
    checkpoint = load_checkpoint(args.save_path)
    model = load_classifier(checkpoint, [])
    assert isinstance(model.embedding, TransformerEmbedding)
    run = checkpoint.run
    save_pretrained(model.embedding.transformer, load_tokenizer(args.bert_model_name_or_path), list(run.labels.names),
                    run.run_id, run.identity, args.bert_output_dir)
    logger.info("[transformer and tokenizer of run %s] -> %s", run.run_id, args.bert_output_dir)
