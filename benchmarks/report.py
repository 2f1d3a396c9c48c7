"""Results of benchmark.py: where they come from, accuracy.json's rows, Markdown tables and a picture."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentence_classifier.errors import InputError
from util import atomic_write

GLOVE_WORDS = 400_000  # in GloVe 6B


def provenance(command: str) -> dict[str, Any]:
    """Where a result comes from."""
    import torch

    from util import git_revision, versions

    able = torch.cpu.get_capabilities()
    quick = [name for name in ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
             if able.get(name)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"git_revision": git_revision(), "date": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command,
            "versions": versions(), "cores": cores, "instructions": quick,
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})}


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[Any]:
    """The content of a results file; what the block does not find in it is the file's fault.

    Raises:
        InputError: no JSON, or not that of benchmark.py.
    """
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not as benchmark.py wrote it ({error}); remove or restore it.") from None


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures_table(result: dict[str, Any]) -> str:
    """The ratios of one measurement, and under them what was measured."""
    says = {True: "yes", False: "no", None: ""}
    rows = [[row["measured"], f"{row['ratio']:.3g}", row["aim"], says[row["met"]], row["beside"]]
            for row in result["figures"]]
    table = markdown(["measured", "ratio", "aim", "met", "absolute"], rows)
    machine = " ".join([f"{result['cores']} cores", *(["with", *result["instructions"]] if "instructions" in result
                                                      else [])])
    notes = "; ".join([*result["notes"], machine, f"revision {result['git_revision']}"])
    return f"{table}\n\n{notes}\n"


def by_cell(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by model and data set."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["data_set"]), []).append(row)
    return cells


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """The accuracy of each model on each data set.

    Args:
        rows: of one recipe for each model and data set, in the order of the table.
    """
    cells = by_cell(rows)
    data_sets = list(dict.fromkeys(row["data_set"] for row in rows))
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        line = [model]
        for data_set in data_sets:
            found = cells.get((model, data_set))
            if not found:
                line.append("")
                continue
            accuracy = statistics.mean(row["accuracy"] for row in found)
            each = ", ".join(f"{100 * row['accuracy']:.2f}" for row in found)
            line.append(f"{100 * accuracy:.2f}" + (f" ({each})" if len(found) > 1 else ""))
        table.append(line)
    head = ["accuracy, %", *data_sets]
    return f"{markdown(head, table)}\n\n{caption(rows)}\n"


def caption(rows: list[dict[str, Any]]) -> str:
    """What a reader of the accuracy table has to know."""
    said = ["Accuracy on test.txt, mean of the seeds (each in brackets); the baselines' settings were chosen on "
            "valid.txt, and so was each run's checkpoint but for those under --measure=last; "
            f"{rows[0]['cores']} cores."]
    if any(row.get("data_set", "").endswith("held out") for row in rows):
        said.append("Held out: on the folds of train.txt, each in turn, in the place of test.txt.")
    for name, words in sorted({(row["embedding"]["file"], row["embedding"]["words"] or 0) for row in rows
                               if "embedding" in row}):
        if name == "none":
            said.append("No pretrained word vectors.")
        elif not words:
            said.append(f"The transformer: {name}.")
        elif words < 100_000:
            said.append(f"The word vectors, {name}, are a subset of {words:,} words; the whole GloVe 6B has "
                        f"{GLOVE_WORDS:,}.")
        else:
            said.append(f"Word vectors: {name}, {words:,} words.")
    for gpu in sorted({row["gpu"] for row in rows if "gpu" in row}):
        there = dict.fromkeys(f"{row['model']} on {row['data_set']}" for row in rows if row.get("gpu") == gpu)
        said.append(f"Trained on one {gpu}: {', '.join(there)}.")
    said.append(f"Revisions: {', '.join(sorted({row['git_revision'] for row in rows}))}.")
    return " ".join(said)


def draw_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a data set: a dot for each model and seed, a line for each baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by_cell(rows)
    data_sets = list(dict.fromkeys(row["data_set"] for row in rows))
    models, baselines = (list(dict.fromkeys(row["model"] for row in rows if ("setting" in row) == baseline))
                         for baseline in (False, True))
    picture, panels = plt.subplots(1, len(data_sets), figsize=(1.5 + 4.5 * len(data_sets), 3.6), squeeze=False,
                                   layout="constrained", sharey=True)
    for axes, data_set in zip(panels[0], data_sets, strict=True):
        for place, model in enumerate(models):
            found = cells.get((model, data_set), [])
            for number, row in enumerate(found):  # side by side, so that equal ones show
                axes.plot(100 * row["accuracy"], place + 0.12 * (number - (len(found) - 1) / 2), "o", color="tab:blue",
                          alpha=0.8)
        for model, style in zip(baselines, ("--", ":"), strict=False):
            for row in cells.get((model, data_set), []):
                axes.axvline(100 * row["accuracy"], linestyle=style, color="tab:red", label=model)
        axes.set(title=data_set, xlabel="accuracy on test, %", yticks=range(len(models)), yticklabels=models,
                 ylim=(len(models) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with atomic_write(path, "wb") as file:
        picture.savefig(file, format="png", dpi=120)
    plt.close(picture)


def draw_inference(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against milliseconds a sentence: a colour a model, a shape a form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    models, forms = (list(dict.fromkeys(point[key] for point in points)) for key in ("model", "form"))
    picture, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for point in points:
        axes.plot(point["median_ms"], 100 * point["accuracy"], "osD^vP*X"[forms.index(point["form"]) % 8], markersize=8,
                  color=f"C{models.index(point['model'])}", alpha=0.8)
    axes.set(xscale="log", xlabel="milliseconds a sentence, median", ylabel="accuracy on test, %")
    axes.grid(which="both", alpha=0.3)
    handles = [Line2D([], [], marker="o", linestyle="", color=f"C{place}", label=model)
               for place, model in enumerate(models)]
    handles += [Line2D([], [], marker="osD^vP*X"[place % 8], linestyle="", color="grey", label=form)
                for place, form in enumerate(forms)]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    with atomic_write(path, "wb") as file:
        picture.savefig(file, format="png", dpi=120)
    plt.close(picture)
