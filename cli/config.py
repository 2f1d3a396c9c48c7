"""Configs: what keys they have, how one is read and checked, and which value wins.

A flag given by the user beats the config; the config beats the default.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cli.flags import Parser, did_you_mean
from cli.training_flags import CONFIG_FLAGS
from sentence_classifier.errors import InputError
from sentence_classifier.lines import open_input
from sentence_classifier.tokenizers import SUBWORDS, WORD_TOKENIZERS, WORDS
from util import ROOT


@dataclass(frozen=True)
class Key:
    """What a config key may hold."""

    check: Callable[[Any], bool]
    says: str  # completes "KEY must be ..."
    required: bool = True


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_size, value))


def _is_kernels(value: Any) -> bool:
    return (isinstance(value, list) and bool(value) and all(map(_is_sizes, value))
            and len(set(map(len, value))) == 1 and all(size % 2 for row in value for size in row))


_SIZE = Key(_is_size, "a whole number above 0")
_BOOL = Key(lambda v: isinstance(v, bool), "true or false")
_TEXT = Key(lambda v: isinstance(v, str) and bool(v) and v.isprintable() and " " not in v, "a word without blanks")
_CNN = {"num_filters": _SIZE, "kernel_sizes": Key(_is_sizes, "a list of whole numbers above 0")}
_DENSENET = {
    "densenet_kernels": Key(_is_kernels, "a list of rows of odd kernel sizes, all rows of one length"),
    **dict.fromkeys(("densenet_first_num_filters", "densenet_num_filters", "densenet_last_num_filters"), _SIZE),
}

# Keys by what asks for them: every config, an embedding class, an encoder class.
COMMON_KEYS = {"n_ctx": _SIZE,
               "dropout": Key(lambda v: type(v) in (int, float) and 0 <= v <= 0.99, "a number from 0 to 0.99"),
               "multi_label": replace(_BOOL, required=False)}
TRANSFORMERS = ("bert", "distilbert", "roberta", "bart", "gpt")
EMBEDDING_KEYS: dict[str, dict[str, Key]] = {
    **{name: {} for name in TRANSFORMERS},  # which architecture it is, the model's own config says
    "bart": {"use_kobart": replace(_BOOL, required=False)},
    "glove": {
        "lowercase": _BOOL,
        "token_emb_dim": _SIZE,
        "pad_token": _TEXT,
        "pad_token_id": Key(lambda v: type(v) is int and v == 0, "0"),
        "unk_token": _TEXT,
        "unk_token_id": Key(lambda v: type(v) is int and v == 1, "1"),
        "tokenizer": Key(lambda v: v in tuple(WORD_TOKENIZERS), " or ".join(WORD_TOKENIZERS), required=False),
    },
}
ENCODER_KEYS: dict[str, dict[str, Key]] = {
    "gnb": {},
    "cls": {},
    "cnn": {**_CNN, "fc_hidden_size": _SIZE},
    "densenet-cnn": {**_DENSENET, **_CNN, "fc_hidden_size": replace(_SIZE, required=False)},
    "densenet-dsa": {**_DENSENET, **dict.fromkeys(("dsa_num_attentions", "dsa_dim", "dsa_r", "fc_hidden_size"), _SIZE)},
}

def encoded_kind(config: dict[str, Any]) -> str:
    """The kind of encoded data: WORDS, or a transformer's SUBWORDS."""
    return SUBWORDS if config["emb_class"] in TRANSFORMERS else WORDS


def load_config(path: str) -> dict[str, Any]:
    """Read and check a config. One that is not found from the working directory is looked for in the repository.

    Raises:
        InputError: names the file and every problem in it.
    """
    own = ROOT / path
    config = read_json(str(own) if not os.path.exists(path) and own.exists() else path)
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
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def check_config(config: dict[str, Any], path: str) -> None:
    """Raise InputError with all that is wrong with a config: missing and unknown keys, values out of range."""
    problems = []
    allowed = dict(COMMON_KEYS)
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
        for key, value in config.items():
            if key in CONFIG_FLAGS:
                try:
                    CONFIG_FLAGS[key].convert(value)
                except ValueError as error:
                    problems.append(f"{key} is {json.dumps(value)}: {error}")
            elif key not in allowed and key not in ("emb_class", "enc_class"):
                problems.append(f"unknown key {key!r}{did_you_mean(key, [*allowed, *CONFIG_FLAGS])}")
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
    by_data = ("n_ctx", "multi_label")  # what preprocess.py's flags may change
    keys = [key for key in sorted({*config, *trained}) if key not in CONFIG_FLAGS and key not in by_data]
    differing = [f"{key} ({json.dumps(config.get(key))}, trained with {json.dumps(trained.get(key))})"
                 for key in keys if config.get(key) != trained.get(key)]
    if differing:
        raise InputError(f"{path}: not the config of {model_path}: {'; '.join(differing)}. "
                         "Give the one that it was trained with, or none.")


def parse_with_config(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, with the config's recipe in the place of their defaults, and the config.

    `sources` of the flags says of each whether the user gave it ("flag"), the config ("config") or nobody ("default").
    """
    config = load_config(parser.parse_args(argv).config)
    recipe = {key: value for key, value in config.items() if key in CONFIG_FLAGS and key in parser.actions}
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    given = parser.given(argv)
    args.sources = {flag: "flag" if flag in given else "config" if flag in recipe else "default" for flag in vars(args)}
    return args, config
