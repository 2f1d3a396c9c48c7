"""Every model and two baselines, trained and tested on several data sets as a user does it.

Each finished run is written to accuracy.json at once, and is not run again while its data and its recipe stay the same;
where the code has changed, --force runs it again. With --checkpoints a run's files stay, so that one cut off goes on,
and a student (those of TAUGHT) finds its teachers' models and the text that they have labelled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.baselines import BASELINES, tune
from benchmarks.recipes import CONFIGS, DATA_SETS, ENCODING_FLAGS, RECIPES, TAUGHT, TEACHER
from cli.config import encoded_kind, load_config
from dataset import EncodedData
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import WORDS
from util import previous_name, sha256, write_json

logger = logging.getLogger(__name__)

same_run = itemgetter("data_set", "model", "seed", "recipe")  # what two rows of one run have in common


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Train and test every model and baseline on every data set, working in `folder`; write accuracy.json."""
    for place in args.data_sets:
        source = Path(place) if os.sep in place else Path("data", place)
        measure_data_set(args, source, folder / source.name)


def measure_data_set(args: argparse.Namespace, source: Path, data: Path) -> None:
    """Train and test every model and baseline on one data set, encoded in the folder `data`."""
    harness.copy_splits(source, data)
    name, texts = source.name, [sha256(data / split) for split in harness.SPLITS]

    def key(model: str, seed: int, *recipe: Any) -> dict[str, Any]:
        return {"data_set": name, "model": model, "seed": seed, "recipe": digest(json.dumps(recipe))}

    for model in args.models:
        config = load_config(CONFIGS[model])
        if model in TAUGHT and (name, model) not in RECIPES:
            raise InputError(f"{model}: there is no recipe for it on {name}; the data set's folder has to be called "
                             f"{' or '.join(known for known, one in RECIPES if one == model)}.")
        recipe, seeds = RECIPES.get((name, model), ("", [1]))
        flags = [*recipe.split(), *args.sizes.train_flags.split()]
        encoding = encoding_flags(args, name, model)
        harness.encode(source, data, CONFIGS[model], *encoding)
        if encoded_kind(config) == WORDS:
            encoded = EncodedData(data / f"{harness.SPLITS[0]}.ids").encoding
            words = (data / "vocab.txt").read_bytes().count(b"\n") - encoded.own_rows  # that the vector file has
            facts = {"texts": texts, "vocabulary": encoded.vocab_sha256, "table": encoded.table, "vectors": words}
            embedding = {"file": Path(args.embedding_path).name, "words": words}
        else:
            bert = Path(args.bert_model_name_or_path)
            weights = bert / "model.safetensors"
            facts = {"texts": texts, "model": sha256(weights) if weights.exists() else str(bert)}
            embedding = {"file": bert.name, "words": None}
            flags = [*encoding, *flags]
        used = flags
        if model in TAUGHT:
            used, taught = find_teachers(args, source, data, model, flags)
            facts |= taught
        for seed in args.seeds or seeds:
            found_by = key(model, seed, config, flags, facts)
            finish(args, {**found_by, "flags": flags, "config": config, "embedding": embedding},
                   partial(train_and_test, args, data, used, found_by))
    for baseline, (fit, settings) in BASELINES.items():
        settings = settings[: args.sizes.settings]
        finish(args, key(baseline, 0, settings, texts), partial(tune, fit, settings, data))


def finish(args: argparse.Namespace, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Run one row and write it, unless it stands there already."""
    path = args.results / "accuracy.json"
    name = f"{about['model']} on {about['data_set']}, seed {about['seed']}"
    if not args.force and same_run(about) in map(same_run, read_rows(path)):
        logger.info("[%s: finished before]", name)
        return
    logger.info("[%s: begins]", name)
    row = {**about, **harness.provenance(args.command), **run()}
    write_json({"rows": [*(old for old in read_rows(path) if same_run(old) != same_run(row)), row]}, path)
    logger.info("[%s: %.4f on test, %.4f on valid]", name, row["accuracy"], row["valid_accuracy"])


def digest(text: str) -> str:
    """A short checksum."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows, the newest last."""
    if not path.exists():
        return []
    with harness.read_results(path) as result:
        return result["rows"]


def newest_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows of the newest recipe of each model on each data set, in the table's order."""
    order = [*CONFIGS, *BASELINES, *DATA_SETS]
    place = {name: number for number, name in enumerate(order)}
    with harness.read_results(path) as result:
        newest = {(row["model"], row["data_set"]): row["recipe"] for row in result["rows"]}
        rows = [row for row in result["rows"] if row["recipe"] == newest[row["model"], row["data_set"]]]
        return sorted(rows, key=lambda row: (*(place.get(row[key], len(order)) for key in ("model", "data_set")),
                                             row["seed"]))


# ---------------------------------------------------------------------------------------------------------- the runs


def train_and_test(args: argparse.Namespace, data: Path, flags: list[str], key: dict[str, Any]) -> dict[str, Any]:
    """Run train.py, and evaluate.py on raw text, one sentence at a time; `key` says model, seed and recipe."""
    folder = (args.checkpoints or data) / f"{data.name}-{key['model']}-{key['seed']}"
    keep_run(folder, key["recipe"], args.force)
    begun = any(folder.glob("model.pt*"))
    model = folder / "model.pt"
    common = (f"--config={CONFIGS[key['model']]}", f"--data_dir={data}")
    more = [f"--seed={key['seed']}", *harness.output_flags(folder)]
    if "--do_prune" in flags:
        more += [f"--save_path_pruned={model}", f"--bert_output_dir_pruned={model.with_name('bert')}"]
    if not any(flag.startswith("--mpl_data_path") for flag in flags):
        more.append("--resume")
    start = time.perf_counter()
    script = "fastformers.py" if {"--do_distill", "--do_prune"} & set(flags) else "train.py"
    harness.run_stage(script, *common, *flags, *more)
    seconds = time.perf_counter() - start
    trained = json.loads(Path(f"{model}.train.json").read_text())
    harness.run_stage("evaluate.py", *common, f"--model_path={model}", "--enable_inference")
    test = json.loads(Path(f"{model}.test.json").read_text())
    if not args.checkpoints:
        shutil.rmtree(folder)
    return {**{key: test[key] for key in ("accuracy", "correct", "examples", "macro_f1")},
            "valid_accuracy": trained["best"]["valid_accuracy"], "precision": trained["flags"]["precision"],
            "train_seconds": None if begun else seconds, "ms": test["timing"]["mean_ms"]}


def keep_run(folder: Path, recipe: str, force: bool) -> None:
    """Make the folder of a run, in which a run of the same recipe that was cut off goes on.

    One of another recipe moves aside, and with `force` a finished one, too.
    """
    path = folder / "key.json"
    if folder.exists() and (not path.exists() or json.loads(path.read_text())["recipe"] != recipe
                            or (force and harness.is_trained(folder / "model.pt"))):
        aside = previous_name(folder)
        folder.rename(aside)
        logger.info("[%s: of another recipe, or to be run again; it is now %s]", folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"recipe": recipe}, path)


def kept_model(checkpoints: Path | None, data_set: str, model: str, seed: int = 0) -> Path:
    """The model of a seed (0: of the first one) that stands in --checkpoints."""
    seed = seed or RECIPES.get((data_set, model), ("", [1]))[1][0]
    path = (checkpoints or Path()) / f"{data_set}-{model}-{seed}" / "model.pt"
    if not checkpoints or not harness.is_trained(path):
        raise InputError(f"{model} on {data_set}, seed {seed}, is needed and not in --checkpoints; run benchmark.py "
                         f"accuracy --data_sets {data_set} --models {model} --seeds {seed} --checkpoints=FOLDER first, "
                         "and name its folder.")
    return path


def encoding_flags(args: argparse.Namespace, data_set: str, model: str) -> list[str]:
    """preprocess.py's flags for a model on the data set that RECIPES knows by this name."""
    if encoded_kind(load_config(CONFIGS[model])) == WORDS:
        return [f"--embedding_path={args.embedding_path}", *ENCODING_FLAGS.get(data_set, "").split()]
    return [f"--bert_model_name_or_path={args.bert_model_name_or_path}"]


def find_teachers(args: argparse.Namespace, source: Path, data: Path, model: str,
                  flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """A student's flags with the paths of its teachers and of the text that they label, put in `data`; checksums."""
    named = re.findall(r"\{(.+?)\}", " ".join(flags))
    places = {other: kept_model(args.checkpoints, source.name, other) for other in CONFIGS if other in named}
    facts: dict[str, Any] = {"teachers": [sha256(path) for path in places.values()]}
    if "--augmented" in flags or "augmented" in named:
        places["augmented"] = text = augmented_text(args, source, model)
        if "--augmented" in flags:
            facts["augmented"] = sha256(text)
            for file in (text, *text.parent.glob("logits-*.json")):
                shutil.copyfile(file, data / file.name)
            harness.run_stage("preprocess.py", f"--config={CONFIGS[model]}", f"--data_dir={data}", "--augmented",
                              f"--augmented_filename={text.name}", *encoding_flags(args, source.name, model))
    return [flag.format_map(places) for flag in flags], facts


def augmented_text(args: argparse.Namespace, source: Path, model: str) -> Path:
    """The training text augmented for a student, with its teachers' mean logits; made once for each set of teachers."""
    teaching, name = TAUGHT[model], source.name
    teachers = [kept_model(args.checkpoints, name, teacher, seed) for teacher, seed in teaching["teachers"]]
    decisive = [sha256(source / harness.SPLITS[0]), *map(sha256, teachers), teaching["augment_flags"]]
    folder = args.checkpoints / f"{name}-augmented-{digest(str(decisive))}"
    path = folder / "augmented.txt"
    if path.exists():
        return path
    where, encoding = f"--data_dir={folder}", encoding_flags(args, name, TEACHER)
    harness.encode(source, folder, CONFIGS[TEACHER], *encoding)
    harness.run_stage("augment_data.py", f"--input={folder / harness.SPLITS[0]}", "--lower", "--parallel",
                      f"--output={folder / 'augmented.raw'}", *teaching["augment_flags"].split())
    harness.run_stage("preprocess.py", f"--config={CONFIGS[TEACHER]}", where, *encoding, "--augmented")
    exported = [str(folder / f"teacher-{number}.onnx") for number, _ in enumerate(teachers, 1)]
    for teacher, onnx in zip(teachers, exported, strict=True):
        harness.run_stage("evaluate.py", where, f"--model_path={teacher}", "--convert_onnx", f"--onnx_path={onnx}")
    more = ["--more_teachers", *exported[1:]] if len(exported) > 1 else []
    harness.run_stage("evaluate.py", where, "--enable_ort", f"--onnx_path={exported[0]}", *more, "--augmented",
                      "--batch_size=128")
    os.replace(folder / "augmented.raw.pred", path)
    return path
