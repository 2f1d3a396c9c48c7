"""Every model and two baselines, trained and tested on several data sets.

Each finished run is written to accuracy.json at once, and is not run again while its data and its recipe stay the same;
where the code has changed, --force runs it again. A student (those of TAUGHT) needs --checkpoints, where its teachers'
models stay from one run to the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.baselines import BASELINES, tune
from benchmarks.harness import SPLITS, copy_splits, encode, provenance, read_results
from benchmarks.recipes import CONFIGS, DATA_SETS, RECIPES, TAUGHT
from cli.config import encoded_kind, load_config
from dataset import EncodedData
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import WORDS
from util import sha256, write_json

logger = logging.getLogger(__name__)

HELD_OUT = ", held out"  # follows a data set's name where folds of its training file were tested on


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Train and test every model and baseline on every data set, working in `folder`; write accuracy.json."""
    if args.folds == 1:
        raise InputError("--folds 1 would hold all out and leave nothing to train on; give 2 or more, or 0.")
    if args.folds and (students := [model for model in args.models if model in TAUGHT]):
        raise InputError(f"--folds: {', '.join(students)} would need teachers that have not seen the fold; without "
                         "--folds, students are tested on test.txt.")
    for place in args.data_sets:
        source = Path(place) if os.sep in place else Path("data", place)
        if not args.folds:
            measure_data_set(args, source, source.name, folder / source.name)
        for fold in range(1, args.folds + 1):
            held_out = hold_out(source, folder / f"{source.name}-{fold}", fold - 1, args.folds)
            measure_data_set(args, held_out, source.name, folder / f"{source.name}-{fold}-encoded", fold)


def hold_out(source: Path, folder: Path, fold: int, folds: int) -> Path:
    """A data set whose test file is a share of `source`'s training file, which its own training file lacks."""
    copy_splits(source, folder)
    lines = (source / SPLITS[0]).read_bytes().decode("utf-8-sig").split("\n")  # str.splitlines() knows other ends, too
    lines = [line.rstrip("\r") + "\n" for line in lines if line.strip()]
    random.Random(0).shuffle(lines)
    for name, chosen in ((SPLITS[0], False), (SPLITS[2], True)):
        kept = [line for number, line in enumerate(lines) if (number % folds == fold) == chosen]
        (folder / name).write_text("".join(kept), encoding="utf-8")
    return folder


def measure_data_set(args: argparse.Namespace, source: Path, name: str, data: Path, fold: int = 0) -> None:
    """Train and test every model and baseline on one data set.

    Args:
        name: under which RECIPES knows it.
        data: the folder to encode it in.
        fold: of the training file, counted from 1, where a fold is held out; also the seed then.
    """
    copy_splits(source, data)
    texts = [sha256(data / split) for split in SPLITS]

    def key(model: str, seed: int, recipe: list[Any], facts: Any) -> dict[str, Any]:
        return {"data_set": name + HELD_OUT if fold else name, "model": model, "seed": seed,
                "recipe": runs.digest(json.dumps([*recipe, *([] if fold else [facts])]))}

    for model in args.models:
        config = load_config(CONFIGS[model])
        if model in TAUGHT and (name, model) not in RECIPES:
            raise InputError(f"{model}: there is no recipe for it on {name}; the data set's folder has to be called "
                             f"{' or '.join(known for known, one in RECIPES if one == model)}.")
        recipe, seeds = RECIPES.get((name, model), ("", [1]))
        flags = [*recipe.split(), *args.sizes.train_flags.split()]
        encoding = runs.encoding_flags(args, name, model)
        encode(source, data, CONFIGS[model], *encoding)
        if encoded_kind(config) == WORDS:
            facts = encoded_facts(data)
            embedding = {"file": Path(args.embedding_path).name, "words": facts["vectors"]}
        else:
            bert = Path(args.bert_model_name_or_path)
            weights = bert / "model.safetensors"
            facts = {"texts": texts, "model": sha256(weights) if weights.exists() else str(bert)}
            embedding = {"file": bert.name, "words": None}
            flags = [*encoding, *flags]
        used = flags
        if model in TAUGHT:
            used, taught = runs.find_teachers(args, source, data, model, flags)
            facts |= taught
        for seed in [fold] if fold else args.seeds or seeds:
            found_by = key(model, seed, [config, flags], facts)
            finish(args, {**found_by, "flags": flags, "config": config, "embedding": embedding},
                   partial(runs.train_and_test, args, data, model, used, found_by))
    for baseline, (fit, settings) in BASELINES.items():
        settings = settings[: args.sizes.settings]
        finish(args, key(baseline, fold, [settings], texts), partial(tune, fit, settings, data))


def finish(args: argparse.Namespace, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Run one row and write it, unless it stands there already."""
    path = args.results / "accuracy.json"
    name = f"{about['model']} on {about['data_set']}, seed {about['seed']}"
    if not args.force and any(same_run(row, about) for row in read_rows(path)):
        logger.info("[%s: finished before]", name)
        return
    logger.info("[%s: begins]", name)
    row = {**about, **provenance(args.command), **run()}
    write_json({"rows": [*(old for old in read_rows(path) if not same_run(old, row)), row]}, path)
    logger.info("[%s: %.4f on test, %.4f on valid]", name, row["accuracy"], row["valid_accuracy"])


def same_run(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same data set, model, seed and recipe."""
    return all(row[key] == other[key] for key in ("data_set", "model", "seed", "recipe"))


def encoded_facts(data: Path) -> dict[str, Any]:
    """What was encoded: checksums of the texts, the vocabulary and the vectors, and how many vectors the file has."""
    splits = [EncodedData(data / f"{name}.ids").encoding for name in SPLITS]
    vocabulary = (data / "vocab.txt").read_bytes().count(b"\n")
    return {"texts": [split.source_sha256 for split in splits], "vocabulary": splits[0].vocab_sha256,
            "table": splits[0].table, "vectors": vocabulary - splits[0].own_rows}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows, the newest last."""
    if not path.exists():
        return []
    with read_results(path) as result:
        return result["rows"]


def newest_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows of the newest recipe of each model on each data set, in the table's order."""
    order = [*CONFIGS, *BASELINES, *DATA_SETS]
    place = {name: number for number, name in enumerate(order)}
    with read_results(path) as result:
        newest = {(row["model"], row["data_set"]): row["recipe"] for row in result["rows"]}
        rows = [row for row in result["rows"] if row["recipe"] == newest[row["model"], row["data_set"]]]
        return sorted(rows, key=lambda row: (*(place.get(row[key], len(order)) for key in ("model", "data_set")),
                                             row["seed"]))
