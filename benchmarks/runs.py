"""Runs of the stages, trained and tested as a user does it, and what a student's run needs of its teachers.

With --checkpoints a run's files stay, so that one cut off goes on and a student finds its teachers' models and the text
that they have labelled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.harness import SPLITS, encode, is_trained, output_flags, run_stage
from benchmarks.recipes import CONFIGS, ENCODING_FLAGS, RECIPES, TAUGHT, TEACHER
from cli.config import encoded_kind, load_config
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import WORDS
from util import previous_name, sha256, write_json

logger = logging.getLogger(__name__)


def digest(text: str) -> str:
    """A short checksum."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------- the runs


def train_and_test(args: argparse.Namespace, data: Path, name: str, flags: list[str],
                   key: dict[str, Any]) -> dict[str, Any]:
    """Run train.py and evaluate.py, on encoded data and once more on raw text, one sentence at a time.

    Args:
        name: of the model.
        key: the row's seed and recipe, which a run in --checkpoints is known by.
    """
    kept = args.checkpoints and keep_run(run_folder(args.checkpoints, data.name, name, key["seed"]), key["recipe"],
                                         args.force)
    begun = kept and any(kept.glob("model.pt*"))
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(dir=data) as folder:
        model = Path(folder, "model.pt")
        common = (f"--config={CONFIGS[name]}", f"--data_dir={data}")
        more = [f"--seed={key['seed']}", *output_flags(model.parent)]
        if "--do_prune" in flags:
            more += [f"--save_path_pruned={model}", f"--bert_output_dir_pruned={model.with_name('bert')}"]
        if not any(flag.startswith("--mpl_data_path") for flag in flags):
            more.append("--resume")
        start = time.perf_counter()
        run_stage("fastformers.py" if {"--do_distill", "--do_prune"} & set(flags) else "train.py", *common, *flags,
                  *more)
        seconds = time.perf_counter() - start
        trained = json.loads(Path(f"{model}.train.json").read_text())
        tested = []
        for raw_text in ([], ["--enable_inference"]):
            run_stage("evaluate.py", *common, f"--model_path={model}", *raw_text)
            tested.append(json.loads(Path(f"{model}.test.json").read_text()))
    test, raw = tested
    if raw["correct"] != test["correct"]:
        logger.warning("[%d right on encoded data, %d on raw text]", test["correct"], raw["correct"])
    return {**{key: test[key] for key in ("accuracy", "correct", "examples", "macro_f1")},
            "raw_accuracy": raw["accuracy"], "valid_accuracy": trained["best"]["valid_accuracy"],
            "precision": trained["flags"]["precision"], "train_seconds": None if begun else seconds,
            "ms": raw["timing"]["mean_ms"]}


def keep_run(folder: Path, recipe: str, force: bool) -> Path:
    """Make the folder of a kept run, in which a run of the same recipe that was cut off goes on.

    One of another recipe moves aside, and with `force` a finished one, too.
    """
    path = folder / "key.json"
    if folder.exists() and (not path.exists() or json.loads(path.read_text())["recipe"] != recipe
                            or (force and is_trained(folder / "model.pt"))):
        aside = previous_name(folder)
        folder.rename(aside)
        logger.info("[%s: of another recipe, or to be run again; it is now %s]", folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"recipe": recipe}, path)
    return folder


def run_folder(checkpoints: Path, data_set: str, model: str, seed: int) -> Path:
    """Where --checkpoints keeps a run's files."""
    return checkpoints / f"{data_set}-{model}-{seed}"


def kept_model(checkpoints: Path | None, data_set: str, model: str, seed: int = 0) -> Path:
    """The model of a seed (0: of the first one) that stands in --checkpoints."""
    seed = seed or RECIPES.get((data_set, model), ("", [1]))[1][0]
    path = run_folder(checkpoints or Path(), data_set, model, seed) / "model.pt"
    if not checkpoints or not is_trained(path):
        raise InputError(f"{model} on {data_set}, seed {seed}, is needed and not in --checkpoints; run benchmark.py "
                         f"accuracy --data_sets {data_set} --models {model} --seeds {seed} --checkpoints=FOLDER first, "
                         "and name its folder.")
    return path


def encoding_flags(args: argparse.Namespace, data_set: str, model: str) -> list[str]:
    """preprocess.py's flags for a model on the data set that RECIPES knows by this name."""
    if encoded_kind(load_config(CONFIGS[model])) == WORDS:
        return [f"--embedding_path={args.embedding_path}", *ENCODING_FLAGS.get(data_set, "").split()]
    return [f"--bert_model_name_or_path={args.bert_model_name_or_path}"]


# ------------------------------------------------------------------------------------------------------- the teachers


def find_teachers(args: argparse.Namespace, source: Path, data: Path, model: str,
                  flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Put what a student needs in place: its teachers' models, and in `data` the text that they have labelled.

    Returns:
        The flags with the paths of both, and their checksums.
    """
    models = {other: kept_model(args.checkpoints, source.name, other)
              for other in CONFIGS if any(f"{{{other}}}" in flag for flag in flags)}
    facts: dict[str, Any] = {"teachers": [sha256(path) for path in models.values()]}
    places: dict[str, Path] = dict(models)
    if "--augmented" in flags or any("{augmented}" in flag for flag in flags):
        places["augmented"] = text = augmented_text(args, source, model)
        if "--augmented" in flags:
            facts["augmented"] = sha256(text)
            for file in (text, *text.parent.glob("logits-*.json")):
                shutil.copyfile(file, data / file.name)
            run_stage("preprocess.py", f"--config={CONFIGS[model]}", f"--data_dir={data}",
                      *encoding_flags(args, source.name, model), "--augmented", f"--augmented_filename={text.name}")
    return [flag.format_map(places) for flag in flags], facts


def augmented_text(args: argparse.Namespace, source: Path, model: str) -> Path:
    """The training text augmented for a student, with its teachers' mean logits; made once for each set of teachers."""
    teaching, name = TAUGHT[model], source.name
    teachers = [kept_model(args.checkpoints, name, teacher, seed) for teacher, seed in teaching.teachers]
    decisive = [sha256(source / SPLITS[0]), *map(sha256, teachers), teaching.augment_flags]
    folder = args.checkpoints / f"{name}-augmented-{digest(str(decisive))}"
    path = folder / "augmented.txt"
    if path.exists():
        return path
    where, encoding = f"--data_dir={folder}", encoding_flags(args, name, TEACHER)
    encode(source, folder, CONFIGS[TEACHER], *encoding)
    run_stage("augment_data.py", f"--input={folder / SPLITS[0]}", f"--output={folder / 'augmented.raw'}", "--lower",
              "--parallel", *teaching.augment_flags.split())
    run_stage("preprocess.py", f"--config={CONFIGS[TEACHER]}", where, *encoding, "--augmented")
    exported = [str(folder / f"teacher-{number}.onnx") for number, _ in enumerate(teachers, 1)]
    for teacher, onnx in zip(teachers, exported, strict=True):
        run_stage("evaluate.py", where, f"--model_path={teacher}", "--convert_onnx", f"--onnx_path={onnx}")
    more = ["--more_teachers", *exported[1:]] if len(exported) > 1 else []
    run_stage("evaluate.py", where, "--enable_ort", f"--onnx_path={exported[0]}", *more, "--augmented",
              "--batch_size=128")
    os.replace(folder / "augmented.raw.pred", path)
    return path
