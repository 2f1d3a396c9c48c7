"""How each model of the accuracy table is trained: recipes.json, read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_READ = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CONFIGS: dict[str, str] = {model: entry["config"] for model, entry in _READ["models"].items()}
# Flags and seeds by data set and model; without a recipe: no flags, seed 1.
RECIPES: dict[tuple[str, str], tuple[str, list[int]]] = {
    (data_set, model): (recipe["flags"], recipe["seeds"])
    for model, entry in _READ["models"].items() for data_set, recipe in entry["recipes"].items()}
TEACHER: str = _READ["teacher"]
# By student: the models and seeds whose mean logits it learns, and augment_data.py's flags for the text.
TAUGHT: dict[str, dict[str, Any]] = {model: _READ["teachings"][entry["taught_by"]]
                                     for model, entry in _READ["models"].items() if "taught_by" in entry}
ENCODING_FLAGS: dict[str, str] = _READ["encoding_flags"]  # preprocess.py's flags by data set, over the config
INFERENCE_MODELS: list[str] = _READ["inference_models"]  # whose answers benchmark.py times
DATA_SETS: list[str] = _READ["data_sets"]  # in the order of the tables
