"""Train and test every model and two baselines on several data sets: what `python benchmark.py accuracy` does.

The models run through the stages, as a user runs them, with the flags of recipes.py. Each finished one is
written to accuracy.json at once, and is not run again while its data, its recipe and the code stay the same.

Students (those of TAUGHT) need --checkpoints: their teachers' models, and the text that a teacher has labelled, stay
there from one run to the next.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.recipes import BY_ONE, CONFIGS, ENCODING, RECIPES, TAUGHT, TEACHER, TEACHING, Teaching
from benchmarks.report import as_written, provenance
from benchmarks.stages import ROOT, SPLITS, copy_splits, encode, is_trained, run_stage
from cli.config import encoded_kind, load_config
from sentence_classifier.errors import InputError
from text.lines import TsvReader
from util import sha256

logger = logging.getLogger(__name__)

# What a row depends on; another version of it makes the row stale.
DECISIVE = ("preprocess.py", "train.py", "cli/training_flags.py", "training/speedups.py", "training/trainer.py",
            "training/losses.py", "model.py", "dataset.py", "text/lines.py", "text/vectors.py",
            "text/vocabulary.py", "pretrained/loading.py", "pretrained/layout.py")
DECISIVE_FOR_TEXT = ("augment_data.py", "text/tagging.py", "text/labels.py")
DECISIVE_FOR_STUDENTS = (*DECISIVE, *DECISIVE_FOR_TEXT, "fastformers.py", "training/distillation.py",
                         "training/meta_pseudo_labels.py", "compression/pruning.py")


# --------------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        results: the folder of accuracy.json.
        command: what the rows say of it.
        data_sets: folders, by path or by their name under data/.
        seeds: in the place of those of RECIPES.
        force: run what is finished, too.
        folds: test on so many folds of the training file in turn, in the place of test.txt; 0: on test.txt.
        train_flags: more of them for all models.
        settings: how many of its settings a baseline tries at most.
        bert: the pretrained transformer of the models that have one.
        checkpoints: where each run's files stay, so that a run cut off goes on; None: nowhere.
    """

    results: Path
    command: str
    data_sets: list[str]
    models: list[str]
    seeds: list[int] | None = None
    embedding_path: str = "none"
    force: bool = False
    folds: int = 0
    train_flags: str = ""
    settings: int = 1000
    bert: str = "embeddings/all-MiniLM-L6-v2"
    checkpoints: Path | None = None


def measure_accuracy(plan: Plan, folder: Path) -> None:
    """Train and test every model and baseline on every data set, working in `folder`."""
    if plan.folds == 1:
        raise InputError("--folds 1 would hold all out and leave nothing to train on; give 2 or more, or 0.")
    if plan.folds and (students := [model for model in plan.models if model in TAUGHT]):
        raise InputError(f"--folds: {', '.join(students)} would need teachers that have not seen the fold; without "
                         "--folds, students are tested on test.txt.")
    for place in plan.data_sets:
        source = Path(place) if os.sep in place else Path("data", place)
        if not plan.folds:
            measure_data_set(plan, source, source.name, folder / source.name)
        for fold in range(1, plan.folds + 1):
            held_out = hold_out(source, folder / f"{source.name}-{fold}", fold - 1, plan.folds)
            measure_data_set(plan, held_out, source.name, folder / f"{source.name}-{fold}-encoded", fold)


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


def measure_data_set(plan: Plan, source: Path, name: str, data: Path, fold: int = 0) -> None:
    """Train and test every model and baseline on one data set.

    Args:
        name: under which RECIPES knows it.
        data: the folder to encode it in.
        fold: of the training file, counted from 1, where a fold is held out; also the seed then.
    """
    shown = f"{name}, held out" if fold else name
    copy_splits(source, data)
    texts = [sha256(data / split) for split in SPLITS]
    for model in plan.models:
        config = load_config(CONFIGS[model])
        if model in TAUGHT and (name, model) not in RECIPES:
            raise InputError(f"{model}: there is no recipe for it on {name}; the data set's folder has to be called "
                             f"{' or '.join(known for known, one in RECIPES if one == model)}.")
        recipe, seeds = RECIPES.get((name, model), ("", [1]))
        flags = [*recipe.split(), *plan.train_flags.split()]
        encoding = encoding_flags(name, config, plan.embedding_path, plan.bert)
        encode(source, data, CONFIGS[model], *encoding)
        if encoded_kind(config) == "ids":
            facts = encoded_facts(data)
            about = {"file": Path(plan.embedding_path).name, "words": facts["vectors"]}
        else:
            facts = {"texts": texts, "model": weights_sha256(plan.bert)}
            about = {"file": Path(plan.bert).name, "words": None}
            flags = [*encoding, *flags]
        code = code_hash()
        used = flags
        if model in TAUGHT:
            code = code_hash(DECISIVE_FOR_STUDENTS)
            used, facts["teachers"] = find_teachers(plan, source, data, flags)
            if "--augmented" in flags:
                place = augmented_text(plan, source, data.name, name, TEACHING.get(model, BY_ONE))
                facts["augmented"] = sha256(place)
                for file in (place, *place.parent.glob("logits-*.json")):
                    shutil.copyfile(file, data / file.name)
                run_stage("preprocess.py", f"--config={CONFIGS[model]}", f"--data_dir={data}", *encoding,
                          "--augmented", f"--augmented_filename={place.name}")
        about = {"flags": flags, "config": config, "embedding": about}
        run = partial(train_and_test, data, CONFIGS[model], used, force=plan.force)
        for seed in [fold] if fold else plan.seeds or seeds:
            key = {"data_set": shown, "model": model, "seed": seed,
                   "recipe": digest(json.dumps([config, flags, *([] if fold else [facts])])),
                   "code": digest("".join([code, *texts])) if fold else code}
            kept = plan.checkpoints and run_folder(plan.checkpoints, data.name, model, seed)
            finish(plan, key, about, partial(run, key, kept))
    for baseline, (fit, settings) in BASELINES.items():
        settings = settings[: plan.settings]
        key = {"data_set": shown, "model": baseline, "seed": fold,
               "recipe": digest(json.dumps([settings, *([] if fold else [texts])])),
               "code": digest("".join([inspect.getsource(fit), inspect.getsource(tune), *(texts if fold else [])]))}
        finish(plan, key, {}, partial(tune, fit, settings, data))


def encoding_flags(name: str, config: dict[str, Any], embedding_path: str, bert: str) -> list[str]:
    """preprocess.py's flags for a model on the data set that RECIPES knows as `name`."""
    if encoded_kind(config) == "ids":
        return [f"--embedding_path={embedding_path}", *ENCODING.get(name, "").split()]
    return [f"--bert_model_name_or_path={bert}"]


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


def find_teachers(plan: Plan, source: Path, data: Path, flags: list[str]) -> tuple[list[str], list[str]]:
    """Flags with the paths of the models and the text that they name, and the models' checksums."""
    models = {model: kept_model(plan.checkpoints, data.name, model)
              for model in CONFIGS if any(f"{{{model}}}" in flag for flag in flags)}
    places: dict[str, Path] = dict(models)
    if any("{augmented}" in flag for flag in flags):
        places["augmented"] = augmented_text(plan, source, data.name, data.name, BY_ONE)
    return [flag.format_map(places) for flag in flags], [sha256(path) for path in models.values()]


def augmented_text(plan: Plan, source: Path, data_set: str, name: str, teaching: Teaching) -> Path:
    """The training text augmented, with its teachers' mean logits and their record beside it; made once for each set.

    Args:
        teaching: as in TEACHING.
    """
    names, flags = teaching
    teachers = [kept_model(plan.checkpoints, data_set, model, seed) for model, seed in names]
    decisive = [sha256(source / SPLITS[0]), [sha256(teacher) for teacher in teachers], flags,
                code_hash(DECISIVE_FOR_TEXT)]
    folder = teachers[0].parent.parent / f"{data_set}-augmented-{digest(str(decisive))}"
    path = folder / "augmented.txt"
    if path.exists():
        return path
    config, where = f"--config={CONFIGS[TEACHER]}", f"--data_dir={folder}"
    encoding = encoding_flags(name, load_config(CONFIGS[TEACHER]), plan.embedding_path, plan.bert)
    encode(source, folder, CONFIGS[TEACHER], *encoding)
    run_stage("augment_data.py", f"--input={folder / SPLITS[0]}", f"--output={folder / 'augmented.raw'}", "--lower",
              "--parallel", *flags.split())
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


def finish(plan: Plan, key: dict[str, Any], about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Run one row and write it, unless it stands there already."""
    path = plan.results / "accuracy.json"
    name = f"{key['model']} on {key['data_set']}, seed {key['seed']}"
    if not plan.force and any(key.items() <= row.items() for row in read_rows(path)):
        logger.info("[%s: finished before]", name)
        return
    logger.info("[%s: begins]", name)
    row = {**key, **provenance(plan.command), **about, **run()}
    write_row(path, row)
    logger.info("[%s: %.4f on test, %.4f on valid]", name, row["accuracy"], row["valid_accuracy"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows, the newest last."""
    if not path.exists():
        return []
    with as_written(path) as result:
        return result["rows"]


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row; it takes the place of one of the same data set, model, seed and recipe."""
    from util import write_json

    keys = ("data_set", "model", "seed", "recipe")
    others = [old for old in read_rows(path) if any(old[key] != row[key] for key in keys)]
    write_json({"rows": [*others, row]}, path)


def newest_rows(path: Path) -> list[dict[str, Any]]:
    """accuracy.json's rows of the newest recipe of each model on each data set, in the table's order."""
    rows = read_rows(path)
    newest = {(row["model"], row["data_set"]): row["recipe"] for row in rows}
    order = [*CONFIGS, *BASELINES, *dict.fromkeys(data_set for data_set, _ in RECIPES)]
    place = {name: number for number, name in enumerate(order)}
    rows = [row for row in rows if row["recipe"] == newest[row["model"], row["data_set"]]]
    return sorted(rows, key=lambda row: (*(place.get(row[key], len(order)) for key in ("model", "data_set")),
                                         row["seed"]))


def digest(text: str) -> str:
    """A short checksum."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash(files: tuple[str, ...] = DECISIVE) -> str:
    """A checksum of the code that decides a model's accuracy, but for its comments, docstrings and layout."""
    trees = []
    for name in files:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        trees.append(ast.dump(tree))
    return digest("\n".join(trees))


def weights_sha256(folder: str) -> str:
    """Which pretrained weights a folder holds; of a hub name, the name itself."""
    path = Path(folder) / "model.safetensors"
    return sha256(path) if path.exists() else folder


def encoded_facts(data: Path) -> dict[str, Any]:
    """What was encoded: checksums of the texts, the vocabulary and the vectors, and how many vectors the file has."""
    from dataset import EncodedData

    splits = [EncodedData(data / f"{name}.ids").encoding for name in SPLITS]
    vocabulary = (data / "vocab.txt").read_bytes().count(b"\n")
    return {"texts": [split.source_sha256 for split in splits], "vocabulary": splits[0].vocab_sha256,
            "table": splits[0].table, "vectors": vocabulary - splits[0].own_rows}


def go_on(folder: Path, key: dict[str, Any], force: bool) -> bool:
    """Make a kept run's folder, and move one aside that another recipe or other code left, or a finished one.

    Args:
        force: a finished run of the same recipe and code is moved aside, too.

    Returns:
        Whether there is a run in it to go on with.
    """
    from util import write_json

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


def train_and_test(data: Path, config: str, flags: list[str], key: dict[str, Any], kept: Path | None,
                   force: bool = False) -> dict[str, Any]:
    """Run train.py and evaluate.py, on encoded data and once more on raw text, one sentence at a time.

    Args:
        key: what the row is found by; its seed.
        kept: the folder of the run's files; None: one that is removed at the end.
        force: train anew where a finished run of the same recipe and code is kept.
    """
    begun, seed = kept is not None and go_on(kept, key, force), key["seed"]
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(dir=data) as folder:
        model = f"{folder}/model.pt"
        common = (f"--config={config}", f"--data_dir={data}")
        start = time.perf_counter()
        script, places = "train.py", ["", *(["_pruned"] if "--do_prune" in flags else [])]
        if {"--do_distill", "--do_prune"} & set(flags):
            script = "fastformers.py"
        if not any(flag.startswith("--mpl_data_path") for flag in flags):
            flags = [*flags, "--resume"]
        run_stage(script, *common, *flags, f"--seed={seed}", f"--log_dir={folder}/runs",
                  f"--log_path={folder}/train.log", *(f"--save_path{of}={model}" for of in places),
                  *(f"--bert_output_dir{of}={folder}/bert" for of in places))
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


# -------------------------------------------------------------------------------------------------------- baselines

Examples = list[tuple[str, str]]
Fit = Callable[[dict[str, Any], Examples, Path], Callable[[str], str]]


def fit_svm(setting: dict[str, Any], train: Examples, folder: Path) -> Callable[[str], str]:
    """TF-IDF of words and pairs of words with a linear support vector machine."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), **{key: setting[key] for key in setting if key != "C"})
    features = vectorizer.fit_transform([sentence for sentence, _ in train])
    svm = LinearSVC(C=setting["C"], random_state=0).fit(features, [label for _, label in train])
    return lambda sentence: str(svm.predict(vectorizer.transform([sentence]))[0])


def fit_fasttext(setting: dict[str, Any], train: Examples, folder: Path) -> Callable[[str], str]:
    """fastText with pairs of words, on one thread: with more it is not repeatable.

    With one thread it leaves most of the buckets' vectors as the memory comes, so that these must be larger than what
    the C library hands out again: 500,000 buckets of 50 numbers are always fresh, and zero.
    """
    try:
        import fasttext
    except ImportError:
        raise InputError("the fastText baseline needs its package: pip install -r requirements-dev.txt") from None

    names = sorted({label for _, label in train})
    path = folder / "fasttext.txt"
    path.write_text("".join(f"__label__{names.index(label)} {sentence.lower()}\n" for sentence, label in train))
    model = fasttext.train_supervised(str(path), wordNgrams=2, minCount=1, bucket=500_000, thread=1, verbose=0,
                                      **setting)
    # The inner object: fastText's own predict() fails under numpy 2.
    return lambda sentence: names[int(model.f.predict(f"{sentence.lower()}\n", 1, 0.0, "strict")[0][1][9:])]


def grid(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """All combinations of some settings."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


BASELINES: dict[str, tuple[Fit, list[dict[str, Any]]]] = {
    "TF-IDF + linear SVM": (fit_svm, grid(C=(0.1, 0.3, 1.0, 3.0, 10.0), min_df=(1, 2), sublinear_tf=(False, True),
                                          token_pattern=(r"(?u)\b\w\w+\b", r"\S+"))),
    "fastText": (fit_fasttext, grid(epoch=(5, 25), lr=(0.1, 0.5, 1.0), dim=(50, 100))),
}


def tune(fit: Fit, settings: list[dict[str, Any]], data: Path) -> dict[str, Any]:
    """Fit with each setting, choose by accuracy on valid, and test that one, one sentence at a time."""
    train, valid, test = ([(e.sentence, e.label) for e in TsvReader(data / name)] for name in SPLITS)
    best: dict[str, Any] = {"valid_accuracy": -1.0}
    predict: Callable[[str], str] = str
    for setting in tqdm(settings, unit="setting", disable=None):
        start = time.perf_counter()
        try:
            candidate = fit(setting, train, data)
        except RuntimeError as error:  # fastText diverges at too high a learning rate
            logger.warning("[%s: %s]", setting, error)
            continue
        seconds = time.perf_counter() - start
        accuracy = sum(candidate(sentence) == label for sentence, label in valid) / len(valid)
        if accuracy > best["valid_accuracy"]:
            best = {"setting": setting, "valid_accuracy": accuracy, "train_seconds": seconds}
            predict = candidate
    correct, times = 0, []
    for sentence, label in test:
        start = time.perf_counter()
        answer = predict(sentence)
        times.append(1000 * (time.perf_counter() - start))
        correct += answer == label
    return {**best, "accuracy": correct / len(test), "correct": correct, "examples": len(test),
            "settings_tried": len(settings), "ms": statistics.mean(times[1:] or times)}


