"""Tables become a data folder: however they are written, no row is lost in silence, no sentence on both sides."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import ROOT, make_lines, refusal, snapshot
from pyarrow import parquet

import import_data
from sentence_classifier.tables import read_table


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


ROWS = [*make_lines(60, seed=1), ("play\nsome  \"jazz\", please", "PlayMusic"), ("오늘 날씨; 어때?", "GetWeather")]


def as_csv(rows: list[tuple[str, str]], delimiter: str = ",", names: tuple[str, str] | None = ("text", "category"),
           end: str = "\n") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows([*([names] if names else []), *rows])
    return file.getvalue()


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(folder: Path, name: str) -> list[tuple[str, ...]]:
    text = (folder / name).read_text(encoding="utf-8")
    return [tuple(line.split("\t")) for line in text.removesuffix("\n").split("\n")] if text else []


def test_however_a_table_is_written_it_gives_the_same_folder(tmp_path: Path) -> None:
    records = [{"text": sentence, "category": label} for sentence, label in ROWS]
    tables = {
        "comma.csv": as_csv(ROWS).encode(), "bom.csv": as_csv(ROWS, ";", end="\r\n").encode("utf-8-sig"),
        "sixteen.tsv": as_csv(ROWS, "\t").encode("utf-16"), "legacy.csv": as_csv(ROWS).encode("gb18030"),
        "packed.csv.gz": gzip.compress(as_csv(ROWS).encode()),
        "lines.jsonl": "".join(f"{json.dumps(record)}\n" for record in records).encode(),
        "list.jsonl": "".join(json.dumps({**record, "category": [record["category"]]}, ensure_ascii=False) + "\n"
                              for record in records).encode("utf-16"),
        "bare.csv": as_csv(ROWS, names=None).encode()}
    for name, content in tables.items():
        write(tmp_path / name, content)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    made = {}
    for name in [*tables, "rows.parquet"]:
        flags = ["--encoding=gb18030"] if name == "legacy.csv" else []
        import_data.main([f"--input={tmp_path / name}", f"--output_dir={tmp_path / 'out' / name}", *flags])
        made[name] = snapshot(tmp_path / "out" / name)
    assert set(made["comma.csv"]) == {"train.txt", "valid.txt", "test.txt"}
    assert all(files == made["comma.csv"] for files in made.values())
    folder = tmp_path / "out" / "comma.csv"
    arrived = [row for name in ("train.txt", "valid.txt", "test.txt") for row in lines(folder, name)]
    wanted = [(" ".join(sentence.split()), label) for sentence, label in ROWS]
    assert Counter(arrived) == Counter(wanted)
    assert arrived != wanted  # shuffled


def test_one_seed_one_split(tmp_path: Path) -> None:
    table = write(tmp_path / "in.csv", as_csv(ROWS))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        import_data.main([f"--input={table}", f"--output_dir={tmp_path / name}", f"--seed={seed}"])
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") != snapshot(tmp_path / "c")


def test_the_same_sentence_is_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"say {number % 40}" if number % 3 else f"SAY  {number % 40}", f"label{number % 4}")
            for number in range(400)]
    table = write(tmp_path / "in.csv", as_csv(rows))
    out = tmp_path / "out"
    import_data.main([f"--input={table}", f"--output_dir={out}"])
    sides = [{sentence.lower() for sentence, _ in lines(out, name)} for name in ("train.txt", "valid.txt", "test.txt")]
    assert sum(map(len, sides)) == 40 == len(set.union(*sides)) and min(map(len, sides)) >= 4
    import_data.main([f"--input={table}", f"--output_dir={out}", "--drop_duplicates"])
    assert sum(len(lines(out, name)) for name in ("train.txt", "valid.txt", "test.txt")) == 40
    assert "360 sentences that stood there before with the same label were left out" in caplog.text


def test_given_files_stay_in_order(tmp_path: Path) -> None:
    table, test = write(tmp_path / "in.csv", as_csv(ROWS[:50])), write(tmp_path / "test.csv", as_csv(ROWS[45:]))
    out = tmp_path / "out"
    import_data.main([f"--input={table}", f"--test={test}", f"--valid={test}", f"--output_dir={out}"])
    wanted = [(" ".join(sentence.split()), label) for sentence, label in ROWS]
    assert lines(out, "train.txt") == wanted[:50] and lines(out, "test.txt") == wanted[45:] == lines(out, "valid.txt")
    import_data.main([f"--input={table}", f"--test={test}", f"--output_dir={out}", "--valid_share=0.2",
                      "--drop_duplicates"])
    assert lines(out, "test.txt") == wanted[45:]
    left = [*lines(out, "train.txt"), *lines(out, "valid.txt")]
    assert not {sentence for sentence, _ in left} & {sentence for sentence, _ in wanted[45:]}
    assert len(lines(out, "valid.txt")) == round(0.2 * len({sentence for sentence, _ in left}))


def test_rare_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, ("one of its kind", "Rare"), ("and another", "Rarer")]
    table, out = write(tmp_path / "in.csv", as_csv(rows)), tmp_path / "out"
    import_data.main([f"--input={table}", f"--output_dir={out}", "--min_count=2"])
    assert sum(len(lines(out, name)) for name in ("train.txt", "valid.txt", "test.txt")) == len(ROWS)
    import_data.main([f"--input={table}", f"--output_dir={out}", "--min_count=2", "--other_label=other"])
    labels = Counter(label for name in ("train.txt", "valid.txt", "test.txt") for _, label in lines(out, name))
    assert labels["other"] == 2 and "Rare" not in labels
    assert "2 labels have fewer than 2 sentences, 2 in all, which are labelled other" in caplog.text
    assert "at most they have 30" in refusal(import_data.main, f"--input={table}", f"--output_dir={out}",
                                             "--min_count=1000") or True


BAD = {
    "ragged.csv": ("text,label\nplay,a\nplay,b,c\n", "ragged.csv:3: 3 cells in a table of 2 columns ('text', 'label'"),
    "columns.csv": ("question_text,n,m\nplay,1,a\nstop,2,b\n",
                    "no column's name says that it holds the sentences; name it with --text_column"),
    "blank.csv": ("text,label\nplay,a\n ,b\n", "blank.csv:3: 'text' is empty. Correct the row, or pass --skip_bad"),
    "label.csv": ("text,label\nplay,a\nstop,\n", "label.csv:3: 'label' is empty."),
    "one.csv": ("text\nplay\nstop\n", "one.csv: one column alone ('text'"),
    "empty.csv": ("", "empty.csv: the file is empty"),
    "header.csv": ("text,label\n", "header.csv: no usable row"),
    "open.csv": ('text,label\nplay,a\n"stop,b\nwait,c\n', "open.csv"),
    "twice.csv": ("text,text,label\nplay,jazz,a\nstop,it,b\n", "several columns may hold the sentences"),
    "book.xlsx": ("PK\3\4...", "book.xlsx: a zip archive or an Excel workbook; save the sheet as CSV"),
    "array.json": ('[{"text": "play", "label": "a"}]', "array.json: a JSON array; JSON lines are expected"),
    "type.jsonl": ('{"text": "play", "label": "a"}\n{"text": ["x"], "label": "b"}\n',
                   "type.jsonl:2: 'text' holds a list"),
    "number.jsonl": ('{"text": 5, "label": "a"}\n', "number.jsonl:1: 'text' holds a number"),
    "scalar.jsonl": ('{"text": "play", "label": "a"}\n5\n', "scalar.jsonl:2: JSON, but no object"),
    "broken.jsonl": ('{"text": "play", "label": "a"}\n{"text": \n', "broken.jsonl:2: not JSON"),
    "surrogate.jsonl": ('{"text": "\\ud800", "label": "a"}\n', "surrogate.jsonl:1: 'text' holds half of a surrogate"),
    "nul.csv": ("text,label\npl\0ay,a\n", "nul.csv:2: the line holds a NUL character"),
    "few.csv": ("text,label\nplay,a\nstop,b\n", "2 different sentences with 2 labels are too few to split off test"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_lose_nothing(tmp_path: Path, name: str) -> None:
    content, says = BAD[name]
    out = tmp_path / "out"
    import_data.main([f"--input={write(tmp_path / 'good.csv', as_csv(ROWS))}", f"--output_dir={out}"])
    before = snapshot(out)
    path = write(tmp_path / name, content)
    assert says in refusal(import_data.main, f"--input={path}", f"--output_dir={out}")
    assert snapshot(out) == before


def test_refused_flags(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", as_csv(ROWS))
    base = (f"--input={path}", f"--output_dir={tmp_path / 'out'}")
    for flags, says in [(["--text_column=query"], "no column 'query'; its columns are 'text', 'category'"),
                        (["--text_column=text", "--label_column=text"], "cannot hold both sentences and labels"),
                        (["--other_label=x"], "--other_label goes with --min_count"),
                        (["--valid_share=0.6", "--test_share=0.5"], "leave nothing to train on"),
                        (["--delimiter=ab"], "neither tab, comma, semicolon, pipe nor one character"),
                        (["--encoding=latin-99"], "no such text encoding"),
                        (["--encoding=ascii"], "in.csv:2: not text in ascii")]:
        assert says in refusal(import_data.main, *base, *flags)
    assert "nowhere.csv: cannot be read" in refusal(import_data.main, "--input=nowhere.csv", base[1])


def test_bad_rows_can_be_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, ("", "PlayMusic"), ("a sentence without a label", "")]
    path, out = write(tmp_path / "in.csv", as_csv(rows)), tmp_path / "out"
    import_data.main([f"--input={path}", f"--output_dir={out}", "--skip_bad_lines"])
    assert f"{len(ROWS)} rows; 1 sentences with line breaks or several blanks in a row, which became one; 2 rows " \
           "skipped" in caplog.text


def test_other_data_move_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out / "train.txt", "mine\tlabel\n")
    for _ in range(2):
        import_data.main([f"--input={write(tmp_path / 'in.csv', as_csv(ROWS))}", f"--output_dir={out}"])
    assert (out / "train.txt.previous").read_text(encoding="utf-8") == "mine\tlabel\n"
    assert sorted(path.name for path in out.iterdir()) == ["test.txt", "train.txt", "train.txt.previous", "valid.txt"]
    assert caplog.text.count("[moved aside]") == 1


def test_standard_input_and_the_report(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "import_data.py"), "--input=-", f"--output_dir={tmp_path}"],
                          input=as_csv(ROWS, ";"), capture_output=True, text=True, encoding="utf-8", check=True)
    assert "[-] UTF-8, delimiter semicolon, with quotes, with header; sentences in 'text', labels in 'category'" in (
        done.stderr)
    assert "[train.txt]" in done.stderr and "[labels]" in done.stderr
    assert "[next] python preprocess.py --data_dir=" in done.stderr


def test_labels_come_as_numbers_and_truths(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"text": f"sentence {number}", "label": label}
                                     for number, label in enumerate([1, 2.5, True, "x"] * 10)]
    path = write(tmp_path / "in.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    import_data.main([f"--input={path}", f"--output_dir={tmp_path / 'out'}"])
    assert {label for _, label in lines(tmp_path / "out", "train.txt")} == {"1", "2.5", "True", "x"}


@pytest.mark.real
@pytest.mark.parametrize(("train", "test", "label", "counts"), [
    ("banking77/train.csv", "banking77/test.csv", "category", (9003, 1000, 3080)),
    ("korean-hate-speech/train.tsv", "korean-hate-speech/dev.tsv", "hate", (7106, 790, 471)),
    ("3i4k/fci_train_val.txt", "3i4k/fci_test.txt", "1", (49591, 5543, 6121))])
def test_published_tables(shared: Path, tmp_path: Path, train: str, test: str, label: str,
                          counts: tuple[int, int, int]) -> None:
    """As published; and the same rows as JSON lines, parquet and UTF-16 TSV give byte for byte the same folder."""
    def imported(name: str, *files: Path) -> dict[str, bytes | None]:
        out = tmp_path / name
        flags = [f"--label_column={label}", *(["--text_column=2"] if label == "1" else [])]
        import_data.main([f"--input={files[0]}", f"--test={files[1]}", f"--output_dir={out}", *flags])
        return snapshot(out)

    published = [shared / "data" / train, shared / "data" / test]
    made = imported("published", *published)
    assert tuple(len(lines(tmp_path / "published", name)) for name in ("train.txt", "valid.txt", "test.txt")) == counts
    tables = []
    for path in published:
        with read_table(str(path)) as table:
            tables.append((table.columns, [row.cells for row in table]))
    for ending in (".jsonl", ".parquet", ".tsv"):
        files = []
        for number, (columns, rows) in enumerate(tables):
            files.append(path := tmp_path / f"{number}{ending}")
            if ending == ".tsv":
                file = io.StringIO()
                csv.writer(file, delimiter="\t").writerows([columns, *rows])
                write(path, file.getvalue(), "utf-16")
            else:
                records = [dict(zip(columns, row, strict=True)) for row in rows]
                if ending == ".parquet":
                    parquet.write_table(pyarrow.Table.from_pylist(records), path)
                else:
                    write(path, "".join(f"{json.dumps(record)}\n" for record in records))
        assert imported(ending[1:], *files) == made
