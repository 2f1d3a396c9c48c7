"""tables.py and pictures.py: what results/ becomes in the documents."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT

import benchmark
from benchmarks import pictures, tables
from benchmarks.harness import read_results
from sentence_classifier.errors import InputError


@pytest.mark.parametrize("name", [name for name in tables.TABLES if name != "gpu"])  # no such file is kept
def test_a_table_is_short_and_tells_no_machine(name: str) -> None:
    made = tables.table(name)
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert len(rows) > 3 and len({row.count("|") for row in rows}) == 1 and rows[0].count("|") <= 6
    assert not re.search(r"\b[0-9a-f]{12}\b|\baim\b|\bmet\b|avx|20\d\d-\d\d-\d\d", made)


def test_the_overview_has_the_models_and_their_peers() -> None:
    rows = {row[0]: row for row in tables.overview_rows(tables.RESULTS)}
    assert {"GNB", "CNN", "MiniLM", "fastText", "TF-IDF + linear SVM"} <= set(rows)
    with read_results(tables.RESULTS / "inference.json") as found:
        times = {point["form"]: point["median_ms"] for point in found["points"] if point["model"] == "cnn"}
    assert rows["CNN"][2] == rows["CNN, taught by MiniLM"][2] == [times["ONNX int8"], times["ONNX"]]
    assert len(rows["fastText"][2]) == 1 and rows["fastText"][3] == []
    assert "| fastText | 97.57 | 82.98 | 0.0066 |  |" in tables.table("overview")


def test_the_overview_takes_what_there_is(tmp_path: Path) -> None:
    for name in ("accuracy", "inference", "int8"):
        shutil.copy(tables.RESULTS / f"{name}.json", tmp_path)
    rows = [row for row in json.loads((tmp_path / "accuracy.json").read_text())["rows"] if row["model"] == "gnb"]
    (tmp_path / "accuracy.json").write_text(json.dumps({"rows": rows}))
    assert [row[0] for row in tables.overview_rows(tmp_path)] == ["GNB"]
    (tmp_path / "inference.json").unlink()
    with pytest.raises(InputError, match=r"a\.md, line 1: .*inference\.json: cannot be read"):
        tables.with_tables(Path("a.md"), "<!-- table inference -->\n<!-- end -->", tmp_path)


def test_labels_of_the_picture_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[list] = []
    place = pictures.place_labels

    def watched(figure, axes, points):
        place(figure, axes, points)
        boxes.append([text.get_window_extent() for text in axes.texts if text.get_text()])
        assert len(boxes[-1]) == len(points)

    monkeypatch.setattr(pictures, "place_labels", watched)
    shutil.copytree(tables.RESULTS, tmp_path, dirs_exist_ok=True)
    pictures.draw_overview(tmp_path)
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG") and len(boxes) == 2
    for panel in boxes:
        assert sum(box.count_overlaps(panel) for box in panel) == len(panel)  # each meets itself alone


def test_documents_are_filled_and_then_left_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.md", tmp_path / "b.md"
    first.write_text("# A\n\n<!-- table speed -->\nstale\n<!-- end -->\nkept\n<!-- table vectors -->\n<!-- end -->")
    second.write_text("Write `<!-- table speed -->` where a table goes.\n")
    assert tables.update_documents([first, second]) == [first]
    speed, vectors = (tables.table(name).strip() for name in ("speed", "vectors"))
    assert first.read_text() == (f"# A\n\n<!-- table speed -->\n\n{speed}\n\n<!-- end -->\nkept\n"
                                 f"<!-- table vectors -->\n\n{vectors}\n\n<!-- end -->")
    assert tables.update_documents([first, second]) == []


@pytest.mark.parametrize(("text", "message"), [
    ("\n<!-- table sped -->\n<!-- end -->", r"a\.md, line 2: there is no table 'sped' \(did you mean 'speed'\?\)"),
    ("<!-- table speed -->\nmore", r"a\.md, line 1: .*no <!-- end -->"),
    ("<!-- end -->", r"a\.md, line 1: .*an end without a start"),
    ("<!-- table speed -->\n<!-- table vectors -->\n<!-- end -->", r"a\.md, line 2: .*no end before the next")])
def test_a_wrong_mark_changes_no_document(tmp_path: Path, text: str, message: str) -> None:
    stale = "<!-- table speed -->\nstale\n<!-- end -->\n"
    (tmp_path / "0.md").write_text(stale)
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(InputError, match=message):
        tables.update_documents([tmp_path / "0.md", tmp_path / "a.md"])
    assert (tmp_path / "0.md").read_text() == stale and (tmp_path / "a.md").read_text() == text


def test_table_updates_the_documents_by_the_repositorys_own_results_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs/a.md"
    document.write_text("<!-- table speed -->\n<!-- end -->\n")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    benchmark.main(["table", f"--results={tmp_path / 'results'}"])
    assert document.read_text() == "<!-- table speed -->\n<!-- end -->\n"
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    capsys.readouterr()
    benchmark.main(["table", f"--results={tmp_path / 'results'}"])
    assert tables.table("speed") in document.read_text()
    printed = capsys.readouterr()
    assert tables.table("zero") in printed.out and "docs/a.md" in printed.err
    assert (tmp_path / "results/overview.png").read_bytes().startswith(b"\x89PNG")


def test_the_caption_names_the_vectors() -> None:
    def caption(file: str, words: int | None) -> str:
        return tables.caption([{"data_set": "snips", "embedding": {"file": file, "words": words}}])

    assert "subset of 24 words" in caption("glove.txt", 24)
    assert "subset" not in caption("glove.txt", 400_000) and "glove.txt, 400,000 words" in caption("glove.txt", 400_000)
    assert "none" not in caption("none", 0) and "The transformer: MiniLM." in caption("MiniLM", None)
