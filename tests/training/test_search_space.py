"""The space of a hyper-parameter search: the default one, and spaces that are refused before the study begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Place
from helpers import refusal

import train
from training.search_space import check_space, default_space


def flags(place: Place, space: Any) -> list[str]:
    """A search's command line."""
    (place.root / "space.json").write_text(json.dumps(space), encoding="utf-8")
    return place.train_flags("--hp_search_optuna", "--hp_trials=2", f"--hp_space={place.root / 'space.json'}")


def test_default_space() -> None:
    space = check_space(default_space(3), "default")
    assert space == {"lr": {"low": 1e-6, "high": 1e-3, "log": True, "step": None}, "batch_size": [32, 64, 128],
                     "seed": {"low": 17, "high": 42, "log": False, "step": None},
                     "epoch": {"low": 1, "high": 3, "log": False, "step": None}}


@pytest.mark.parametrize(("space", "says"), [
    ({}, ": names no flag"), ({"lrr": [1, 2]}, ": lrr: no flag of train.py that can be searched (did you mean 'lr'?)"),
    ({"save_path": ["a", "b"]}, ": save_path: no flag"), ({"device": ["cpu", "cuda"]}, ": device: no flag"),
    ({"hp_trials": [1, 2]}, ": hp_trials: no flag"), ({"lr": 0.1}, ": lr: a list of values is expected, or a range"),
    ({"lr": [0.1]}, ": lr: two or more"), ({"lr": [0.1, 0.1]}, ": lr: two or more"),
    ({"lr": {"low": 1}}, ": lr: high is missing"), ({"lr": {"low": 0.1, "hi": 1}}, ": lr: unknown key 'hi'"),
    ({"lr": {"low": 2, "high": 1}}, ": lr: low is 2.0, above high, which is 1.0"),
    ({"lr": {"low": 0, "high": 1, "log": True}}, ": lr: low is 0.0, and log needs it above 0"),
    ({"lr": {"low": 0, "high": 1, "log": 1}}, ": lr: log is 1 and must be true or false"),
    ({"lr": {"low": 1, "high": 2, "log": True, "step": 1}}, ": lr: log and step do not go together"),
    ({"seed": {"low": 1, "high": 2, "step": 0.5}}, ": seed: step is 0.5 and must be a whole number"),
    ({"lr": {"low": 1, "high": 2, "step": "1"}}, ': lr: step is "1" and must be a number above 0'),
    ({"batch_size": [8, 0]}, ": batch_size is 0: 0 is below 1."),
    ({"batch_size": [8, 1.5]}, ": batch_size is 1.5: '1.5' is not a"),
    ({"batch_size": {"low": 0.5, "high": 2}}, ": batch_size: low is 0.5: '0.5' is not a whole number"),
    ({"batch_size": [8, [16]]}, ": batch_size is [16]: must be a number"),
    ({"lr": ["a", "b"]}, ': lr is "a": must be a number'),
    ({"embedding_trainable": [1, 0]}, ": embedding_trainable is 1: must be true or false"),
    ({"embedding_trainable": {"low": 0, "high": 1}}, ": embedding_trainable: a list of values is expected."),
    ({"criterion": ["MSELoss", "Hinge"]}, ': criterion is "Hinge": must be one of CrossEntropyLoss'),
    ({"lr": [True, False]}, ": lr is true: must be a number"),
    ({"bert_remove_layers": {"low": 1, "high": 2}}, ": bert_remove_layers: a list of values is expected."),
    ([1], ": one JSON object is expected"),
])
def test_bad_spaces(encoded: Place, space: Any, says: str) -> None:
    assert refusal(train.main, *flags(encoded, space)).startswith(f"{encoded.root / 'space.json'}{says}")
    assert not Path(f"{encoded.model}.trials").exists()


@pytest.mark.parametrize(("space", "says"), [
    ({"rdrop": [0, 1], "word_dropout": [0, 0.5], "token_cutoff": [0, 0.2]}, ": token_cutoff: --token_cutoff is of a"),
    ({"token_cutoff": {"low": 0, "high": 0.2}}, ": token_cutoff: --token_cutoff is of a transformer's tokens"),
    ({"kd_temperature": [2, 3]}, ": kd_temperature: --kd_temperature=2 has no meaning for"),
    ({"criterion": ["CrossEntropyLoss", "MSELoss"]}, ": criterion: data/train.txt.ids: --criterion=MSELoss learns"),
])
def test_values_that_no_trial_could_take(encoded: Place, space: Any, says: str) -> None:
    said = refusal(train.main, *flags(encoded, space))
    assert said.replace(str(encoded.data), "data").startswith(f"{encoded.root / 'space.json'}{says}")
    assert not Path(f"{encoded.model}.trials").exists()


def test_unreadable_spaces(encoded: Place) -> None:
    argv = flags(encoded, {})
    for content, says in ((b"{", ":1: not valid JSON"), (b"\xff", ": broken UTF-8"), (None, ": no such file")):
        path = encoded.root / "space.json"
        path.unlink() if content is None else path.write_bytes(content)
        assert refusal(train.main, *argv).startswith(f"{path}{says}")
