"""The space of a hyper-parameter search: which flags of train.py, and which values of each.

--hp_space FILE.json names flags of train.py, each with the values that it may take: a list to choose from, or a range.
A range of whole numbers includes both ends; "log" draws evenly in the logarithm, and "step" draws low, low + step ...

    {"lr": {"low": 1e-5, "high": 1e-2, "log": true}, "batch_size": [32, 64], "embedding_trainable": [true, false],
     "epoch": {"low": 1, "high": 8}, "weight_decay": {"low": 0, "high": 0.1, "step": 0.01}}
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cli.flags import did_you_mean, number_list
from cli.training_flags import SEARCHABLE, Flag
from sentence_classifier.errors import InputError

if TYPE_CHECKING:
    from optuna import Trial

def default_space(epoch: int) -> dict[str, Any]:
    """The space that is searched without --hp_space."""
    return {"lr": {"low": 1e-6, "high": 1e-3, "log": True}, "batch_size": [32, 64, 128],
            "seed": {"low": 17, "high": 42}, "epoch": {"low": 1, "high": epoch}}


def check_space(space: Any, source: str) -> dict[str, Any]:
    """The space with each value as its flag holds it.

    Raises:
        InputError: names the file, the key and what is wrong there.
    """
    if not space:
        raise InputError(f"{source}: names no flag to search.")
    return {name: _check_values(SEARCHABLE.get(name), rule, f"{source}: {name}", did_you_mean(name, SEARCHABLE))
            for name, rule in space.items()}


def _check_values(flag: Flag | None, rule: Any, where: str, hint: str) -> Any:
    if flag is None:
        raise InputError(f"{where}: no flag of train.py that can be searched{hint}.")
    if isinstance(rule, list):
        if len(rule) < 2 or len({str(value) for value in rule}) < len(rule):
            raise InputError(f"{where}: two or more different values are expected.")
        return [_check_value(flag, value, where) for value in rule]
    listed = flag.action is not None or flag.type in (str, number_list)
    if not isinstance(rule, dict) or listed:
        raise InputError(f"{where}: a list of values is expected" + (
            "." if listed else ', or a range {"low": ..., "high": ...}.'))
    for key in rule:
        if key not in ("low", "high", "log", "step"):
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(key, ('low', 'high', 'log', 'step'))}; a "
                             "range has low, high, and log or step.")
    if missing := next((key for key in ("low", "high") if key not in rule), None):
        raise InputError(f"{where}: {missing} is missing.")
    low, high = (_check_value(flag, rule[key], f"{where}: {key}") for key in ("low", "high"))
    log, step = rule.get("log", False), rule.get("step")
    kinds, number = ((int,), "whole number") if isinstance(low, int) else ((int, float), "number")
    for wrong, says in (
        (low > high, f"low is {low}, above high, which is {high}"),
        (not isinstance(log, bool), f"log is {json.dumps(log)} and must be true or false"),
        (log and low <= 0, f"low is {low}, and log needs it above 0"),
        (log and step is not None, "log and step do not go together; leave one of them out"),
        (step is not None and (type(step) not in kinds or step <= 0),
         f"step is {json.dumps(step)} and must be a {number} above 0"),
    ):
        if wrong:
            raise InputError(f"{where}: {says}.")
    return {"low": low, "high": high, "log": log, "step": step}


def _check_value(flag: Flag, value: Any, where: str) -> Any:
    try:
        held = flag.convert(value)
    except ValueError as error:
        raise InputError(f"{where} is {json.dumps(value)}: {error}.") from None
    return held if isinstance(held, int | float) else value  # a list of layers stays as it is written


def suggest(trial: Trial, space: dict[str, Any]) -> dict[str, Any]:
    """One point of the space."""
    drawn: dict[str, Any] = {}
    for name, rule in space.items():
        if isinstance(rule, list):
            drawn[name] = trial.suggest_categorical(name, rule)
        elif isinstance(rule["low"], int):
            drawn[name] = trial.suggest_int(name, rule["low"], rule["high"], step=rule["step"] or 1, log=rule["log"])
        else:
            drawn[name] = trial.suggest_float(name, rule["low"], rule["high"], step=rule["step"], log=rule["log"])
    return drawn
