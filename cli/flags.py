"""Command lines and configs: flags that several stages share, the check of a config, and which value wins.

A flag given by the user beats the config; the config beats the default.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sentence_classifier.errors import FlagError, InputError
from sentence_classifier.tokenizers import SUBWORDS, WORD_TOKENIZERS, WORDS
from util import open_input

DATA_DIR, EMBEDDING_PATH = "data/snips", "embeddings/glove.6B.300d.txt"  # where no flag says otherwise

# --------------------------------------------------------------------------------------------------------- configs


@dataclass(frozen=True)
class Key:
    """What a config key may hold."""

    check: Callable[[Any], bool]
    says: str  # completes "KEY must be ..."
    required: bool = True


def _is_int(value: Any, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_int(size) for size in value)


def _is_kernels(value: Any) -> bool:
    return (isinstance(value, list) and bool(value) and all(_is_sizes(row) for row in value)
            and len({len(row) for row in value}) == 1 and all(size % 2 for row in value for size in row))


def _number(low: float, high: float, required: bool = True) -> Key:
    return Key(lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high,
               f"a number from {low:g} to {high:g}", required)


_POSITIVE = Key(_is_int, "a whole number above 0")
_OPTIONAL_POSITIVE = Key(_is_int, "a whole number above 0", required=False)
_BOOL = Key(lambda v: isinstance(v, bool), "true or false")
_TEXT = Key(lambda v: isinstance(v, str) and bool(v) and v.isprintable() and " " not in v, "a word without blanks")
_SIZES = Key(_is_sizes, "a list of whole numbers above 0")

_CNN = {"num_filters": _POSITIVE, "kernel_sizes": _SIZES}
_DENSENET = {
    "densenet_kernels": Key(_is_kernels, "a list of rows of odd kernel sizes, all rows of one length"),
    "densenet_first_num_filters": _POSITIVE,
    "densenet_num_filters": _POSITIVE,
    "densenet_last_num_filters": _POSITIVE,
}

# Keys by what asks for them: every config, an embedding class, an encoder class.
COMMON_KEYS = {"n_ctx": _POSITIVE, "dropout": _number(0, 0.99)}
TRANSFORMERS = ("bert", "distilbert", "roberta", "bart", "gpt")
EMBEDDING_KEYS: dict[str, dict[str, Key]] = {
    **{name: {} for name in TRANSFORMERS},  # which architecture it is, the model's own config says
    "bart": {"use_kobart": Key(_BOOL.check, _BOOL.says, required=False)},
    "glove": {
        "lowercase": _BOOL,
        "token_emb_dim": _POSITIVE,
        "pad_token": _TEXT,
        "pad_token_id": Key(lambda v: v == 0 and _is_int(v, 0), "0"),
        "unk_token": _TEXT,
        "unk_token_id": Key(lambda v: v == 1 and _is_int(v, 0), "1"),
        "tokenizer": Key(lambda v: v in tuple(WORD_TOKENIZERS), " or ".join(WORD_TOKENIZERS), required=False),
    },
}
ENCODER_KEYS: dict[str, dict[str, Key]] = {
    "gnb": {},
    "cls": {},
    "cnn": {**_CNN, "fc_hidden_size": _POSITIVE},
    "densenet-cnn": {**_DENSENET, **_CNN, "fc_hidden_size": _OPTIONAL_POSITIVE},
    "densenet-dsa": {**_DENSENET, "dsa_num_attentions": _POSITIVE, "dsa_dim": _POSITIVE, "dsa_r": _POSITIVE,
                     "fc_hidden_size": _POSITIVE},
}

CRITERIA = ("CrossEntropyLoss", "LabelSmoothingCrossEntropy", "MSELoss", "KLDivLoss")

# Settings of train.py and preprocess.py that a config may carry: the recipe that goes with the model.
_RATE = _number(0, 1, required=False)
TRAINING_KEYS: dict[str, Key] = {
    "oov_scale": _number(0, 1e3, required=False),
    "lr": _RATE,
    "embedding_lr": _RATE,
    "layer_lr_decay": _RATE,
    "batch_size": _OPTIONAL_POSITIVE,
    "epoch": _OPTIONAL_POSITIVE,
    "patience": _OPTIONAL_POSITIVE,
    "warmup_ratio": _number(0, 1, required=False),
    "weight_decay": _number(0, 1e3, required=False),
    "word_dropout": _number(0, 1e6, required=False),
    "embedding_dropout": _number(0, 0.99, required=False),
    "token_cutoff": _number(0, 0.99, required=False),
    "rdrop": _number(0, 1e6, required=False),
    "ema_decay": _number(0, 0.99999, required=False),
    "criterion": Key(lambda v: v in CRITERIA, " or ".join(CRITERIA), required=False),
    "kd_temperature": _number(1e-3, 1e3, required=False),
    "measure": Key(lambda v: v in ("loss", "accuracy", "last"), "loss, accuracy or last", required=False),
    "embedding_trainable": Key(lambda v: isinstance(v, bool), "true or false", required=False),
}


def encoded_kind(config: dict[str, Any]) -> str:
    """The kind of encoded data: WORDS, or a transformer's SUBWORDS."""
    return SUBWORDS if config["emb_class"] in TRANSFORMERS else WORDS


def load_config(path: str) -> dict[str, Any]:
    """Read and check a config.

    Raises:
        InputError: names the file and every problem in it.
    """
    config = read_json(path)
    check_config(config, path)
    if config["emb_class"] == "glove":
        config.setdefault("tokenizer", "whitespace")
    return config


def read_json(path: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: names the file, and the line where the JSON breaks off.
    """
    with open_input(path) as file:
        try:
            found = json.loads(file.read().decode("utf-8"), object_pairs_hook=_no_repeats)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: broken UTF-8 at byte {error.start + 1}.") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not usable ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: one JSON object is expected.")
    return found


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {repeated!r} stands twice")
    return result


def check_config(config: dict[str, Any], path: str) -> None:
    """Raise InputError with all that is wrong with a config: missing and unknown keys, values out of range."""
    problems = []
    allowed = {**COMMON_KEYS}
    for key, registry in (("emb_class", EMBEDDING_KEYS), ("enc_class", ENCODER_KEYS)):
        value = config.get(key)
        if key not in config:
            problems.append(f"{key} is missing")
        elif not isinstance(value, str) or value not in registry:
            problems.append(f"{key} is {json.dumps(value)} and must be one of {', '.join(registry)}")
        else:
            allowed.update(registry[value])
    if not problems and config["enc_class"] == "cls" and encoded_kind(config) != SUBWORDS:
        problems.append("enc_class cls reads a transformer's classification token, and words have none; take gnb, cnn, "
                        "densenet-cnn or densenet-dsa")
    if not problems:
        allowed.update(TRAINING_KEYS)
        for key in config:
            if key not in allowed and key not in ("emb_class", "enc_class"):
                problems.append(f"unknown key {key!r}{did_you_mean(key, allowed)}")
        for key, rule in allowed.items():
            if key not in config:
                if rule.required:
                    problems.append(f"{key} is missing")
            elif not rule.check(config[key]):
                problems.append(f"{key} is {json.dumps(config[key])} and must be {rule.says}")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}.")


def check_same_config(config: dict[str, Any], path: str, trained: dict[str, Any], model_path: str) -> None:
    """Refuse a config of another model than the one a checkpoint was trained with; training settings may differ."""
    keys = [key for key in sorted({*config, *trained}) if key not in TRAINING_KEYS and key != "n_ctx"]
    differing = [f"{key} ({json.dumps(config.get(key))}, trained with {json.dumps(trained.get(key))})"
                 for key in keys if config.get(key) != trained.get(key)]
    if differing:
        raise InputError(f"{path}: not the config of {model_path}: {'; '.join(differing)}. "
                         "Give the one that it was trained with, or none.")


def did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """A hint at the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


# ----------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, that answers a misspelt flag with the nearest one."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag!r}{did_you_mean(flag, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)

    def parse_with_config(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The flags, with the config's training settings in the place of their defaults, and the config."""
        config = load_config(self.parse_args(argv).config)
        flags = {action.dest for action in self._actions}
        self.set_defaults(**{key: value for key, value in config.items() if key in TRAINING_KEYS and key in flags})
        return self.parse_args(argv), config


def command_line(parser: Parser, args: argparse.Namespace, leave_out: Collection[str] = ()) -> list[str]:
    """The flags by which `parser` comes to `args`, where these differ from its defaults.

    Args:
        leave_out: names of flags, as `args` has them, that do not matter.
    """
    return [word for action in parser._actions if action.dest not in leave_out and hasattr(args, action.dest)
            for value in [getattr(args, action.dest)] if value != parser.get_default(action.dest)
            for word in format_flag(action, value)]


def format_flag(action: argparse.Action, value: Any) -> list[str]:
    """A flag with a value of it, as one would type them; a switch that is off is no word, or its --no- form."""
    flags = action.option_strings
    if isinstance(value, bool):
        return [flags[0]] if value else list(flags[1:])
    return [f"{flags[0]}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def positive_int(text: str) -> int:
    """A flag's value that must be a whole number above 0."""
    return _ranged_int(text, 1)


def natural_int(text: str) -> int:
    """A flag's value that must be a whole number, 0 or above."""
    return _ranged_int(text, 0)


def thread_count(text: str) -> int:
    """A flag's value that must be a number of threads; 0: the library's choice."""
    return _ranged_int(text, 0, 1024)  # torch dies by a signal when told to make thousands


def _ranged_int(text: str, low: int, high: int = (1 << 63) - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is below {low}")
    if value > high:
        raise argparse.ArgumentTypeError(f"{value} is above {high}")
    return value


def number_list(text: str) -> list[int]:
    """A flag's value that must be whole numbers separated by commas."""
    return [natural_int(part) for part in text.split(",")]


def number(low: float = 0.0, high: float = float("inf"), below: bool = False) -> Callable[[str], float]:
    """A checker for a flag's value that must be a number from `low` to `high` (`below`: less than `high`)."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if not low <= value <= high or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {'below ' if below else ''}{high:g}")
        return value

    return convert


def one_of(args: argparse.Namespace, *flags: str) -> str | None:
    """Which of the flags is set; None: none of them.

    Raises:
        FlagError: two of them are.
    """
    chosen = [flag for flag in flags if getattr(args, flag)]
    if len(chosen) > 1:
        Parser(None).error(f"{' and '.join(f'--{flag}' for flag in chosen)}: choose one of them")
    return chosen[0] if chosen else None


def add_config_flag(group: argparse._ArgumentGroup, default: str | None) -> None:
    """--config."""
    said = default or "what the checkpoint was trained with"
    group.add_argument("--config", default=default, help=f"the model's JSON config (default: {said})")


def add_data_dir_flag(group: argparse._ArgumentGroup, default: str | None = DATA_DIR) -> None:
    """--data_dir."""
    said = default or "where the checkpoint was trained"
    group.add_argument("--data_dir", default=default,
                       help=f"folder of train.txt, valid.txt, test.txt and of what preprocess.py makes of them "
                            f"(default: {said})")


def add_bert_flag(group: argparse._ArgumentGroup, default: str = "bert-base-uncased") -> None:
    """--bert_model_name_or_path."""
    group.add_argument("--bert_model_name_or_path", default=default,
                       help="the pretrained transformer: a folder or a hub name (default: %(default)s)")


def add_device_flag(group: argparse._ArgumentGroup) -> None:
    """--device."""
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
