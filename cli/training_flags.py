"""What the stages that train share above the loop: flags, data, the record of a run, and what it leaves.

train.py trains a new model; fastformers.py trains students and what it has pruned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.flags import (
    CRITERIA,
    Parser,
    add_bert_flag,
    add_config_flag,
    add_data_dir_flag,
    add_device_flag,
    encoded_kind,
    natural_int,
    number,
    number_list,
    one_of,
    positive_int,
)
from sentence_classifier.errors import FlagError, InputError
from sentence_classifier.tokenizers import SUBWORDS, VOCABULARY_FILES, WORDS
from text.labels import NO_LABEL, read_labels
from util import Checkpoint, RunInfo, open_input

if TYPE_CHECKING:  # `X.py --help` loads no torch
    from training.trainer import Trainer

logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = {WORDS: 64, SUBWORDS: 3}  # words, with early stopping; transformers


def add_training_flags(parser: Parser) -> None:
    """All that a training run can be told."""
    files = parser.add_argument_group("files")
    add_config_flag(files, "configs/config-glove-cnn.json")
    add_data_dir_flag(files)
    files.add_argument("--embedding_filename", default="embedding.npy", help="in DATA_DIR (default: %(default)s)")
    files.add_argument("--label_filename", default="label.txt", help="in DATA_DIR (default: %(default)s)")
    files.add_argument("--augmented", action="store_true", help="train on augmented.txt in place of train.txt")
    files.add_argument("--save_path", default="pytorch-model.pt", help="(default: %(default)s)")
    files.add_argument("--restore_path", help="begin with this checkpoint's weights")
    files.add_argument("--resume", action="store_true", help="go on with the run that SAVE_PATH.state holds")
    files.add_argument("--keep_checkpoints", type=natural_int, default=0, metavar="N",
                       help="keep the N models before the best one, as SAVE_PATH.1 (the newest) to SAVE_PATH.N "
                            "(default: 0)")
    files.add_argument("--log_dir", default="runs", help="TensorBoard files (default: %(default)s)")
    files.add_argument("--log_path", default="train.log", help="the training log (default: %(default)s)")

    course = parser.add_argument_group("course of the training")
    course.add_argument("--batch_size", type=positive_int, default=128, help="(default: 128)")
    course.add_argument("--eval_batch_size", type=positive_int, default=128, help="(default: 128)")
    course.add_argument("--epoch", type=positive_int,
                        help="at most so many (default: 64 for GloVe, 3 for transformers)")
    course.add_argument("--max_train_steps", type=positive_int, help="at most so many optimizer steps")
    course.add_argument("--eval_and_save_steps", type=positive_int, default=500,
                        help="steps between evaluations, beside the one at each epoch's end (default: 500)")
    course.add_argument("--patience", type=positive_int, default=7,
                        help="epochs without a gain on valid after which training stops (default: 7)")
    course.add_argument("--measure", choices=("loss", "accuracy", "last"), default="loss",
                        help="what the model that is kept has the best of, on valid; of equals in accuracy the later "
                             "is kept; last: the newest whatever valid says, to the schedule's end (default: loss)")
    course.add_argument("--seed", type=natural_int, default=42, help="(default: 42)")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--lr", type=number(), default=2e-4, help="(default: 2e-4)")
    optimizer.add_argument("--embedding_lr", type=number(),
                           help="of the word vectors or the transformer (default: that of --lr)")
    optimizer.add_argument("--layer_lr_decay", type=number(0, 1), default=1.0, metavar="FACTOR",
                           help="of a transformer's learning rate, for each layer further down (default: 1.0)")
    optimizer.add_argument("--num_warmup_steps", type=natural_int, help="steps of rising learning rate, or else")
    optimizer.add_argument("--warmup_epoch", type=number(), default=0, help="epochs of it (default: 0), or else")
    optimizer.add_argument("--warmup_ratio", type=number(0, 1), default=0.0, help="its share (default: 0.0)")
    optimizer.add_argument("--adam_epsilon", type=number(), default=1e-8, help="(default: 1e-8)")
    optimizer.add_argument("--weight_decay", type=number(), default=0.01, help="(default: 0.01)")
    optimizer.add_argument("--gradient_accumulation_steps", type=positive_int, default=1,
                           help="batches an optimizer step (default: 1)")
    optimizer.add_argument("--max_grad_norm", type=number(), default=1.0, help="0: no clipping (default: 1.0)")

    loss = parser.add_argument_group("loss and regularization")
    loss.add_argument("--criterion", choices=CRITERIA, default="CrossEntropyLoss", help="(default: %(default)s)")
    loss.add_argument("--kd_temperature", type=number(1e-3, 1e3), default=1.0,
                      help="divides a teacher's logits and the student's before their softmax (default: 1.0)")
    loss.add_argument("--class_weights", choices=("none", "balanced"), default="none",
                      help="balanced: rare classes count as much as frequent ones (default: none)")
    loss.add_argument("--embedding_trainable", action=argparse.BooleanOptionalAction, default=False,
                      help="train the vectors of all words of train.txt, not only of those the vector file lacks")
    loss.add_argument("--word_dropout", type=number(), default=0.0, metavar="ALPHA",
                      help="training reads <unk> in place of a word that occurs N times with the probability "
                           "ALPHA / (ALPHA + N) (default: 0.0)")
    loss.add_argument("--embedding_dropout", type=number(0, 1, below=True), default=0.0,
                      help="dropout on word vectors (default: 0.0)")
    loss.add_argument("--token_cutoff", type=number(0, 1, below=True), default=0.0, metavar="SHARE",
                      help="of a transformer's tokens, which training reads as zeros (default: 0.0)")
    loss.add_argument("--rdrop", type=number(), default=0.0, metavar="WEIGHT",
                      help="weight of R-Drop: two passes with different dropout must agree (default: 0.0)")
    loss.add_argument("--ema_decay", type=number(0, 1, below=True), default=0.0,
                      help="evaluate and save an exponential moving average of the weights (default: 0.0, none)")

    bert = parser.add_argument_group("transformers")
    add_bert_flag(bert)
    bert.add_argument("--bert_output_dir", default="bert-checkpoint",
                      help="the fine-tuned model and its tokenizer (default: %(default)s)")
    bert.add_argument("--bert_use_feature_based", action="store_true", help="the transformer frozen")
    bert.add_argument("--bert_remove_layers", type=number_list, metavar="8,9,10,11", help="without these layers")
    bert.add_argument("--lora_r", type=positive_int, metavar="RANK",
                      help="freeze the transformer and train low-rank updates of its matrices, which are merged into "
                           "it in the checkpoint: less memory for large models; wants a higher --lr, such as 5e-4")
    bert.add_argument("--gradient_checkpointing", action="store_true",
                      help="compute activations twice in place of keeping them: less memory, slower")

    int8 = parser.add_argument_group("quantization-aware training: evaluate.py answers in int8 with the same flag")
    int8.add_argument("--enable_qat", action="store_true", help="weights and activations are rounded in training")
    int8.add_argument("--enable_qat_fx", action="store_true", help="the same, for evaluation as a compiled graph")
    int8.add_argument("--enable_diffq", action="store_true",
                      help="DiffQ: learn the bits of each group of weights (the package diffq is CC BY-NC 4.0)")
    int8.add_argument("--diffq_penalty", type=number(), default=1e-3, help="of each MB of its size (default: 1e-3)")

    machine = parser.add_argument_group("machine")
    add_device_flag(machine)
    machine.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"), default="auto",
                         help="auto: bf16 where the processor or GPU is fast at it (default: auto)")
    machine.add_argument("--compile", action="store_true",
                         help="compile the model first (minutes; needs a C++ compiler): pays in long runs")
    machine.add_argument("--fp16", action="store_true", help="the same as --mixed_precision fp16")

    processes = parser.add_argument_group(
        "several processes: the same command line after torchrun --nproc_per_node 2 or accelerate launch; --batch_size "
        "is of each process")
    processes.add_argument("--zero_stage", type=int, choices=(0, 1, 2, 3),
                           help="DeepSpeed shares out among processes the optimizer's state (1), gradients too (2), "
                                "weights too (3); 0: no DeepSpeed (default: as accelerate launch says, else 0)")
    processes.add_argument("--offload_optimizer", choices=("cpu", "none"),
                           help="DeepSpeed keeps the optimizer's state in the machine's memory (default: none)")
    processes.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers; the environment decides")


def check_training_flags(parser: Parser, args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Resolve what depends on other flags and on the config; flags that do not go together end the stage."""
    if args.fp16:
        args.mixed_precision = "fp16"
    transformer = encoded_kind(config) == SUBWORDS
    for flag, none in (("lora_r", None), ("layer_lr_decay", 1)):
        if getattr(args, flag) != none and (not transformer or args.bert_use_feature_based):
            parser.error(f"--{flag} is of a transformer that is trained; it goes neither with word vectors nor with "
                         "--bert_use_feature_based")
    if args.token_cutoff and not transformer:
        parser.error("--token_cutoff is of a transformer's tokens; word vectors have --word_dropout")
    if args.word_dropout and transformer:
        parser.error("--word_dropout is of word vectors; a transformer has --token_cutoff")
    if args.epoch is None:
        args.epoch = DEFAULT_EPOCHS[encoded_kind(config)]
    if chosen := one_of(args, "enable_qat", "enable_qat_fx", "enable_diffq"):
        for other in ("compile", "lora_r"):
            if getattr(args, other):
                parser.error(f"--{chosen} and --{other} do not go together; leave one of them out")
        if args.enable_diffq and args.gradient_checkpointing:
            parser.error("--enable_diffq draws noise for each pass, and --gradient_checkpointing computes some of it "
                         "twice; leave one of them out")


def load_data(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Any, Any]:
    """The encoded training and valid data, checked against each other, label.txt, the config and the criterion."""
    from dataset import EncodedData

    folder, kind = Path(args.data_dir), encoded_kind(config)
    train = EncodedData(folder / f"{'augmented' if args.augmented else 'train'}.txt.{kind}")
    valid = EncodedData(folder / f"valid.txt.{kind}")
    for fact in ("labels", "vocab_sha256", "table", "n_ctx", "tokenizer", "lowercase"):
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
        config["n_ctx"] = train.encoding.n_ctx
    if (train.targets == NO_LABEL).any() and not train.has_logits:
        raise InputError(f"{train.path}: its sentences have no labels; label them with evaluate.py --augmented, copy "
                         "augmented.raw.pred to augmented.txt and encode that.")
    check_loss_flags(args, train)
    return train, valid


def check_loss_flags(args: argparse.Namespace, train: Any) -> None:
    """Refuse what does not go with the targets of the training data.

    Raises:
        FlagError: names the flag.
    """
    if args.criterion in ("MSELoss", "KLDivLoss") and not train.has_logits:
        raise FlagError(f"{train.path}: --criterion={args.criterion} learns from a teacher's logits, and these are "
                        "class labels; use CrossEntropyLoss.")
    taught = train.has_logits or getattr(args, "do_distill", False)
    if args.kd_temperature != 1 and (args.criterion == "MSELoss" or not taught):
        raise FlagError(f"--kd_temperature={args.kd_temperature:g} has no meaning for "
                        + ("--criterion=MSELoss, which compares the logits themselves." if taught else
                           f"{train.path}, which holds class labels and no teacher's logits."))
    if args.criterion in ("MSELoss", "KLDivLoss") and args.class_weights != "none":
        raise FlagError(f"--class_weights={args.class_weights} has no meaning for --criterion={args.criterion}.")


def fit_gaussian(model: Any, data: Any) -> None:
    """Set the Gaussian decoder in closed form, from which training goes on."""
    import torch
    import torch.nn.functional as F

    from dataset import BucketSampler, make_loader

    def encodings() -> Any:
        for batch in make_loader(data, BucketSampler(data.lengths, 1024, shuffle=False)):
            assert batch.targets is not None  # encoded data have them
            share = batch.targets.softmax(-1) if data.has_logits else F.one_hot(batch.targets, len(data.labels))
            yield model.encode(batch.input_ids, batch.attention_mask), share

    model.eval()
    with torch.no_grad():
        model.decoder.fit(encodings())


def make_run_info(args: argparse.Namespace, config: dict[str, Any], train: Any, valid: Any, embedding: Any,
                precision: str) -> RunInfo:
    """What the checkpoint says of the run beside the weights: all that evaluation, resume and a reader need."""
    from util import git_revision, new_run_id, versions

    path = Path(args.data_dir) / VOCABULARY_FILES[train.encoding.kind]
    with open_input(path) as file:
        vocabulary = file.read()
    if hashlib.sha256(vocabulary).hexdigest() != train.encoding.vocab_sha256:
        raise InputError(f"{path}: not the vocabulary that {train.path} was encoded with; "
                         "run preprocess.py again.")
    flags = {key: value for key, value in vars(args).items() if key not in ("resume", "command")}
    flags["precision"] = precision
    # What decides is the table of vectors and the tokenizer, not the names of the files that they came from.
    made_from = json.dumps([config, train.encoding.decisive(), valid.encoding.source_sha256, embedding.identity()],
                           sort_keys=True)
    return RunInfo(run_id=new_run_id(), identity=hashlib.sha256(made_from.encode()).hexdigest(), config=config,
                   flags=flags, encoding=train.encoding, vocabulary=vocabulary.decode("utf-8"),
                   embedding=embedding.metadata(), versions=versions(), git_revision=git_revision(),
                   date=time.strftime("%Y-%m-%d %H:%M:%S"), command=args.command)


@dataclass
class Run:
    """A training run that is about to begin: what a Trainer is made of."""

    args: argparse.Namespace
    config: dict[str, Any]
    train: Any
    valid: Any
    info: RunInfo
    model: Any
    accelerator: Any
    state: dict[str, Any] | None  # of the run to go on with


def new_model(args: argparse.Namespace, config: dict[str, Any], train: Any) -> Any:
    """The untrained classifier that the config describes."""
    from model import EMBEDDINGS, build_model

    embedding = EMBEDDINGS[train.encoding.kind].for_training(train, args)
    return build_model(config, len(train.labels), embedding)


def begin(args: argparse.Namespace, config: dict[str, Any],
          make_model: Callable[[argparse.Namespace, dict[str, Any], Any], Any] = new_model) -> Run:
    """Prepare a run up to its first step.

    Args:
        args, config: as a stage's get_params makes them.
        make_model: the classifier to begin with, of the flags, the config and the training data.
    """
    from pretrained.loading import add_lora, check_output_folder
    from training.distributed import make_accelerator
    from training.speedups import speed_up_training
    from training.trainer import find_state
    from util import choose_device, choose_precision, load_checkpoint, set_seed

    config = dict(config)  # load_data may correct it
    device = choose_device(args.device)
    precision = choose_precision(args.mixed_precision, device)
    train, valid = load_data(args, config)
    if train.encoding.kind == SUBWORDS:
        check_output_folder(args.bert_output_dir, args.data_dir)
    accelerator = make_accelerator(args, device, precision)
    set_seed(args.seed)
    model = make_model(args, config, train)
    if train.encoding.kind == SUBWORDS:
        # LoRA trains no token; DiffQ rounds all of them; meta pseudo labels read more text than the training data.
        whole = args.lora_r or args.enable_diffq or getattr(args, "mpl_data_path", None)
        speed_up_training(model.embedding.transformer, device, None if whole else train.token_ids)
    info = make_run_info(args, config, train, valid, model.embedding, precision)
    state = find_state(args.save_path, accelerator.num_processes) if args.resume else None
    if args.resume and not state:
        logger.info("[no %s.state to resume: beginning at the beginning]", args.save_path)
    if args.restore_path and not state:
        restore(model, load_checkpoint(args.restore_path), info, args.restore_path)
    elif config["enc_class"] == "gnb" and not state:
        fit_gaussian(model, train)
    if args.lora_r:
        add_lora(model.embedding.transformer, args.lora_r)
    return Run(args, config, train, valid, info, model, accelerator, state)


def finish(run: Run, trainer: Trainer, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train to the end, and write the results and the transformer.

    Args:
        more: what the results say beside the history.

    Returns:
        The results.
    """
    from pretrained.loading import TransformerEmbedding
    from training.distributed import described
    from util import write_json

    args, info, accelerator = run.args, run.info, run.accelerator
    logger.info("[run %s] %s on %s, precision %s, %d sentences, %d steps%s", info.run_id, args.config,
                accelerator.device, info.flags["precision"], len(run.train), trainer.total_steps,
                described(accelerator))
    try:
        best = trainer.fit()
        results = {**info.summary(), **(more or {}), "best": best, "history": trainer.history}
        if accelerator.is_main_process:
            logger.info("[best model] step %d: valid loss %.4f, valid accuracy %.4f -> %s", best["step"],
                        best["valid_loss"], best["valid_accuracy"], args.save_path)
            write_json(results, f"{args.save_path}.train.json")
    finally:  # an interrupted run leaves a whole pair, too
        if isinstance(run.model.embedding, TransformerEmbedding) and trainer.best and accelerator.is_main_process:
            publish(args, info.identity)
    accelerator.wait_for_everyone()
    return results


def publish(args: argparse.Namespace, identity: str) -> None:
    """Write the best model's transformer and tokenizer to --bert_output_dir, from where it can be fine-tuned again."""
    from model import load_classifier
    from pretrained.loading import load_tokenizer, save_pretrained
    from util import load_checkpoint

    checkpoint = load_checkpoint(args.save_path)
    model = load_classifier(checkpoint, [])
    save_pretrained(model.embedding.transformer, load_tokenizer(args.bert_model_name_or_path),
                    list(checkpoint.run.labels.names), checkpoint.run.run_id, identity, args.bert_output_dir)
    logger.info("[transformer and tokenizer of run %s] -> %s", checkpoint.run.run_id, args.bert_output_dir)


def restore(model: Any, checkpoint: Checkpoint, info: RunInfo, path: str) -> None:
    """Begin with another run's weights; they must fit one to one, and mean the same."""
    for key in ("labels", "vocabulary"):
        if getattr(checkpoint.run, key) != getattr(info, key):
            raise InputError(f"{path}: its {key} differ from those of the data; encode the data as for that run, or "
                             "train without --restore_path.")
    try:
        model.load_state_dict(checkpoint.model)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: its weights do not fit this config and vocabulary ({reason}).") from None
