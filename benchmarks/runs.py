"""Runs of the stages, trained and tested as a user does it; their teachers; and the code that they depend on.

With --checkpoints a run's files stay, so that one cut off goes on and a student finds its teachers' models and the text
that they have labelled.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
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
from util import ROOT, sha256, write_json

logger = logging.getLogger(__name__)

# The code that decides a run's weights; another version of it makes the run's row stale.
DECISIVE = ("preprocess.py", "train.py", "cli/training_flags.py", "training/run.py", "training/speedups.py",
            "training/trainer.py", "training/losses.py", "model.py", "dataset.py", "text/lines.py", "text/vectors.py",
            "text/vocabulary.py", "pretrained/loading.py", "pretrained/layout.py", "pretrained/masking.py",
            "pretrained/surgery.py")
DECISIVE_FOR_TEXT = ("augment_data.py", "text/tagging.py", "text/labels.py")
DECISIVE_FOR_STUDENTS = (*DECISIVE, *DECISIVE_FOR_TEXT, "fastformers.py", "training/distillation.py",
                         "training/meta_pseudo_labels.py", "compression/pruning.py")


def digest(text: str) -> str:
    """A short checksum."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash(files: tuple[str, ...] = DECISIVE) -> str:
    """A checksum of what some files define, but for comments, docstrings, layout, imports and which file defines it."""
    definitions = []
    for name in files:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            for field in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(node, field, None), list):
                    setattr(node, field, [one for one in block if not isinstance(one, ast.Import | ast.ImportFrom)])
        definitions += [ast.dump(node) for node in tree.body]
    return digest("\n".join(sorted(definitions)))


# --------------------------------------------------------------------------------------------------------- the runs


def train_and_test(data: Path, config: str, flags: list[str], key: dict[str, Any], kept: Path | None,
                   force: bool = False) -> dict[str, Any]:
    """Run train.py and evaluate.py, on encoded data and once more on raw text, one sentence at a time.

    Args:
        key: what the row is found by; its seed.
        kept: the folder of the run's files; None: one that is removed at the end.
        force: train anew where a finished run of the same recipe and code is kept.
    """
    begun = kept is not None and go_on(kept, key, force)
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(dir=data) as folder:
        model = Path(folder, "model.pt")
        common = (f"--config={config}", f"--data_dir={data}")
        start = time.perf_counter()
        script, pruned = "train.py", []
        if "--do_prune" in flags:
            pruned = [f"--save_path_pruned={model}", f"--bert_output_dir_pruned={model.with_name('bert')}"]
        if {"--do_distill", "--do_prune"} & set(flags):
            script = "fastformers.py"
        if not any(flag.startswith("--mpl_data_path") for flag in flags):
            flags = [*flags, "--resume"]
        run_stage(script, *common, *flags, f"--seed={key['seed']}", *output_flags(model.parent), *pruned)
        seconds = time.perf_counter() - start
        run_stage("evaluate.py", *common, f"--model_path={model}")
        test = json.loads(Path(f"{model}.test.json").read_text())
        run_stage("evaluate.py", *common, f"--model_path={model}", "--enable_inference")
        raw = json.loads(Path(f"{model}.test.json").read_text())
        trained = json.loads(Path(f"{model}.train.json").read_text())
    if raw["correct"] != test["correct"]:
        logger.warning("[%d right on encoded data, %d on raw text]", test["correct"], raw["correct"])
    best = trained["best"]
    return {"accuracy": test["accuracy"], "correct": test["correct"], "examples": test["examples"],
            "macro_f1": test["macro_f1"], "raw_accuracy": raw["accuracy"], "valid_accuracy": best["valid_accuracy"],
            "valid_loss": best["valid_loss"], "best_step": best["step"], "precision": trained["flags"]["precision"],
            "train_seconds": None if begun else seconds, "ms": raw["timing"]["mean_ms"],
            "ms_encoded": test["timing"]["mean_ms"]}


def go_on(folder: Path, key: dict[str, Any], force: bool) -> bool:
    """Make a kept run's folder, and move one aside that another recipe or other code left, or a finished one.

    Args:
        force: a finished run of the same recipe and code is moved aside, too.

    Returns:
        Whether there is a run in it to go on with.
    """
    path, mine = folder / "key.json", {name: key[name] for name in ("recipe", "code")}
    begun = folder.exists() and any(folder.iterdir())
    again = force and is_trained(folder / "model.pt")
    if begun and (not path.exists() or json.loads(path.read_text()) != mine or again):
        aside = next(place for number in itertools.count(1)
                     if not (place := folder.with_name(f"{folder.name}.before-{number}")).exists())
        folder.rename(aside)
        logger.info("[%s: of another recipe or other code, or to be run again; it is now %s]", folder, aside)
        begun = False
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mine, path)
    return begun


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


def find_teachers(args: argparse.Namespace, source: Path, model: str, data_set: str,
                  flags: list[str]) -> tuple[list[str], list[str]]:
    """Flags with the paths of the models and the text that they name, and the models' checksums."""
    models = {other: kept_model(args.checkpoints, data_set, other)
              for other in CONFIGS if any(f"{{{other}}}" in flag for flag in flags)}
    places: dict[str, Path] = dict(models)
    if any("{augmented}" in flag for flag in flags):
        places["augmented"] = augmented_text(args, source, model, data_set)
    return [flag.format_map(places) for flag in flags], [sha256(path) for path in models.values()]


def augmented_text(args: argparse.Namespace, source: Path, model: str, data_set: str) -> Path:
    """The training text augmented for a student, with its teachers' mean logits; made once for each set of teachers."""
    teaching = TAUGHT[model]
    teachers = [kept_model(args.checkpoints, data_set, teacher, seed) for teacher, seed in teaching.teachers]
    decisive = [sha256(source / SPLITS[0]), [sha256(teacher) for teacher in teachers], teaching.augment_flags,
                code_hash(DECISIVE_FOR_TEXT)]
    folder = args.checkpoints / f"{data_set}-augmented-{digest(str(decisive))}"
    path = folder / "augmented.txt"
    if path.exists():
        return path
    config, where = f"--config={CONFIGS[TEACHER]}", f"--data_dir={folder}"
    encoding = encoding_flags(args, data_set, TEACHER)
    encode(source, folder, CONFIGS[TEACHER], *encoding)
    run_stage("augment_data.py", f"--input={folder / SPLITS[0]}", f"--output={folder / 'augmented.raw'}", "--lower",
              "--parallel", *teaching.augment_flags.split())
    run_stage("preprocess.py", config, where, *encoding, "--augmented")
    exported = [folder / f"teacher-{number}.onnx" for number, _ in enumerate(teachers, 1)]
    for teacher, onnx in zip(teachers, exported, strict=True):
        run_stage("evaluate.py", where, f"--model_path={teacher}", "--convert_onnx", f"--onnx_path={onnx}")
    more = ["--more_teachers", *map(str, exported[1:])] if len(exported) > 1 else []
    run_stage("evaluate.py", where, "--enable_ort", f"--onnx_path={exported[0]}", *more, "--augmented",
              "--batch_size=128")
    shutil.copyfile(folder / "augmented.raw.pred", folder / "partial")
    os.replace(folder / "partial", path)
    return path
