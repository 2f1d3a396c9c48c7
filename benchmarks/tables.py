"""The tables of what benchmark.py measured, on standard output and in the documents, which are kept current.

In a document, a table stands between two lines, and what is written between them by hand is lost:

    <!-- table NAME -->
    <!-- end -->
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import newest_rows
from benchmarks.baselines import BASELINES
from benchmarks.harness import GLOVE_WORDS, read_results
from cli.flags import did_you_mean
from sentence_classifier.errors import InputError
from util import ROOT, atomic_write

RESULTS = ROOT / "results"
MARK = re.compile(r"<!-- (?:table (\S+)|end) -->")
FORMS = ("ONNX int8", "ONNX")  # that the overview shows
TAUGHT_BY = ", taught by MiniLM"
# The overview's rows: what is shown, the model of the accuracy table, and the network (a taught one is as fast).
OVERVIEW = [("GNB", "gnb", "gnb"), ("CNN", "cnn", "cnn"), (f"CNN{TAUGHT_BY}", "cnn-taught", "cnn"),
            ("DenseNet-CNN", "densenet-cnn", "densenet-cnn"), ("DenseNet-DSA", "densenet-dsa", "densenet-dsa"),
            (f"DenseNet-DSA{TAUGHT_BY}", "densenet-dsa-taught", "densenet-dsa"),
            ("MiniLM", "minilm-cls", "minilm-cls"), *((name, name, name) for name in BASELINES)]


def table(name: str, results: Path = RESULTS) -> str:
    """One of TABLES in Markdown, with a line on what was measured; an InputError says that it is not there."""
    if name not in TABLES:
        raise InputError(f"there is no table {name!r}{did_you_mean(name, TABLES)}; there are {', '.join(TABLES)}.")
    return TABLES[name](results)


def update_documents(paths: Iterable[Path], results: Path = RESULTS) -> list[Path]:
    """Write the tables between the marks of some documents anew. Returns the documents that changed."""
    new = {path: with_tables(path, path.read_text(encoding="utf-8"), results) for path in paths}
    changed = [path for path, text in new.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        with atomic_write(path) as file:
            file.write(new[path])
    return changed


def with_tables(path: Path, text: str, results: Path = RESULTS) -> str:
    """A document's text with its tables as `results` has them; an InputError names a line with a wrong mark."""
    lines: list[str] = []
    opened = number = 0
    try:
        for number, line in enumerate(text.split("\n"), 1):
            mark = MARK.fullmatch(line.strip())
            if mark and bool(mark[1]) == bool(opened):
                raise InputError("each <!-- table NAME --> needs one <!-- end --> after it, and here is "
                                 f"{'no end before the next' if opened else 'an end without a start'}.")
            if mark or not opened:
                lines.append(line)
            if mark and mark[1]:
                opened = number
                lines += ["", table(mark[1], results).strip("\n"), ""]
            elif mark:
                opened = 0
        if number := opened:
            raise InputError("the table that begins here has no <!-- end -->.")
    except InputError as error:
        raise InputError(f"{path}, line {number}: {error}") from None
    return "\n".join(lines)


def markdown(head: list[str], rows: list[list[str]], *notes: str) -> str:
    """A Markdown table, and notes under it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + "".join(f"\n{note}\n" for note in notes)


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:#.3g}".rstrip(".")


# --------------------------------------------------------------------------------------------- a measurement's table


def ratios(name: str, results: Path) -> str:
    """The ratios of one measurement and what they were made of."""
    with read_results(results / f"{name}.json") as found:
        rows = [[row["measured"], number(row["ratio"]), row["beside"]] for row in found["figures"]]
        return markdown(["measured", "ratio", "absolute"], rows, "; ".join(found["notes"]))


def read_points(name: str, results: Path) -> list[dict[str, Any]]:
    """What inference, chain or int8 found of each model and form."""
    with read_results(results / f"{name}.json") as found:
        return found.get("points") or [{"model": model, "form": form, **got}
                                       for model, forms in found["ways"].items() for form, got in forms.items()]


def by_model(name: str, results: Path) -> str:
    """A column a model: how each form of it answers, then batches, cold starts and threads where they were measured."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    with read_results(results / f"{name}.json") as found:
        points = read_points(name, results)
        for point in points:
            size = f", {point['mb']:.0f} MB" if "mb" in point else ""
            cells[point["form"]][point["model"]] = (f"{number(point['median_ms'])} ms, "
                                                    f"{100 * point['accuracy']:.2f} %{size}")
        for model, rates in found.get("sentences_a_second", {}).items():
            for form, rate in rates.items():
                cells[form][model] = f"{rate:,.0f} a second"
        for model, starts in found.get("cold_seconds", {}).items():
            for form, seconds in starts.items():
                cells[f"{form}, cold start"][model] = f"{seconds:.2f} s"
        for side, times in (found["threads"] if name == "int8" else {}).items():
            model, _, form = side.partition(", ")
            for threads, time in times.items():
                cells[f"{form}, {threads} thread{'s' * (threads != '1')}"][model] = f"{number(time)} ms"
        models = list(dict.fromkeys(point["model"] for point in points))
        rows = [[row, *(of.get(model, "") for model in models)] for row, of in cells.items()]
        return markdown(["a sentence", *models], rows, "; ".join(found["notes"]))


# ----------------------------------------------------------------------------------------------------------- accuracy


def by_cell(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Accuracies in percent, a seed each, by model and data set."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["data_set"]), []).append(100 * row["accuracy"])
    return cells


def accuracy(results: Path) -> str:
    """The accuracy of each model on each data set: the mean, and each seed in brackets."""
    rows = newest_rows(results / "accuracy.json")
    cells = by_cell(rows)
    data_sets = list(dict.fromkeys(data_set for _, data_set in cells))
    made = [[model] for model in dict.fromkeys(model for model, _ in cells)]
    for line in made:
        for found in (cells.get((line[0], data_set), []) for data_set in data_sets):
            each = f" ({', '.join(f'{one:.2f}' for one in found)})" if len(found) > 1 else ""
            line.append(f"{statistics.mean(found):.2f}{each}" if found else "")
    return markdown(["accuracy, %", *data_sets], made, caption(rows))


def accuracy_on(data_set: str, results: Path) -> str:
    """The accuracy of each model on one data set: the mean, and each seed."""
    rows = [[model, f"{statistics.mean(found):.2f}", ", ".join(f"{one:.2f}" for one in found)]
            for (model, one), found in by_cell(newest_rows(results / "accuracy.json")).items() if one == data_set]
    return markdown(["model", "accuracy, %", "seeds"], rows)


def caption(rows: list[dict[str, Any]]) -> str:
    """What a reader of the accuracy table has to know."""
    said = ["Accuracy on test.txt, mean of the seeds (each in brackets)."]
    for name, words in sorted({(row["embedding"]["file"], row["embedding"]["words"] or 0) for row in rows
                               if "embedding" in row}):
        if words and words < 100_000:
            said.append(f"{name}: a subset of {words:,} words; the whole GloVe 6B has {GLOVE_WORDS:,}.")
        elif name != "none":
            said.append(f"Word vectors: {name}, {words:,} words." if words else f"The transformer: {name}.")
    return " ".join(said)


def overview(results: Path) -> str:
    """The main models: accuracy, milliseconds and megabytes."""
    rows = [[shown, *(f"{on[data_set]:.2f}" if data_set in on else "" for data_set in ("snips", "sst2")),
             " / ".join(f"{one:.2g}" for one in ms), " / ".join(f"{one:.0f}" for one in mb)]
            for shown, on, ms, mb in overview_rows(results)]
    return markdown(["model", "Snips, %", "SST-2, %", "ms a sentence", "MB"], rows,
                    "Accuracy on test, mean of the seeds. Milliseconds: one sentence of Snips at a time, from raw "
                    "text, on two CPU cores; two figures: ONNX in int8 / in fp32; one: as trained. A taught network is "
                    "as fast and as large as the same one untaught.")


def overview_rows(results: Path) -> list[tuple[str, dict[str, float], list[float], list[float]]]:
    """What is shown, accuracies in percent by data set, milliseconds and megabytes: in int8 and fp32, or as trained."""
    rows = newest_rows(results / "accuracy.json")
    cells = by_cell(rows)
    times, sizes = ({(point["model"], point["form"]): point[key] for point in read_points(verb, results)}
                    for verb, key in (("inference", "median_ms"), ("int8", "mb")))
    made = []
    for shown, model, network in OVERVIEW:
        accuracies = {data_set: statistics.mean(found) for (one, data_set), found in cells.items() if one == model}
        plain = [row["ms"] for row in rows if (row["model"], row["data_set"]) == (network, "snips")]
        sides = [(network, form) for form in FORMS if (network, form) in times]
        ms = [times[side] for side in sides] or ([statistics.median(plain)] if plain else [])
        if accuracies:
            made.append((shown, accuracies, ms, [sizes[side] for side in sides if side in sizes]))
    return made


def commands(results: Path) -> str:
    """What the word-vector commands of the original's README end with, typed as they stand."""
    with read_results(results / "commands.json") as found:
        rows = [[f"`{row['commands'][1].removeprefix('python ')}`", row["vectors"].partition(".txt")[0],
                 " ".join(map(str, row["exit_statuses"])),
                 *(f"{100 * row[key]:.2f}" for key in ("valid_accuracy", "accuracy"))] for row in found["rows"]]
        return markdown(["command", "word vectors", "exit statuses", "valid, %", "test, %"], rows, found["about"])


FIGURES = ("speed", "vectors", "augment", "finetune", "scale", "zero", "gpu")
TABLES: dict[str, Callable[[Path], str]] = {
    "overview": overview, "accuracy": accuracy, "accuracy-sst2": partial(accuracy_on, "sst2"), "commands": commands,
    **{name: partial(ratios, name) for name in FIGURES},
    **{name: partial(by_model, name) for name in ("inference", "chain", "int8")}}
