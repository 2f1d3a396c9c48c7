"""The pictures of what benchmark.py measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.transforms import Bbox

from benchmarks.accuracy import newest_rows
from benchmarks.baselines import BASELINES
from benchmarks.tables import TAUGHT_BY, by_cell, overview_rows, read_points
from util import picture


def draw_accuracy(results: Path) -> None:
    """accuracy.png, a panel a data set: a dot for each model and seed, a line for each baseline."""
    rows = newest_rows(results / "accuracy.json")
    cells = by_cell(rows)
    data_sets = list(dict.fromkeys(row["data_set"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"] not in BASELINES))
    with picture(results / "accuracy.png", 1, len(data_sets), figsize=(1.5 + 4.5 * len(data_sets), 3.6), squeeze=False,
                 sharey=True) as (figure, panels):
        for axes, data_set in zip(panels[0], data_sets, strict=True):
            for place, model in enumerate(models):
                found = cells.get((model, data_set), [])
                for number, accuracy in enumerate(found):  # side by side, so that equal ones show
                    axes.plot(accuracy, place + 0.12 * (number - (len(found) - 1) / 2), "o", color="C0", alpha=0.8)
            for model, style in zip(BASELINES, ("--", ":"), strict=True):
                for accuracy in cells.get((model, data_set), []):
                    axes.axvline(accuracy, linestyle=style, color="tab:red", label=model)
            axes.set(title=data_set, xlabel="accuracy on test, %", yticks=range(len(models)), yticklabels=models,
                     ylim=(len(models) - 0.5, -0.5))
            axes.grid(axis="x", alpha=0.3)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def draw_answers(verb: str, results: Path) -> None:
    """VERB.png, accuracy against milliseconds a sentence: a colour a model, a shape a form."""
    points = read_points(verb, results)
    models, forms = (list(dict.fromkeys(point[key] for point in points)) for key in ("model", "form"))
    shapes = {form: "osD^vP*X"[place % 8] for place, form in enumerate(forms)}
    with picture(results / f"{verb}.png", figsize=(8, 4.5)) as (_, axes):
        for point in points:
            axes.plot(point["median_ms"], 100 * point["accuracy"], shapes[point["form"]], markersize=8,
                      color=f"C{models.index(point['model'])}", alpha=0.8)
        for place, model in enumerate(models):
            axes.plot([], [], "o", color=f"C{place}", label=model)
        for form, shape in shapes.items():
            axes.plot([], [], shape, color="grey", label=form)
        axes.set(xscale="log", xlabel="milliseconds a sentence, median", ylabel="accuracy on test, %")
        axes.grid(which="both", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def draw_overview(results: Path) -> None:
    """overview.png, accuracy against milliseconds of the main models, each in its quickest form: a panel a data set."""
    rows = [(shown, accuracies, ms[0]) for shown, accuracies, ms, _ in overview_rows(results) if ms]
    if not rows:  # results of other data sets
        return
    colours = {"trained on the labels": "C0", "the same network, taught by MiniLM": "C1", "not of this toolkit": "0.45"}
    with picture(results / "overview.png", 1, 2, figsize=(11, 4.8), sharex=True) as (figure, panels):
        for axes, data_set, title in zip(panels, ("snips", "sst2"), ("Snips, 7 intents", "SST-2, sentiment"),
                                         strict=True):
            axes.set(title=title, xscale="log", xlabel="milliseconds a sentence, two CPU cores",
                     ylabel="accuracy on test, %")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.margins(0.15, 0.1)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            points = {shown: (ms, accuracies[data_set]) for shown, accuracies, ms in rows if data_set in accuracies}
            for shown, point in points.items():
                alone = points.get(shown.removesuffix(TAUGHT_BY))
                kind = 2 if shown in BASELINES else int(alone != point)
                axes.plot(*point, "o", markersize=9, color=list(colours.values())[kind])
                if kind == 1 and alone:
                    axes.annotate("", point, alone, arrowprops={"arrowstyle": "->", "color": "C1", "alpha": 0.5,
                                                                "shrinkA": 7, "shrinkB": 7})
            place_labels(figure, axes, points)
        for label, colour in colours.items():
            panels[0].plot([], [], "o", markersize=9, color=colour, label=label)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def place_labels(figure: Any, axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Write a label beside each point, on the first side where it meets no other label, no point and no arrow."""
    figure.draw_without_rendering()  # so that everything has a place
    places = {label: axes.transData.transform(point) for label, point in points.items()}
    taken = [Bbox.from_extents(x - 9, places.get(label.removesuffix(TAUGHT_BY), (x, y))[1] - 7, x + 9, y + 7)
             for label, (x, y) in places.items()]
    for label, point in points.items():
        short = label.replace(TAUGHT_BY, ", taught").partition(" + ")[0]
        text = axes.annotate(short, point, (0, 0), textcoords="offset points")
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            text.set(position=(9 * x, 9 * y), ha=("center", "left", "right")[x],
                     va=("center_baseline", "bottom", "top")[y])
            box = text.get_window_extent()
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(box)


PICTURES: dict[str, Callable[[Path], None]] = {
    "accuracy": draw_accuracy, "chain": partial(draw_answers, "chain"), "inference": partial(draw_answers, "inference")}
