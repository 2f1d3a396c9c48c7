"""The flags of training, in one table: the parser, the config's check, --resume and the search read it.

train.py and fastformers.py have all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cli.flags import DATA_DIR, Parser, natural_int, number, number_list, one_of, positive_int
from sentence_classifier.errors import FlagError
from sentence_classifier.tokenizers import SUBWORDS, WORDS

CRITERIA = ("CrossEntropyLoss", "LabelSmoothingCrossEntropy", "MSELoss", "KLDivLoss")
DEFAULT_EPOCHS = {WORDS: 64, SUBWORDS: 3}
INT8_MODES = ("enable_qat", "enable_qat_fx", "enable_diffq")


def class_weights(text: str) -> str:
    """A flag's value that must be none, balanced or a JSON file."""
    if text not in ("none", "balanced") and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither none nor balanced nor a .json file")
    return text


@dataclass(frozen=True)
class Group:
    """Flags that stand together in --help."""

    title: str
    recipe: bool = False  # they say how to train, not where and on what: the search may vary them
    place: bool = False  # they say where files and processes are, which changes no result
    decisive: bool = False  # a resumed run must have the same


FILES = Group("files", place=True)
COURSE = Group("course of the training", recipe=True, decisive=True)
OPTIMIZER = Group("optimizer", recipe=True, decisive=True)
LOSS = Group("loss and regularization", recipe=True, decisive=True)
TRANSFORMERS = Group("transformers", recipe=True, decisive=True)
QUANTIZATION = Group("quantization-aware training: evaluate.py answers in int8 with the same flag", decisive=True)
MACHINE = Group("machine", place=True)
PROCESSES = Group("several processes: the same command line after torchrun --nproc_per_node 2 or accelerate launch; "
                  "--batch_size is that of each process")


@dataclass(frozen=True)
class Flag:
    """A row of the table. What is not explained here is as argparse has it."""

    name: str
    group: Group
    help: str  # a sentence; the default is added to it
    type: Callable[[str], Any] = str  # from the text that the user types to the value
    default: Any = None
    choices: tuple[Any, ...] | None = None
    in_config: bool = False  # a config may carry it, as part of the recipe that goes with the model
    shared: bool | None = None  # whether a resumed run must have the same, where not as the group's `decisive` says
    says_default: str = ""  # what --help says of the default, where the value itself would not do
    metavar: str | None = None
    nargs: str | None = None
    action: Any = None  # of a switch

    @property
    def decisive(self) -> bool:
        """Whether a resumed run must have the same."""
        return self.group.decisive if self.shared is None else self.shared

    def convert(self, value: Any) -> Any:
        """What the flag would hold for a value of JSON.

        Raises:
            ValueError: what is wrong with the value.
        """
        switch = self.action is not None
        text = not switch and self.type in (str, number_list, class_weights)
        if isinstance(value, bool) != switch or not isinstance(value, str if text else int | float):
            raise ValueError(f"must be {'true or false' if switch else 'a word' if text else 'a number'}")
        if switch:
            return value
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}")
        try:
            return self.type(str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag to a group of a parser."""
        switch = {"action": self.action, "default": bool(self.default)}
        valued = {"type": self.type, "choices": self.choices, "metavar": self.metavar, "default": self.default,
                  "nargs": self.nargs}
        default = self.says_default or ("" if self.default is None or self.action else str(self.default))
        if self.in_config:
            default = f"the config's, else {default}" if default else "the config's"
        text = f"{self.help.removesuffix('.')} (default: {default})." if default else self.help
        names = [f"--{self.name}", *(["--local-rank"] if self.name == "local_rank" else [])]
        group.add_argument(*names, help=text.replace("%", "%%"), **(switch if self.action else valued))


TABLE = (
    Flag("config", FILES, "The model's JSON config.", default="configs/config-glove-cnn.json"),
    Flag("data_dir", FILES, "The folder of train.txt, valid.txt, test.txt and of what preprocess.py makes of them.",
         default=DATA_DIR),
    Flag("embedding_filename", FILES, "The table of word vectors in DATA_DIR.", default="embedding.npy"),
    Flag("label_filename", FILES, "The label map in DATA_DIR.", default="label.txt"),
    Flag("augmented", FILES, "Train on augmented.txt in the place of train.txt.", action="store_true"),
    Flag("save_path", FILES, "The checkpoint to write.", default="pytorch-model.pt"),
    Flag("restore_path", FILES, "Begin with the weights of this checkpoint.", shared=True),
    Flag("resume", FILES, "Go on with the run whose state is SAVE_PATH.state.", action="store_true"),
    Flag("keep_checkpoints", FILES, "Keep the N models before the best one, as SAVE_PATH.1 (the newest) to "
         "SAVE_PATH.N.", natural_int, 0, metavar="N"),
    Flag("bert_output_dir", FILES, "The folder for the fine-tuned transformer and its tokenizer.",
         default="bert-checkpoint"),
    Flag("log_dir", FILES, "The folder of TensorBoard's curves.", default="runs"),
    Flag("log_path", FILES, "The training log.", default="train.log"),

    Flag("batch_size", COURSE, "Sentences of a batch.", positive_int, 128, in_config=True),
    Flag("eval_batch_size", COURSE, "Sentences of a batch in evaluation.", positive_int, 128),
    Flag("epoch", COURSE, "Train for at most this many epochs.", positive_int, in_config=True,
         says_default="64 for word vectors and 3 for transformers"),
    Flag("max_train_steps", COURSE, "Train for at most this many optimizer steps.", positive_int),
    Flag("eval_and_save_steps", COURSE, "Evaluate and save after this many steps, and at the end of each epoch.",
         positive_int, 500),
    Flag("patience", COURSE, "Stop after this many epochs without a gain on valid.", positive_int, 7, in_config=True),
    Flag("measure", COURSE, "Keep the model with the lowest loss or the highest accuracy on valid (the later of two "
         "that are equal), or the last one.", default="loss", choices=("loss", "accuracy", "last"), in_config=True),
    Flag("seed", COURSE, "Draw all random numbers from this seed.", natural_int, 42),

    Flag("lr", OPTIMIZER, "The highest learning rate.", number(), 2e-4, in_config=True, says_default="2e-4"),
    Flag("embedding_lr", OPTIMIZER, "The highest learning rate of the word vectors or the transformer.", number(),
         in_config=True, says_default="that of --lr"),
    Flag("layer_lr_decay", OPTIMIZER, "Multiply a transformer's learning rate by this factor for each layer further "
         "down.", number(0, 1), 1.0, in_config=True, metavar="FACTOR"),
    Flag("num_warmup_steps", OPTIMIZER, "Let the learning rate rise for this many steps.", natural_int,
         says_default="as --warmup_epoch says"),
    Flag("warmup_epoch", OPTIMIZER, "Let the learning rate rise for this many epochs; 0: as --warmup_ratio says.",
         number(), 0),
    Flag("warmup_ratio", OPTIMIZER, "Let the learning rate rise for this share of all steps.", number(0, 1), 0.0,
         in_config=True),
    Flag("adam_epsilon", OPTIMIZER, "AdamW's epsilon.", number(), 1e-8),
    Flag("weight_decay", OPTIMIZER, "AdamW's weight decay of matrices.", number(), 0.01, in_config=True),
    Flag("gradient_accumulation_steps", OPTIMIZER, "Take an optimizer step after this many batches.", positive_int, 1),
    Flag("max_grad_norm", OPTIMIZER, "Clip the gradient to this norm; 0: do not clip.", number(), 1.0),

    Flag("criterion", LOSS, "The loss.", default="CrossEntropyLoss", choices=CRITERIA, in_config=True),
    Flag("kd_temperature", LOSS, "Divide a teacher's logits and the student's by this before their softmax.",
         number(1e-3, 1e3), 1.0, in_config=True),
    Flag("class_weights", LOSS, 'Weigh the classes: balanced lets rare ones count as much as frequent ones; a file '
         'gives weights, {"label": 2.5}, to the labels that shall not have 1.', class_weights, "none",
         metavar="none|balanced|FILE.json"),
    Flag("embedding_trainable", LOSS, "Train the vectors of all words of train.txt, not only of those that the vector "
         "file lacks.", action=argparse.BooleanOptionalAction, default=False, in_config=True, says_default="not"),
    Flag("word_dropout", LOSS, "Read <unk> in training in the place of a word that occurs N times, with the "
         "probability ALPHA / (ALPHA + N).", number(), 0.0, in_config=True, metavar="ALPHA"),
    Flag("embedding_dropout", LOSS, "The dropout on the elements of word vectors.", number(0, 1, below=True), 0.0,
         in_config=True),
    Flag("token_cutoff", LOSS, "Read this share of a transformer's tokens as zeros in training.",
         number(0, 1, below=True), 0.0, in_config=True, metavar="SHARE"),
    Flag("rdrop", LOSS, "The weight of R-Drop: two passes with different dropout must agree.", number(), 0.0,
         in_config=True, metavar="WEIGHT"),
    Flag("ema_decay", LOSS, "Evaluate and save an exponential moving average of the weights with this decay; 0: the "
         "weights themselves.", number(0, 1, below=True), 0.0, in_config=True),

    Flag("bert_model_name_or_path", TRANSFORMERS, "The pretrained transformer: a folder or a hub name.",
         default="bert-base-uncased"),
    Flag("bert_use_feature_based", TRANSFORMERS, "Freeze the transformer.", action="store_true"),
    Flag("bert_remove_layers", TRANSFORMERS, "Leave out these layers, counted from 0.", number_list,
         metavar="8,9,10,11"),
    Flag("lora_r", TRANSFORMERS, "Freeze the transformer and train low-rank updates of its matrices, which are merged "
         "into them in the checkpoint. Large models need less memory so; take a higher --lr, such as 5e-4.",
         positive_int, metavar="RANK"),
    Flag("gradient_checkpointing", TRANSFORMERS, "Compute activations twice in the place of keeping them: less memory, "
         "slower.", action="store_true", shared=False),

    Flag("enable_qat", QUANTIZATION, "Round weights and activations in training.", action="store_true"),
    Flag("enable_qat_fx", QUANTIZATION, "The same, for evaluation as a compiled graph.", action="store_true"),
    Flag("enable_diffq", QUANTIZATION, "DiffQ: learn the bits of each group of weights. The package diffq has the "
         "licence CC BY-NC 4.0: no commercial use.", action="store_true"),
    Flag("diffq_penalty", QUANTIZATION, "DiffQ's penalty for each MB of the model's size.", number(), 1e-3),

    Flag("device", MACHINE, "Compute on cpu, cuda, cuda:1 or mps.", says_default="cuda where there is one, else cpu"),
    Flag("mixed_precision", MACHINE, "The precision of training steps; auto: bf16 where the processor or GPU is fast "
         "at it.", default="auto", choices=("auto", "no", "bf16", "fp16")),
    Flag("compile", MACHINE, "Compile the model first, which takes minutes and a C++ compiler: it pays in long runs.",
         action="store_true", shared=True),
    Flag("fp16", MACHINE, "The same as --mixed_precision=fp16.", action="store_true"),

    Flag("zero_stage", PROCESSES, "DeepSpeed shares out among processes the optimizer's state (1), gradients too (2), "
         "weights too (3); 0: no DeepSpeed.", int, choices=(0, 1, 2, 3),
         says_default="as accelerate launch says, else 0"),
    Flag("offload_optimizer", PROCESSES, "DeepSpeed keeps the optimizer's state in the machine's memory.",
         choices=("cpu", "none"), says_default="none"),
    Flag("local_rank", PROCESSES, "Launchers set it; the environment decides.", int),
)
# preprocess.py's own.
OOV_SCALE = Flag("oov_scale", FILES, "Words that the vector file lacks get random vectors of this size, where 1.0 is "
                 "the size of the file's own; smaller ones matter less until training has changed them.", number(),
                 1.0, in_config=True)
FLAGS = {flag.name: flag for flag in (*TABLE, OOV_SCALE)}
CONFIG_FLAGS = {name: flag for name, flag in FLAGS.items() if flag.in_config}  # the recipe that goes with a model
# The precision is what --mixed_precision comes to on the machine.
DECISIVE = (*(flag.name for flag in TABLE if flag.decisive), "precision")
SEARCHABLE = {flag.name: flag for flag in TABLE if flag.group.recipe}


def add_flags(parser: Parser, table: Iterable[Flag]) -> None:
    """Add flags, each to its group of --help."""
    groups: dict[Group, argparse._ArgumentGroup] = {}
    for flag in table:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group.title)
        flag.add_to(groups[flag.group])


def check_training_flags(args: argparse.Namespace, kind: str) -> None:
    """Resolve what depends on other flags and on the kind of encoded data; refuse flags that do not go together.

    Raises:
        FlagError: names them.
    """
    if args.fp16:
        args.mixed_precision = "fp16"
    if args.epoch is None:
        args.epoch = DEFAULT_EPOCHS[kind]
    transformer = kind == SUBWORDS
    for flag, none in (("lora_r", None), ("layer_lr_decay", 1)):
        if getattr(args, flag) != none and (not transformer or args.bert_use_feature_based):
            raise FlagError(f"--{flag} is of a transformer that is trained; it goes neither with word vectors nor with "
                            "--bert_use_feature_based")
    if args.token_cutoff and not transformer:
        raise FlagError("--token_cutoff is of a transformer's tokens; word vectors have --word_dropout")
    if args.word_dropout and transformer:
        raise FlagError("--word_dropout is of word vectors; a transformer has --token_cutoff")
    if chosen := one_of(args, *INT8_MODES):
        for other in ("compile", "lora_r"):
            if getattr(args, other):
                raise FlagError(f"--{chosen} and --{other} do not go together; leave one of them out")
        if args.enable_diffq and args.gradient_checkpointing:
            raise FlagError("--enable_diffq draws noise for each pass, and --gradient_checkpointing computes some of "
                            "it twice; leave one of them out")


def check_loss_flags(args: argparse.Namespace, path: Any, has_logits: bool, taught: bool = False) -> None:
    """Refuse what does not go with the targets of the training data.

    Args:
        path: the encoded training data, for messages.
        has_logits: the targets are a teacher's logits.
        taught: a teacher answers during training.

    Raises:
        FlagError: names the flag.
    """
    on_logits = args.criterion in ("MSELoss", "KLDivLoss")
    if on_logits and not has_logits:
        raise FlagError(f"{path}: --criterion={args.criterion} learns from a teacher's logits, and these are class "
                        "labels; use CrossEntropyLoss.")
    if args.kd_temperature != 1 and (args.criterion == "MSELoss" or not (has_logits or taught)):
        raise FlagError(f"--kd_temperature={args.kd_temperature:g} has no meaning for "
                        + ("--criterion=MSELoss, which compares the logits themselves." if has_logits or taught else
                           f"{path}, which holds class labels and no teacher's logits."))
    if on_logits and args.class_weights != "none":
        raise FlagError(f"--class_weights={args.class_weights} has no meaning for --criterion={args.criterion}.")
